"""The registry of ops: adamops' own, and those that other packages register as entry points."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any, NamedTuple

from .cpu_adam import CPUAdamBuilder
from .fused_adam import FusedAdamBuilder
from .loading import OpBuilder
from .spec import Op, OpUnavailableError, missing_of
from .torch_adam import TorchAdamBuilder

ENTRY_POINT_GROUP = "adamops.op_builders"


class RegisteredOp(NamedTuple):
    """An op's name, with its builder or the error that makes it unusable.

    `origin` is "built-in", or the distribution that provides the op.
    """

    name: str
    origin: str
    builder: Op | None
    error: str | None = None


def builtin_builders() -> list[OpBuilder]:
    """Builders of the ops that ship with adamops and need compiling."""
    return [CPUAdamBuilder(), FusedAdamBuilder()]


# Created once, at import, so that all threads share the same builders.
_BUILTIN: dict[str, OpBuilder] = {builder.NAME: builder for builder in (*builtin_builders(), TorchAdamBuilder())}


def builtin_ops() -> list[RegisteredOp]:
    """The ops that ship with adamops, with the builders that get() returns."""
    return [RegisteredOp(name, "built-in", builder) for name, builder in _BUILTIN.items()]


def plugins(group: str = ENTRY_POINT_GROUP) -> list[importlib.metadata.EntryPoint]:
    """The entry points under which other packages register ops, or what else has a group. Loads none of them."""
    try:
        return list(importlib.metadata.entry_points(group=group))
    except Exception:  # the entry points of some package, perhaps one without ops, cannot be read
        return list(_readable_plugins(group))


def _readable_plugins(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    seen = set()
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):
            name, found = distribution.name, distribution.entry_points.select(group=group)
            if name not in seen:  # the first on the path is the one that Python imports
                seen.add(name)
                yield from found


@functools.cache
def registered_ops() -> tuple[RegisteredOp, ...]:
    """All ops, built-in ones first. Raises nothing: a plugin's error is stored in its entry."""
    ops = {op.name: op for op in builtin_ops()}
    for entry_point in plugins():
        plugin = load_plugin(entry_point)
        if plugin.name in ops:
            error = name_is_taken(plugin.name, ops[plugin.name].origin)
            plugin = RegisteredOp(f"{plugin.name} ({plugin.origin})", plugin.origin, None, error)
        ops[plugin.name] = plugin
    return tuple(ops.values())


def name_is_taken(name: str, origin: str) -> str:
    """The error for a plugin whose op has the same name as another op."""
    return f"the name {name!r} is taken by {origin}"


def origin_of(entry_point: importlib.metadata.EntryPoint) -> str:
    """The distribution that provides a plugin."""
    return entry_point.dist.name if entry_point.dist else entry_point.value


def load_plugin(entry_point: importlib.metadata.EntryPoint) -> RegisteredOp:
    """Loads a plugin's op. An error is stored in the result; only KeyboardInterrupt is raised."""
    origin = origin_of(entry_point)
    try:
        found = entry_point.load()
        builder = found() if isinstance(found, type) else found
        if missing := missing_of(builder):
            raise TypeError(f"{entry_point.value} is not an op builder: it has no {', '.join(missing)}")
        if not isinstance(builder.NAME, str) or not builder.NAME:
            raise TypeError(f"{entry_point.value} is not an op builder: its NAME is {builder.NAME!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # third-party code must never break the user's import
        return RegisteredOp(entry_point.name, origin, None, f"{type(error).__name__}: {error}")
    return RegisteredOp(builder.NAME, origin, builder)


def get(name: str) -> Any:
    """The builder of the op with this name.

    Raises
    ------
    KeyError
        If there is no such op.
    OpUnavailableError
        If a plugin of this name is broken.
    """
    if name in _BUILTIN:  # first, because looking up other ops imports every plugin
        return _BUILTIN[name]
    for op in registered_ops():
        if op.name == name:
            if op.builder is None:
                raise OpUnavailableError(f"The op {name!r} of {op.origin} is broken: {op.error}")
            return op.builder
    raise KeyError(f"no op {name!r}; there are {', '.join(op.name for op in registered_ops())}")

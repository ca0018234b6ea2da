"""The registry of ops: those that come with adamops, and those that other packages offer by entry point.

Imports neither torch nor adamops, so that setup.py can use it before anything is installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import NamedTuple

from .builder import Compatibility, OpBuilder, OpUnavailableError
from .compile import BuildError, CompileUnit
from .cpu import CPUOpBuilder
from .cpu_adam import CPUAdamBuilder
from .cuda import CUDAOpBuilder
from .fused_adam import FusedAdamBuilder
from .torch_adam import TorchAdamBuilder

__all__ = [
    "BuildError",
    "CPUOpBuilder",
    "CUDAOpBuilder",
    "Compatibility",
    "CompileUnit",
    "OpBuilder",
    "OpUnavailableError",
    "RegisteredOp",
    "builtin_builders",
    "get",
    "registered_ops",
]

ENTRY_POINT_GROUP = "adamops.op_builders"

# What an object must have to be used as a builder.
_CONTRACT = ("NAME", "compatibility", "is_prebuilt", "load")


class RegisteredOp(NamedTuple):
    """An op by name, with its builder or what is wrong with it.

    `origin` is "built-in", or the distribution that offers it.
    """

    name: str
    origin: str
    builder: OpBuilder | None
    error: str | None = None


def builtin_builders() -> list[OpBuilder]:
    """A builder for each op that comes with adamops and has something to compile."""
    return [CPUAdamBuilder(), FusedAdamBuilder()]


# Made at import, once, whichever threads ask for them.
_BUILTIN: dict[str, OpBuilder] = {builder.NAME: builder for builder in (*builtin_builders(), TorchAdamBuilder())}


def builtin_ops() -> list[RegisteredOp]:
    """The ops that come with adamops, with the builders that get() returns."""
    return [RegisteredOp(name, "built-in", builder) for name, builder in _BUILTIN.items()]


def plugins() -> list[importlib.metadata.EntryPoint]:
    """The entry points by which other packages offer ops, none of them loaded."""
    return list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


@functools.cache
def registered_ops() -> tuple[RegisteredOp, ...]:
    """All ops, built-in ones first. What is wrong with a plugin is kept in its entry; nothing is raised."""
    ops = {op.name: op for op in builtin_ops()}
    for entry_point in plugins():
        plugin = load_plugin(entry_point)
        if plugin.name in ops:
            error = name_is_taken(plugin.name, ops[plugin.name].origin)
            plugin = RegisteredOp(f"{plugin.name} ({plugin.origin})", plugin.origin, None, error)
        ops[plugin.name] = plugin
    return tuple(ops.values())


def name_is_taken(name: str, origin: str) -> str:
    """What is wrong with a plugin whose op has the name of another."""
    return f"the name {name!r} is taken by {origin}"


def origin_of(entry_point: importlib.metadata.EntryPoint) -> str:
    """The distribution that offers a plugin."""
    return entry_point.dist.name if entry_point.dist else entry_point.value


def load_plugin(entry_point: importlib.metadata.EntryPoint) -> RegisteredOp:
    """The op of a plugin, with what is wrong with it; nothing is raised but KeyboardInterrupt."""
    origin = origin_of(entry_point)
    try:
        found = entry_point.load()
        builder = found() if isinstance(found, type) else found
        missing = [name for name in _CONTRACT if not hasattr(builder, name)]
        if missing:
            raise TypeError(f"{entry_point.value} is not an op builder: it has no {', '.join(missing)}")
        if not isinstance(builder.NAME, str) or not builder.NAME:
            raise TypeError(f"{entry_point.value} is not an op builder: its NAME is {builder.NAME!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a third party's code does must not reach the user's import
        return RegisteredOp(entry_point.name, origin, None, f"{type(error).__name__}: {error}")
    return RegisteredOp(builder.NAME, origin, builder)


def get(name: str) -> OpBuilder:
    """The builder of the op with this name.

    Raises
    ------
    KeyError
        If there is no such op.
    OpUnavailableError
        If a plugin of this name is broken.
    """
    if name in _BUILTIN:  # first, since to know the others takes the import of every plugin
        return _BUILTIN[name]
    for op in registered_ops():
        if op.name == name:
            if op.builder is None:
                raise OpUnavailableError(f"The op {name!r} of {op.origin} is broken: {op.error}")
            return op.builder
    raise KeyError(f"no op {name!r}; there are {', '.join(op.name for op in registered_ops())}")

"""The backends by type of device, in one list: the compiled ops, those of other packages, and last pure PyTorch.

Another package brings a device that has no op here as an entry point of the group "adamops.backends": a function of a
rule and a device that returns a Backend, or None where it has none for them. It raises OpUnavailableError, with the
reason, if it should have one, but cannot work here. Must not know any one rule.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ... import op_builder
from ..rule import Rule, required
from .base import Backend
from .cpu import NativeBackend

if TYPE_CHECKING:
    from .torch import TorchBackend

ENTRY_POINT_GROUP = "adamops.backends"
Factory: TypeAlias = Callable[[Rule, torch.device], Backend | None]
_MEMBERS = tuple(name for name in (*vars(Backend), *Backend.__annotations__) if not name.startswith("_"))


def load_backend(rule: Rule, device: torch.device) -> Backend:
    """The first backend of the list for the params of a rule on a device. The last one comes with a warning."""
    reasons: list[str] = []
    backend = _first((_on_cuda, _on_cpu), rule, device, reasons) or plugin_backend(rule, device, reasons)
    return backend or pure_pytorch("\n".join(reasons) or f"No op is compiled for params on {_words_of(device)}.")


def plugin_backend(rule: Rule, device: torch.device, reasons: list[str] | None = None) -> Backend | None:
    """The first backend of another package for the params of a rule on a device. Adds why others cannot be used."""
    return _first(_plugins(), rule, device, [] if reasons is None else reasons)


def _first(factories: tuple[Factory, ...], rule: Rule, device: torch.device, reasons: list[str]) -> Backend | None:
    for factory in factories:
        try:
            backend = factory(rule, device)
        except op_builder.OpUnavailableError as error:
            reasons.append(str(error))
            continue
        if backend is not None:
            return backend
    return None


def _on_cuda(rule: Rule, device: torch.device) -> Backend | None:
    if device.type != "cuda" or torch.version.hip or "cuda" not in rule.ops:
        return None
    from .cuda import CudaBackend  # not at the top: most processes do not need it

    return CudaBackend(of_rule(_builder(rule.ops["cuda"]).load_for_device(device.index), rule), device)


def _on_cpu(rule: Rule, device: torch.device) -> Backend | None:
    if device.type != "cpu" or "cpu" not in rule.ops:
        return None
    return NativeBackend(of_rule(_builder(rule.ops["cpu"]).load(), rule))


def _builder(name: str) -> Any:
    """The builder of an op. Raises OpUnavailableError if no package provides it."""
    try:
        return op_builder.get(name)
    except KeyError as error:
        raise op_builder.OpUnavailableError(str(error.args[0])) from None


def of_rule(module: Any, rule: Rule) -> Any:
    """The module of an op, whose C++ must describe states and hyper-parameters as the rule does in Python."""
    ours = rule.hyper_names, tuple((state.name, state.signed, state.rounding) for state in rule.states)
    theirs = module.HYPER, module.STATES
    if ours != theirs or len(required(rule.states)) != module.LEAST_STATES:
        raise TypeError(
            f"The op {module.__name__} was built for other hyper-parameters or states than {type(rule).__name__} has: "
            f"{theirs}, at least {module.LEAST_STATES} of the states, and here {ours}; build it anew"
        )
    return module


def _words_of(device: torch.device) -> str:
    return "AMD GPUs" if device.type == "cuda" and torch.version.hip else device.type


def pure_pytorch(why: str) -> TorchBackend:
    """The pure PyTorch fallback, with a warning that says why."""
    _warn(f"adamops falls back to pure PyTorch, which is slow. {why}")
    from .torch import TorchBackend

    op_builder.get("torch_adam").load()
    return TorchBackend()


def _warn(message: str) -> None:
    """Warns about the caller of adamops."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("adamops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


# Backends of other packages -------------------------------------------------------------------------------------------


@functools.cache
def _plugins() -> tuple[Factory, ...]:
    """What the entry points give. A broken one costs a warning.

    Only looked for where a device has no op: that reads a file of each installed package.
    """
    return tuple(_loaded_plugins())


def _loaded_plugins() -> Iterator[Factory]:
    for entry_point in op_builder.plugins(ENTRY_POINT_GROUP):
        try:
            found = entry_point.load()
            if not callable(found):
                raise TypeError(f"{entry_point.value} is a {type(found).__name__}; expected a function")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # third-party code must never break the user's optimizer
            _warn(_broken(entry_point, error))
        else:
            yield functools.partial(_guarded, entry_point, found)


def _guarded(
    entry_point: importlib.metadata.EntryPoint, factory: Factory, rule: Rule, device: torch.device
) -> Backend | None:
    try:
        backend = factory(rule, device)
        if backend is not None and (missing := [name for name in _MEMBERS if not hasattr(backend, name)]):
            raise TypeError(f"what {entry_point.value} returned is no backend: it has no {', '.join(missing)}")
    except (op_builder.OpUnavailableError, KeyboardInterrupt):
        raise
    except BaseException as error:
        _warn(_broken(entry_point, error))
        return None
    return backend


def _broken(entry_point: importlib.metadata.EntryPoint, error: BaseException) -> str:
    origin = op_builder.origin_of(entry_point)
    return f"adamops ignores the backend {entry_point.name!r} of {origin}: {type(error).__name__}: {error}"

"""Finds wrappers of modules that average grads over processes after autograd has put them into the params.

DistributedDataParallel and FullyShardedDataParallel leave no sign on the params, or one too late, so the wrappers are
looked for. fully_shard() is none of them: it calls the hooks of its params once their grads are averaged.
Must not know what the grads are needed for.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook


def wrapper_of(model: nn.Module, params: Sequence[Tensor]) -> str | None:
    """The name of the class that averages grads of the params: in the model, around it or around a part of it."""
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
        return "FullyShardedDataParallel"
    ids = {id(param) for param in params}
    for wrapper in (*model.modules(), *_wrappers_elsewhere()):
        if _is_wrapper(type(wrapper)) and any(id(param) in ids for param in _averaged(wrapper)):
            return type(wrapper).__name__
    return None


def watch_new_wrappers(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    """Has ``check(name of the class, modules, params)`` called, once a process, whenever a wrapper is being made.

    What it raises is raised by the wrapper's constructor.
    """
    _watch(check)


@functools.cache
def _watch(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    def on_registration(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None and _is_wrapper(type(wrapper)):
            check(type(wrapper).__name__, module.modules(), _averaged(wrapper))

    register_module_module_registration_hook(on_registration)


def _is_wrapper(cls: type) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: it would take a second
    return issubclass(cls, (nn.parallel.DistributedDataParallel, getattr(fsdp, "FullyShardedDataParallel", ())))


def _averaged(wrapper: nn.Module) -> Iterable[Tensor]:
    """The params whose grads a wrapper averages. DistributedDataParallel can leave some out."""
    averaged = wrapper.__dict__.get("_module_parameters")
    return wrapper.parameters() if averaged is None else averaged


def _wrappers_elsewhere() -> list[nn.Module]:
    """All wrappers of this process: a module does not know who has wrapped it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    return [found for found in gc.get_objects() if _is_wrapper(type(found))]

"""Finds wrappers of modules that average grads over processes after autograd has put them into the params.

Wrappers leave no sign on the params, or one too late, so they are looked for. fully_shard() is none of them: it calls
the hooks of its params once their grads are averaged. Must not know what the grads are needed for.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
    ("megatron.core.distributed", "DistributedDataParallel"),
    ("apex.parallel", "DistributedDataParallel"),
)


def wrapper_of(modules: Iterable[nn.Module], params: Iterable[Tensor]) -> str | None:
    """The name of the class that averages grads of the params: among the modules of a model, or around some of them."""
    params = list(params)
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
        return "FullyShardedDataParallel"
    ids, classes = {id(param) for param in params}, _wrapper_classes()
    for wrapper in (*modules, *_wrappers_elsewhere(classes)):
        if isinstance(wrapper, classes) and any(id(param) in ids for param in _averaged(wrapper)):
            return type(wrapper).__name__
    return None


def runs_no_hooks(model: nn.Module) -> bool:
    """Whether fully_shard() has cut the model, and is that of torch 2.4, which runs no hooks of its params."""
    if _torch_version() >= (2, 5):
        return False
    modules = ("torch.distributed._composable.fsdp.", "torch.distributed.fsdp._fully_shard.")
    return any(cls.__module__.startswith(modules) for part in model.modules() for cls in type(part).__mro__)


def watch_new_wrappers(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    """Has ``check(name of the class, modules, params)`` called, once a process, whenever a wrapper is being made.

    What it raises is raised by the wrapper's constructor.
    """
    _watch(check)


@functools.cache
def _watch(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    def on_registration(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None and isinstance(wrapper, _wrapper_classes()):
            check(type(wrapper).__name__, module.modules(), _averaged(wrapper))

    register_module_module_registration_hook(on_registration)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _wrapper_classes() -> tuple[type, ...]:
    """Those of _WRAPPERS that have been imported: importing them here would take seconds."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _WRAPPERS)
    return tuple(cls for cls in found if isinstance(cls, type))


def _averaged(wrapper: nn.Module) -> Iterable[Tensor]:
    """The params whose grads a wrapper averages. DistributedDataParallel can leave some out."""
    averaged = wrapper.__dict__.get("_module_parameters")
    return wrapper.parameters() if averaged is None else averaged


def _wrappers_elsewhere(classes: tuple[type, ...]) -> list[nn.Module]:
    """All wrappers of this process: a module does not know who has wrapped it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    return [found for found in gc.get_objects() if issubclass(type(found), classes)]

"""Finds module wrappers that average grads over processes after autograd has accumulated them into the params.

Wrappers do not mark the params, or mark them too late, so this searches for the wrappers. fully_shard() is not one of
them: it calls the hooks of its params once their grads are averaged. Must not know what the grads are needed for.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .. import _torch_compat

_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
    ("megatron.core.distributed", "DistributedDataParallel"),
    ("apex.parallel", "DistributedDataParallel"),
)


def wrapper_of(modules: Iterable[nn.Module], params: Iterable[Tensor]) -> str | None:
    """The class name of a wrapper that averages the params' grads: among a model's modules, or around some of them."""
    params = list(params)
    if any(map(_torch_compat.is_marked_by_fsdp, params)):
        return "FullyShardedDataParallel"
    ids, classes = {id(param) for param in params}, _wrapper_classes()
    for wrapper in (*modules, *_wrappers_elsewhere(classes)):
        if isinstance(wrapper, classes) and any(id(param) in ids for param in _torch_compat.averaged_params(wrapper)):
            return type(wrapper).__name__
    return None


def watch_new_wrappers(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    """Registers, once per process, ``check(class name, modules, params)`` to be called while a wrapper is constructed.

    The wrapper's constructor raises what `check` raises.
    """
    _watch(check)


@functools.cache
def _watch(check: Callable[[str, Iterable[nn.Module], Iterable[Tensor]], None]) -> None:
    def on_registration(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None and isinstance(wrapper, _wrapper_classes()):
            check(type(wrapper).__name__, module.modules(), _torch_compat.averaged_params(wrapper))

    register_module_module_registration_hook(on_registration)


def _wrapper_classes() -> tuple[type, ...]:
    """The classes of _WRAPPERS that are already imported; importing them here would take seconds."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _WRAPPERS)
    return tuple(cls for cls in found if isinstance(cls, type))


def _wrappers_elsewhere(classes: tuple[type, ...]) -> list[nn.Module]:
    """All wrappers in this process, because a module does not know what wraps it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    objects = gc.get_objects()
    # A check of a class runs Python, as one of these classes is abstract, and there are far fewer classes than objects.
    wanted = {cls for cls in set(map(type, objects)) if issubclass(cls, classes)}
    return [found for found in objects if type(found) in wanted] if wanted else []

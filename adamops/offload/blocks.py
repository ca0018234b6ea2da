"""Which params a model reads in the forward pass of one of its blocks. Must not know of optimizers.

Blocks are the elements of a model's outermost nn.ModuleList, nn.ModuleDict and nn.Sequential containers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..optim.dynamo_disabled import dynamo_disabled

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in order; each once."""
    if isinstance(model, _CONTAINERS):
        return list(dict.fromkeys(model.children()))
    return list(dict.fromkeys(block for child in model.children() for block in blocks_of(child)))


def params_by_block(model: nn.Module) -> dict[nn.Module, list[Tensor]]:
    """The params of each block that are in no other block, nor outside of all blocks."""
    blocks = blocks_of(model)
    inside = [set(block.modules()) for block in blocks]
    owners: Counter[Tensor] = Counter()
    for modules in inside:
        owners.update({param for module in modules for param in module.parameters(recurse=False)})
    outside = set(model.modules()).difference(*inside)
    owners.update(param for module in outside for param in module.parameters(recurse=False))
    return {block: [param for param in block.parameters() if owners[param] == 1] for block in blocks}


class _Call:
    """A hook that calls a method, as long as its object lives. A copy or pickle does nothing."""

    def __init__(self, method: Callable[..., None], *arguments: Any) -> None:
        self._method = weakref.WeakMethod(method)
        self._arguments = arguments

    @dynamo_disabled
    def __call__(self, *_: Any) -> None:
        method = self._method()
        if method is not None:
            method(*self._arguments)

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    """What is left of a hook in a copy of its module."""

    def __call__(self, *_: Any) -> None:
        pass


def before_access(block: nn.Module, method: Callable[..., None], *arguments: Any) -> list[RemovableHandle]:
    """Calls a method before the forward pass of a block, or of any module in it, and before saving and loading it.

    The hooks do not keep the method's object alive.
    """
    call, handles = _Call(method, *arguments), []
    for module in block.modules():
        handles += [module.register_forward_pre_hook(call, prepend=True), module.register_state_dict_pre_hook(call)]
        if hasattr(module, "register_load_state_dict_pre_hook"):  # since torch 2.5; without it, a write is an error
            handles.append(module.register_load_state_dict_pre_hook(call))
    return handles

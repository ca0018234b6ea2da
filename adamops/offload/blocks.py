"""Which params a model reads in the forward pass of one of its blocks. Must not know of optimizers.

Blocks are the elements of a model's outermost nn.ModuleList, nn.ModuleDict and nn.Sequential containers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

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


def before_reading(block: nn.Module, call: Callable[[], None]) -> None:
    """Calls `call` before the forward pass and the state dict of a block, or of any module in it."""
    for module in block.modules():
        module.register_forward_pre_hook(lambda *_: call())
        module.register_state_dict_pre_hook(lambda *_: call())

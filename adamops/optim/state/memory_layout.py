"""Brings the states of a param whose memory layout has changed, as by `model.to(memory_format=...)`, into the new one.

Must not know of optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import is_dense, like_param, same_layout
from ..rule import State
from .precision import SCALES, names_of, tensors_of
from .quantized_states import dequantized_states, is_quantized, quantized_states


def is_in_layout_of(
    param: Tensor, state: Mapping[str, Any], states: tuple[State, ...], needed: Collection[str]
) -> bool:
    """Whether no needed tensor of the state has the elements in another order in memory than the param has them.

    `states`, here and below, are all of the rule's.
    """
    return not _in_other_layouts(state, param, states, needed)


def moved_with(state: Mapping[str, Any], states: tuple[State, ...], needed: Collection[str]) -> tuple[str, ...]:
    """The tensors that in_layout_of() may replace: the needed ones; of quantized states all, as they share scales."""
    return tuple({*needed, *names_of(states), SCALES} if is_quantized(state, states) else needed)


def in_layout_of(
    param: Tensor,
    state: Mapping[str, Any],
    states: tuple[State, ...],
    needed: Collection[str],
    new: Callable[[torch.dtype], Tensor],
) -> dict[str, Any]:
    """A state with new tensors in place of needed ones with another memory layout; it must fit the param otherwise.

    `new` makes a tensor with the param's layout. Quantized states are all quantized anew, as other elements share a
    quantization block then. A state stays as it is if a tensor to be replaced shares its memory, with other processes
    or as a view of a larger one: they would miss later writes.
    """
    others, names = _in_other_layouts(state, param, states, needed), names_of(states)
    requantizes = is_quantized(state, states) and not others.keys().isdisjoint(names)
    replaced = others if not requantizes else {n: state[n] for n in (*names, SCALES) if n in state} | others
    if not all(map(_owns_its_memory, replaced.values())):
        return {**state}
    moved = {name: new(value.dtype).copy_(value) for name, value in others.items()}
    if requantizes:
        floats = {name: like_param(value, param) for name, value in dequantized_states(state, states).items()}
        moved.update(quantized_states(floats, states))
    return {**state, **moved}


def _in_other_layouts(
    state: Mapping[str, Any], param: Tensor, states: tuple[State, ...], names: Collection[str]
) -> dict[str, Tensor]:
    return {
        name: value
        for name in tensors_of(states)
        if name in names
        and name != SCALES
        and isinstance(value := state.get(name), Tensor)
        and value.layout == param.layout == torch.strided
        and value.shape == param.shape
        and is_dense(value)
        and not same_layout(value, param)
    }


def _owns_its_memory(tensor: Tensor) -> bool:
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return is_whole and not (tensor.device.type == "cpu" and tensor.is_shared())

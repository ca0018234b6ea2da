"""Brings the states of a param whose memory layout has changed, as by `model.to(memory_format=...)`, into the new one.

Must not know of optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import is_dense, like_param, same_layout
from .precision import AVERAGES, MASTER, REMAINDER
from .quantized_states import dequantized_states, is_quantized, quantized_states


def is_in_layout_of(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether no tensor of the state has the elements in another order in memory than the param has them."""
    return not _in_other_layouts(state, param)


def in_layout_of(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with new tensors in place of those with another memory layout; the state must fit the param otherwise.

    Quantized states are quantized anew, as other elements share a quantization block then. A state stays as it is if
    such a tensor shares its memory, with other processes or as a view of a larger one: they would miss later writes.
    """
    others = _in_other_layouts(state, param)
    if not all(map(_owns_its_memory, others.values())):
        return {**state}
    moved = {name: like_param(value, param) for name, value in others.items()}
    if is_quantized(state) and not moved.keys().isdisjoint(AVERAGES):
        averages = {name: like_param(value, param) for name, value in dequantized_states(state).items()}
        moved.update(quantized_states(averages))
    return {**state, **moved}


def _in_other_layouts(state: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    return {
        name: value
        for name in (*AVERAGES, MASTER, REMAINDER)
        if isinstance(value := state.get(name), Tensor)
        and value.layout == param.layout == torch.strided
        and value.shape == param.shape
        and is_dense(value)
        and not same_layout(value, param)
    }


def _owns_its_memory(tensor: Tensor) -> bool:
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return is_whole and not (tensor.device.type == "cpu" and tensor.is_shared())

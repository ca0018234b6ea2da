"""Converts the states of a param between 8 bits and floats, whatever the memory order of its elements.

Works a piece at a time, so it needs only some megabytes besides what it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import dense
from ..pieces import PIECE, each_piece
from ..rule import State
from . import quantization
from .precision import QUANTIZED, SCALES, names_of


@functools.cache
def saved_names(states: tuple[State, ...]) -> dict[str, str]:
    """The names of quantized states in state dicts, by the names that they have in memory."""
    return {name: QUANTIZED + name for name in names_of(states)}


def is_quantized(state: Mapping[str, Any], states: Sequence[State]) -> bool:
    """Whether a param's states are quantized to 8 bits, as the first one tells. `states` are those of its rule."""
    first = state.get(states[0].name) if states else None
    return isinstance(first, Tensor) and first.dtype == quantization.format_of(states[0]).dtype


def dequantized_states(
    state: Mapping[str, Any], states: Sequence[State], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Dequantizes the quantized ones of these states, the first of the rule's, into new float tensors."""
    scales = state[SCALES]
    # One that is no longer in use may be left without a column of scales.
    held = [kind for kind in states[: scales.shape[1]] if kind.name in state]
    quantized = {kind.name: dense(state[kind.name]) for kind in held}
    floats = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in quantized.items()}
    pieces = zip(each_piece(*quantized.values()), each_piece(*floats.values()), _rows(scales), strict=True)
    for lines, targets, rows in pieces:
        dequantized = quantization.dequantize_states(dict(zip(quantized, lines, strict=True)), rows, held)
        for target, values in zip(targets, dequantized.values(), strict=True):
            target.copy_(values)
    return floats


def quantized_states(
    floats: Mapping[str, Tensor], states: Sequence[State], step: int | None = None
) -> dict[str, Tensor]:
    """Quantized states and scales, from dense tensors with the same layout; rounded as in `step`, or to the nearest."""
    held = [kind for kind in states if kind.name in floats]
    floats = {kind.name: floats[kind.name] for kind in held}
    dtypes = {kind.name: quantization.format_of(kind).dtype for kind in held}
    quantized = {name: torch.empty_like(tensor, dtype=dtypes[name]) for name, tensor in floats.items()}
    first, *_ = floats.values()
    blocks = quantization.block_count(first.numel())
    scales = torch.empty((blocks, len(floats)), dtype=torch.bfloat16, device=first.device)
    pieces = zip(each_piece(*floats.values()), each_piece(*quantized.values()), _rows(scales), strict=True)
    for i, (lines, targets, rows) in enumerate(pieces):
        values = {name: line.float() for name, line in zip(floats, lines, strict=True)}
        values_of_piece, of_piece = quantization.quantize_states(values, held, step, first=i * PIECE)
        rows.copy_(of_piece)
        for target, line in zip(targets, values_of_piece.values(), strict=True):
            target.copy_(line)
    return {SCALES: scales, **quantized}


def _rows(scales: Tensor) -> tuple[Tensor, ...]:
    """The scales of each piece, as views."""
    return scales.split(PIECE // quantization.QUANTIZATION_BLOCK)


def store_quantized(state: dict[str, Any], floats: Mapping[str, Tensor], states: Sequence[State], step: int) -> None:
    """Quantizes states into the tensors that they came from."""
    for name, tensor in quantized_states(floats, states, step).items():
        target = state[name]
        if name == SCALES:  # there are more columns if fewer states are in use than before
            target = target[:, : tensor.shape[1]]
        target.copy_(tensor)


def with_saved_names(state: Mapping[str, Any], states: tuple[State, ...]) -> dict[str, Any]:
    """The state of a param as in state dicts: quantized states have names that only adamops knows.

    Optimizers of torch and others then find a state missing, instead of taking the integers for numbers.
    """
    saved = saved_names(states)
    return {saved.get(name, name): value for name, value in state.items()}


def with_held_names(state: Mapping[str, Any], states: tuple[State, ...], name: str) -> dict[str, Any]:
    """The inverse; any other state stays as it is. Raises ValueError if a tensor is there under both names."""
    held_names = {}
    for held, saved in saved_names(states).items():
        held_names[saved] = held
        if held in state and saved in state:
            raise ValueError(
                f"{name} has {held!r} and {saved!r} in its state: the one is of floats, the other of 8-bit states "
                "(state_dtype='8bit'); leave one out"
            )
    return {held_names.get(key, key): value for key, value in state.items()}

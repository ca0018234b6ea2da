"""Converts the states of a param between 8 bits and floats, whatever the memory order of its elements.

Works a piece at a time, so it needs only some megabytes besides what it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import dense
from ..pieces import PIECE, each_piece
from . import quantization
from .precision import AVERAGES, QUANTIZED, SCALES

_SAVED = {name: QUANTIZED + name for name in AVERAGES}
_HELD = {saved: name for name, saved in _SAVED.items()}
SAVED_NAMES = tuple(_HELD)  # of quantized averages in state dicts


def is_quantized(state: Mapping[str, Any]) -> bool:
    """Whether a param's states are quantized to 8 bits."""
    exp_avg = state.get("exp_avg")
    return isinstance(exp_avg, Tensor) and exp_avg.dtype == torch.int8


def dequantized_states(
    state: Mapping[str, Any], names: Iterable[str] = AVERAGES, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Dequantizes the quantized states into new float tensors."""
    scales = state[SCALES]
    # After amsgrad was switched off, a state may be left that has no column of scales.
    quantized = {name: dense(state[name]) for name in AVERAGES[: scales.shape[1]] if name in names and name in state}
    floats = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in quantized.items()}
    pieces = zip(each_piece(*quantized.values()), each_piece(*floats.values()), _rows(scales), strict=True)
    for lines, targets, rows in pieces:
        dequantized = quantization.dequantize_states(dict(zip(quantized, lines, strict=True)), rows)
        for target, values in zip(targets, dequantized.values(), strict=True):
            target.copy_(values)
    return floats


def quantized_states(floats: Mapping[str, Tensor], step: int | None = None) -> dict[str, Tensor]:
    """Quantized states and scales, from dense tensors with the same layout; rounded as in `step`, or to the nearest."""
    floats = {name: floats[name] for name in AVERAGES if name in floats}
    dtypes = {name: quantization.FORMATS[name].dtype for name in floats}
    quantized = {name: torch.empty_like(tensor, dtype=dtypes[name]) for name, tensor in floats.items()}
    first, *_ = floats.values()
    blocks = quantization.block_count(first.numel())
    scales = torch.empty((blocks, len(floats)), dtype=torch.bfloat16, device=first.device)
    pieces = zip(each_piece(*floats.values()), each_piece(*quantized.values()), _rows(scales), strict=True)
    for i, (lines, targets, rows) in enumerate(pieces):
        states = {name: line.float() for name, line in zip(floats, lines, strict=True)}
        values_of_piece, of_piece = quantization.quantize_states(states, step, first=i * PIECE)
        rows.copy_(of_piece)
        for target, values in zip(targets, values_of_piece.values(), strict=True):
            target.copy_(values)
    return {SCALES: scales, **quantized}


def _rows(scales: Tensor) -> tuple[Tensor, ...]:
    """The scales of each piece, as views."""
    return scales.split(PIECE // quantization.QUANTIZATION_BLOCK)


def store_quantized(state: dict[str, Any], floats: Mapping[str, Tensor], step: int) -> None:
    """Quantizes states into the tensors that they came from."""
    for name, tensor in quantized_states(floats, step).items():
        target = state[name]
        if name == SCALES:  # there is one more column if amsgrad was switched off
            target = target[:, : tensor.shape[1]]
        target.copy_(tensor)


def with_saved_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param as in state dicts: quantized averages have names that only adamops knows.

    torch.optim.AdamW and others then find a state missing, instead of taking the integers for averages.
    """
    return {_SAVED.get(name, name): value for name, value in state.items()}


def with_held_names(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The inverse; any other state stays as it is. Raises ValueError if a tensor is there under both names."""
    for held, saved in _SAVED.items():
        if held in state and saved in state:
            raise ValueError(
                f"{name} has {held!r} and {saved!r} in its state: the one is of floats, the other of 8-bit states "
                "(state_dtype='8bit'); leave one out"
            )
    return {_HELD.get(name, name): value for name, value in state.items()}

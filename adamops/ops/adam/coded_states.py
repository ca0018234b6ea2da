"""The states of a param between 8-bit codes and float32 tensors, in whatever order its elements lie in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import block_codes
from .precision import AVERAGES, SCALES


def line_of(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))


def float_states(state: Mapping[str, Any], names: Iterable[str] = AVERAGES) -> dict[str, Tensor]:
    """New float32 tensors of the states that are codes."""
    codes = {name: line_of(state[name]) for name in names if name in state}
    decoded = block_codes.decode_states(codes, state[SCALES])
    floats = {}
    for name, line in decoded.items():
        floats[name] = torch.empty_like(state[name], dtype=torch.float32)
        line_of(floats[name]).copy_(line)
    return floats


def coded_states(floats: Mapping[str, Tensor], step: int | None = None) -> dict[str, Tensor]:
    """Codes and scales of states, given as dense tensors laid out alike; rounded as in a step, or to the nearest."""
    lines = {name: line_of(floats[name]).float() for name in AVERAGES if name in floats}
    codes, scales = block_codes.encode_states(lines, step)
    coded = {SCALES: scales}
    for name, line in codes.items():
        coded[name] = torch.empty_like(floats[name], dtype=line.dtype)
        line_of(coded[name]).copy_(line)
    return coded


def store_codes(state: dict[str, Any], floats: Mapping[str, Tensor], step: int) -> None:
    """Writes states back into the codes that they came from."""
    for name, tensor in coded_states(floats, step).items():
        state[name].copy_(tensor)

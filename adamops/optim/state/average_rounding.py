"""Rounds states to bfloat16 after a step, in pure PyTorch, for use where no op is compiled.

csrc/formats/average_rounding.h has the definition and its reasons; results here are bit-identical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import State
from .quantization import format_of


def store_rounded(target: Tensor, state: State, value: Tensor, step: int) -> None:
    """Writes a float32 value to a state, rounded as in this step; `step` counts from 1."""
    if target.dtype != torch.bfloat16 or state.rounding == "nearest":
        target.copy_(value)
        return
    bits = value.view(torch.int32)
    rounded = bits + (step * format_of(state).step_stride & 0xFFFF)
    if not state.signed:
        rounded = torch.where((bits > 0) & (bits < 0x10000), 0x10000, rounded)
    kept = torch.where(value.isfinite(), rounded, bits) & -0x10000  # a bfloat16 value as a float32
    target.copy_(torch.where(value.isnan(), value, kept.view(torch.float32)))

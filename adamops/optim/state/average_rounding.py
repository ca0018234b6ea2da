"""Rounds averages to bfloat16 after a step, in pure PyTorch, for use where no op is compiled.

csrc/formats/average_rounding.h has the definition and its reasons; results here are bit-identical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import FORMATS

NEAREST = ("max_exp_avg_sq",)


def store_average(state: Tensor, name: str, value: Tensor, step: int) -> None:
    """Writes a float32 average to the state of that name, rounded as in this step; `step` counts from 1."""
    if state.dtype != torch.bfloat16 or name in NEAREST:
        state.copy_(value)
        return
    bits = value.view(torch.int32)
    rounded = bits + (step * FORMATS[name].step_stride & 0xFFFF)
    if name == "exp_avg_sq":
        rounded = torch.where((bits > 0) & (bits < 0x10000), 0x10000, rounded)
    kept = torch.where(value.isfinite(), rounded, bits) & -0x10000  # a bfloat16 value as a float32
    state.copy_(torch.where(value.isnan(), value, kept.view(torch.float32)))

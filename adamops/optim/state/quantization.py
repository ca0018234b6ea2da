"""Quantizes states to 8 bits, and dequantizes them, in pure PyTorch: for loading, saving and where no op is compiled.

csrc/formats/quantized_blocks.h has the definition and its reasons; results here are bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rule import State

QUANTIZATION_BLOCK = 256  # elements that share a scale
# Marks an element, in the first state, if one of its states is not finite. The first scale of its quantization block is
# then negative. In an unsigned state the mark is also a quantized value, so elements of such a block are at most 254.
NOT_FINITE_SIGNED, NOT_FINITE_UNSIGNED = -128, 255
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_LEAST_SCALE, _MOST_SCALE = (127 - 90) << 7, 0x7F7F


class Format(NamedTuple):
    """The 8-bit format of a state: SignedFormat or UnsignedFormat in csrc/formats/quantized_blocks.h."""

    dtype: torch.dtype
    power: int  # how many places the bits are shifted by
    shrink: float
    top_expanded: float
    top: int
    element_stride: int  # of the noise
    step_stride: int


SIGNED = Format(torch.int8, 1, 2.0**-64, 8064.0, 127, 0x85EB, 0x9E37)
UNSIGNED = Format(torch.uint8, 2, 2.0**-96, 528482304.0, 255, 0xCA6B, 0xC13F)


def format_of(state: State) -> Format:
    """The 8-bit format of a state."""
    return SIGNED if state.signed else UNSIGNED


def block_count(numel: int) -> int:
    """The number of quantization blocks of a tensor."""
    return -(-numel // QUANTIZATION_BLOCK)


def noise_of(index: Tensor, step: int, fmt: Format) -> Tensor:
    """The noise for elements in a step, int64 in [0, 65536)."""
    return (index * fmt.element_stride + step * fmt.step_stride) & 0xFFFF


def quantize(values: Tensor, fmt: Format, noise: Tensor | int = 0x8000) -> tuple[Tensor, Tensor]:
    """Quantizes a 1-D tensor of finite float32 values; the last quantization block may be shorter.

    `noise` in [0, 65536) is added, in units of 1/65536, before rounding down; the default rounds to the nearest.
    Returns as many quantized values, and a bfloat16 scale for each quantization block.
    """
    blocks = _in_blocks(values)
    scale_bits = ((_largest(blocks).view(torch.int32) + (0x2000 + 0xFFFF)) >> 16).clamp(_LEAST_SCALE, _MOST_SCALE)
    scales = scale_bits.to(torch.int16).view(torch.bfloat16)
    inverse = _inverse(scales, fmt)
    inverse = torch.where(scale_bits == _MOST_SCALE, fmt.top_expanded * float.fromhex("0x1.fcp-129"), inverse)
    return _quantized(values, inverse, fmt, noise), scales


def requantize(values: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Like quantize() to the nearest, but values from dequantize() get back the quantized values that they came from.

    quantize() chooses a scale somewhat above the largest value, so a second pass would choose another scale. After a
    step, the largest element of a quantization block has one of the two highest quantized values. The scales that
    follow from these two are tried.
    """
    quantized, scales = quantize(values, fmt)
    quantized, largest = _in_blocks(quantized), _largest(_in_blocks(values))
    for top in (fmt.top, fmt.top - 1):
        tried = (largest / dequantize(largest.new_tensor([top]), largest.new_ones(1), fmt)).to(torch.bfloat16)
        again = _quantized(values, _inverse(tried, fmt), fmt)
        same = (_in_blocks(dequantize(again, tried, fmt)) == _in_blocks(values)).all(1) & (largest > 0)
        quantized, scales = torch.where(same[:, None], _in_blocks(again), quantized), torch.where(same, tried, scales)
    return quantized.flatten()[: values.numel()], scales


def _largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each quantization block."""
    magnitude = blocks.abs()
    return magnitude.amax(1) if len(blocks) else magnitude.sum(1)


def _inverse(scales: Tensor, fmt: Format) -> Tensor:
    """top_expanded / scales, rounded once; torch would compute number / tensor as a product with the reciprocal."""
    return torch.full_like(scales, fmt.top_expanded, dtype=torch.float32) / scales.float()


def _quantized(values: Tensor, inverse: Tensor, fmt: Format, noise: Tensor | int = 0x8000) -> Tensor:
    """Quantizes a 1-D tensor of finite float32 values, given each quantization block's inverse scale."""
    blocks = _in_blocks(values)
    magnitude = blocks.view(torch.int32) & _MAGNITUDE
    relative = (magnitude.view(torch.float32) * inverse[:, None]).view(torch.int32)
    root = torch.copysign((relative >> fmt.power).view(torch.float32) / fmt.shrink, blocks)
    if isinstance(noise, Tensor):
        noise = _in_blocks(noise.float())
    quantized = (root + (noise / 65536 + 128)).to(torch.int32) - 128  # rounds down, since the sum is positive
    if fmt is UNSIGNED:
        quantized = torch.maximum(quantized, magnitude.clamp(max=1))
    return quantized.to(fmt.dtype).flatten()[: values.numel()]


def dequantize(quantized: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Dequantizes a 1-D tensor to float32. Elements marked as not finite are not handled here."""
    unit = (scales.float().abs() * (1 / fmt.top_expanded))[:, None]
    number = _in_blocks(quantized.to(torch.float32))
    shrunk = (number.abs() * fmt.shrink).view(torch.int32)
    magnitude = (shrunk << fmt.power).view(torch.float32) * unit
    return torch.copysign(magnitude, number).flatten()[: quantized.numel()]


def quantize_states(
    values: dict[str, Tensor], states: Sequence[State], step: int | None = None, first: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Quantizes the float32 values of a param's states, 1-D tensors of equal length, by name.

    Scales have shape (quantization blocks, states). The tensors may be a piece of the param's states, which begins with
    the quantization block of the element `first`.

    With `step`, states are rounded as in that step. Without it, they are rounded to the nearest, and what
    dequantize_states() gave gets back the quantized values that it came from. An element with an infinite or NaN state
    is marked in the first state.
    """
    finite = torch.stack([line.isfinite() for line in values.values()]).all(0)
    all_finite = bool(finite.all())
    index = torch.arange(first, first + finite.numel(), device=finite.device)
    quantized, scales = {}, []
    for state in states:
        fmt, line = format_of(state), values[state.name]
        line = line if all_finite else torch.where(finite, line, 0.0)
        if step is None:
            quantized[state.name], scale = requantize(line, fmt)
        else:
            quantized[state.name], scale = quantize(line, fmt, noise_of(index, step, fmt))
        scales.append(scale)
    if not all_finite:
        name, is_marked = states[0].name, ~_in_blocks(finite.to(torch.float32) - 1.0).eq(0).all(1)
        quantized[name] = _marked(quantized[name], finite, is_marked, states[0].signed)
        scales[0] = torch.where(is_marked, -scales[0], scales[0])
    return quantized, torch.stack(scales, 1)


def _marked(quantized: Tensor, finite: Tensor, is_marked: Tensor, signed: bool) -> Tensor:
    """The first state with marks where elements are not finite. `is_marked` says which quantization blocks have one."""
    if signed:
        return torch.where(finite, quantized, NOT_FINITE_SIGNED)
    in_marked = is_marked.repeat_interleave(QUANTIZATION_BLOCK)[: quantized.numel()]
    below = torch.where(in_marked, quantized.clamp(max=NOT_FINITE_UNSIGNED - 1), quantized)
    return torch.where(finite, below, NOT_FINITE_UNSIGNED)


def dequantize_states(quantized: dict[str, Tensor], scales: Tensor, states: Sequence[State]) -> dict[str, Tensor]:
    """Dequantizes a param's states, 1-D tensors of equal length, to float32. Marked elements get NaN in the first."""
    values = {
        state.name: dequantize(quantized[state.name], scales[:, i], format_of(state)) for i, state in enumerate(states)
    }
    first = states[0]
    if first.signed:
        values[first.name][quantized[first.name] == NOT_FINITE_SIGNED] = torch.nan
    else:
        is_marked = scales[:, 0].signbit().repeat_interleave(QUANTIZATION_BLOCK)[: quantized[first.name].numel()]
        values[first.name][is_marked & (quantized[first.name] == NOT_FINITE_UNSIGNED)] = torch.nan
    return values


def _in_blocks(line: Tensor) -> Tensor:
    """A 1-D tensor as rows of QUANTIZATION_BLOCK elements, padded with zeros."""
    return torch.nn.functional.pad(line, (0, -line.numel() % QUANTIZATION_BLOCK)).view(-1, QUANTIZATION_BLOCK)

"""Pinned memory for many tensors, in few pieces. Must not know what the tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .device import Device

_ALIGNMENT = 64  # bytes: a cache line, so that no two tensors share one
_MOST = 2**30  # bytes of a piece, unless a single tensor has more


def pinned_like(tensors: Sequence[Tensor], device: Device) -> list[Tensor]:
    """New pinned memory of any content for dense tensors, with their shapes, strides and dtypes."""
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    places: list[Tensor] = []
    for part in _parts(sizes):
        places += device.pinned(sum(part)).split(part)
    return [_laid_out_like(tensor, memory) for tensor, memory in zip(tensors, places, strict=True)]


def _parts(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The sizes, in order, in parts whose sums are just below powers of two: torch rounds pinned memory up to these."""
    left, part = sum(sizes), 0
    begin = 0
    for end, size in enumerate(sizes):
        most = min(1 << max(left.bit_length() - 1, 0), _MOST)
        if end > begin and part + size > most:
            yield list(sizes[begin:end])
            left, part, begin = left - part, 0, end
        part += size
    if part or begin < len(sizes):
        yield list(sizes[begin:])


def _laid_out_like(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor in this memory. It is no view, as views count the writes to all others as their own."""
    begin = memory.storage_offset() // tensor.element_size()
    new = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return new.set_(memory.untyped_storage(), begin, tensor.shape, tensor.stride())

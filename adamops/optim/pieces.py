"""Iterates over large tensors a piece at a time, so that temporaries take little memory.

Must not know what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .layout import is_dense

PIECE = 2**19  # elements; a multiple of the quantization block size


def line_of(dense: Tensor) -> Tensor:
    """The elements of a dense tensor as a 1-D view in memory order. Raises ValueError if it is not dense."""
    if not is_dense(dense):
        raise ValueError(f"A tensor of shape {tuple(dense.shape)} has strides {dense.stride()}: it is not dense")
    return dense.as_strided((dense.numel(),), (1,))


def each_piece(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of dense tensors with the same layout, in memory order."""
    return zip(*(line_of(tensor).split(PIECE) for tensor in tensors), strict=True)

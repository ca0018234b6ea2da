"""Goes through large tensors a piece at a time, so that what is computed on the way takes little memory.

Must not know what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PIECE = 2**19  # elements: a multiple of the size of quantization blocks


def line_of(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))


def each_piece(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of dense tensors that are laid out alike, in the order of memory."""
    return zip(*(line_of(tensor).split(PIECE) for tensor in tensors), strict=True)

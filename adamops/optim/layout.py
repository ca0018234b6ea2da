"""In which order a tensor's elements lie in memory, and whether they fill it. Must not know of optimizers."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 2**15  # elements; torch adds so many on one thread


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors of one shape hold their elements in the same order in memory."""
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    pairs = zip(tensor.stride(), other.stride(), other.shape, strict=True)
    return all(size == 1 or ours == theirs for ours, theirs, size in pairs)


def like_param(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor itself if it has the memory layout of the param, a dense tensor; else a copy that has."""
    if same_layout(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def add_in_pieces(total: Tensor, grad: Tensor, is_first: bool) -> None:
    """Adds a dense grad to a sum with the same memory layout, or begins a sum with it.

    torch widens 16-bit summands in memory of its own, so this does it by pieces that stay in the cache.
    """
    flat, new = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in (total, grad))
    for begin in range(0, len(flat), _PIECE):
        piece, added = flat[begin : begin + _PIECE], new[begin : begin + _PIECE]
        piece.copy_(added) if is_first else piece.add_(added)

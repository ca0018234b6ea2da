"""Splits master weights into 16-bit params and remainders, in pure PyTorch.

For loading, saving and where no op is compiled. csrc/formats/split_masters.h has the definition; results are
bit-identical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense, like_param
from ..pieces import each_piece

_BITS = {torch.int8: 8, torch.int16: 16}


def split(master: Tensor, param_dtype: torch.dtype, remainder_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits a dense float32 master into the 16-bit param nearest to it and the remainder."""
    param, remainder = (torch.empty_like(master, dtype=dtype) for dtype in (param_dtype, remainder_dtype))
    split_into(param, remainder, master)
    return param, remainder


def split_into(param: Tensor, remainder: Tensor, master: Tensor) -> None:
    """Splits a master into `param` and `remainder`, dense tensors of one layout; `master` may be on another device."""
    for upper, lower, piece in each_piece(param, remainder, master):
        new_param, new_remainder = _split(piece.to(param.device, torch.float32), param.dtype, remainder.dtype)
        upper.copy_(new_param)
        lower.copy_(new_remainder)


def beside_nearest(master: Tensor, param_dtype: torch.dtype, remainder_dtype: torch.dtype) -> Tensor:
    """The remainder of a dense float32 master whose param is its rounded copy, as with float32 master weights.

    If the master lies halfway between two params and its param is the lower one, the remainder is one unit too small.
    """
    remainder = torch.empty_like(master, dtype=remainder_dtype)
    for target, piece in each_piece(remainder, master):
        target.copy_(_remainder(piece, piece.to(param_dtype), _BITS[remainder_dtype]))
    return remainder


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master from a 16-bit param and its remainder, whatever their memory layouts."""
    param = dense(param)
    master = torch.empty_like(param, dtype=torch.float32)
    for target, upper, lower in each_piece(master, param, like_param(remainder, param)):
        target.copy_(_join(upper, lower))
    return master


def converted(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """The remainder with another number of bits."""
    if remainder.dtype == dtype:
        return remainder
    remainder = dense(remainder)
    other = torch.empty_like(remainder, dtype=dtype)
    for target, piece in each_piece(other, remainder):
        wide = piece.to(torch.int32)
        target.copy_(wide << 8 if dtype == torch.int16 else ((wide + 128) >> 8).clamp(max=127))
    return other


def _split(master: Tensor, param_dtype: torch.dtype, remainder_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bits = _BITS[remainder_dtype]
    if param_dtype == torch.bfloat16:
        as_int = _upper_bits(master, bits)
        upper = (as_int + (1 << (bits - 1))) >> bits
        remainder = as_int - (upper << bits)
        return _int16(upper).view(torch.bfloat16), remainder.to(remainder_dtype)
    param = master.to(torch.float16)
    overflows = _units(master, param, bits) >= float(1 << (bits - 1))
    as_int = param.view(torch.int16)
    param = (
        torch.where(overflows, torch.where(as_int < 0, as_int - 1, as_int + 1), as_int)
        .to(torch.int16)
        .view(torch.float16)
    )
    return param, _remainder(master, param, bits).to(remainder_dtype)


def _remainder(master: Tensor, param: Tensor, bits: int) -> Tensor:
    """The remainder of a master, as integers, given a param that is one of its two neighbours."""
    most = 1 << (bits - 1)
    if param.dtype == torch.bfloat16:
        remainder = _upper_bits(master, bits) - (param.view(torch.int16).long() << bits)
        return torch.where(param.isnan(), 0, remainder).clamp(-most, most - 1)
    whole = (_units(master, param, bits) + most).nan_to_num(0.0, neginf=0.0).clamp(0.0, 2.0 * most - 1)
    return whole.to(torch.int32) - most


def _upper_bits(master: Tensor, bits: int) -> Tensor:
    """The upper 16 + `bits` bits of the float32 master, rounded, as an integer with its sign."""
    as_int = master.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf).view(torch.int32).long()
    return torch.where(master.isnan(), 0x7FC00000, as_int + (0x80 if bits == 8 else 0)) >> (16 - bits)


def _join(param: Tensor, remainder: Tensor) -> Tensor:
    bits = _BITS[remainder.dtype]
    if param.dtype == torch.bfloat16:
        joined = (param.view(torch.int16).long() << 16) + (remainder.long() << (16 - bits))
        return _int32(joined).view(torch.float32)
    return param.float() + remainder.float() * _unit(param, bits)


def _units(master: Tensor, param: Tensor, bits: int) -> Tensor:
    return (master - param.float()) * (1.0 / _unit(param, bits)) + 0.5


def _unit(param: Tensor, bits: int) -> Tensor:
    """The value of one unit of the remainder of a float16 param."""
    exponent = (param.float().view(torch.int32) & 0x7F800000).clamp(min=(127 - 14) << 23)
    return (exponent - ((10 + bits) << 23)).view(torch.float32)


def _int16(wide: Tensor) -> Tensor:
    return (((wide + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16)


def _int32(wide: Tensor) -> Tensor:
    return (((wide + 0x80000000) & 0xFFFFFFFF) - 0x80000000).to(torch.int32)

"""What a 16-bit param lacks of its master, in pure PyTorch, for loading, saving and where no op is compiled.

The definition is csrc/adam/rounding.h; the same bits come out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import each_piece

_BITS = {torch.int8: 8, torch.int16: 16}


def split(master: Tensor, param_dtype: torch.dtype, rest_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The 16-bit param and the rest of a dense float32 master: the param is the nearest to it."""
    param, rest = (torch.empty_like(master, dtype=dtype) for dtype in (param_dtype, rest_dtype))
    split_into(param, rest, master)
    return param, rest


def split_into(param: Tensor, rest: Tensor, master: Tensor) -> None:
    """Writes the 16-bit param and the rest of a master, all dense and laid out alike; it may be on another device."""
    for upper, lower, piece in each_piece(param, rest, master):
        new_param, new_rest = _split(piece.to(param.device, torch.float32), param.dtype, rest.dtype)
        upper.copy_(new_param)
        lower.copy_(new_rest)


def beside_nearest(master: Tensor, param_dtype: torch.dtype, rest_dtype: torch.dtype) -> Tensor:
    """The rest of a dense float32 master whose param is its rounded copy, as beside masters of float32.

    Where the master lies halfway between two params, the rest is one less than what it would take, if that is the
    lower one.
    """
    rest = torch.empty_like(master, dtype=rest_dtype)
    for target, piece in each_piece(rest, master):
        target.copy_(_rest(piece, piece.to(param_dtype), _BITS[rest_dtype]))
    return rest


def join(param: Tensor, rest: Tensor) -> Tensor:
    """The float32 master of a 16-bit param and its rest, dense and laid out alike."""
    master = torch.empty_like(param, dtype=torch.float32)
    for target, upper, lower in each_piece(master, param, rest):
        target.copy_(_join(upper, lower))
    return master


def converted(rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The rest, a dense tensor, with another number of bits."""
    if rest.dtype == dtype:
        return rest
    other = torch.empty_like(rest, dtype=dtype)
    for target, piece in each_piece(other, rest):
        wide = piece.to(torch.int32)
        target.copy_(wide << 8 if dtype == torch.int16 else ((wide + 128) >> 8).clamp(max=127))
    return other


def _split(master: Tensor, param_dtype: torch.dtype, rest_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bits = _BITS[rest_dtype]
    if param_dtype == torch.bfloat16:
        as_int = _upper_bits(master, bits)
        upper = (as_int + (1 << (bits - 1))) >> bits
        rest = as_int - (upper << bits)
        return _int16(upper).view(torch.bfloat16), rest.to(rest_dtype)
    param = master.to(torch.float16)
    overflows = _units(master, param, bits) >= float(1 << (bits - 1))
    as_int = param.view(torch.int16)
    param = (
        torch.where(overflows, torch.where(as_int < 0, as_int - 1, as_int + 1), as_int)
        .to(torch.int16)
        .view(torch.float16)
    )
    return param, _rest(master, param, bits).to(rest_dtype)


def _rest(master: Tensor, param: Tensor, bits: int) -> Tensor:
    """The rest of a master beside a param that is one of its neighbours, as integers."""
    most = 1 << (bits - 1)
    if param.dtype == torch.bfloat16:
        rest = _upper_bits(master, bits) - (param.view(torch.int16).long() << bits)
        return torch.where(param.isnan(), 0, rest).clamp(-most, most - 1)
    whole = (_units(master, param, bits) + most).nan_to_num(0.0, neginf=0.0).clamp(0.0, 2.0 * most - 1)
    return whole.to(torch.int32) - most


def _upper_bits(master: Tensor, bits: int) -> Tensor:
    """The bits of a bfloat16 param and as many more, rounded, as an integer with the sign of the float32 master."""
    as_int = master.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf).view(torch.int32).long()
    return torch.where(master.isnan(), 0x7FC00000, as_int + (0x80 if bits == 8 else 0)) >> (16 - bits)


def _join(param: Tensor, rest: Tensor) -> Tensor:
    bits = _BITS[rest.dtype]
    if param.dtype == torch.bfloat16:
        joined = (param.view(torch.int16).long() << 16) + (rest.long() << (16 - bits))
        return _int32(joined).view(torch.float32)
    return param.float() + rest.float() * _unit(param, bits)


def _units(master: Tensor, param: Tensor, bits: int) -> Tensor:
    return (master - param.float()) * (1.0 / _unit(param, bits)) + 0.5


def _unit(param: Tensor, bits: int) -> Tensor:
    """What one of the rest stands for beside a float16 param."""
    exponent = (param.float().view(torch.int32) & 0x7F800000).clamp(min=(127 - 14) << 23)
    return (exponent - ((10 + bits) << 23)).view(torch.float32)


def _int16(wide: Tensor) -> Tensor:
    return (((wide + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16)


def _int32(wide: Tensor) -> Tensor:
    return (((wide + 0x80000000) & 0xFFFFFFFF) - 0x80000000).to(torch.int32)

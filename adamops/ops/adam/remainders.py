"""What a 16-bit param lacks of its master, in torch calls, for loading, saving and where no op is compiled.

The definition is csrc/adam/rounding.h; the same bits come out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.int8: 8, torch.int16: 16}


def split(master: Tensor, param_dtype: torch.dtype, rest_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The 16-bit param and the rest of a float32 master: the param is the nearest to it."""
    bits = _BITS[rest_dtype]
    if param_dtype == torch.bfloat16:
        as_int = master.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf).view(torch.int32).long()
        as_int = torch.where(master.isnan(), 0x7FC00000, as_int + (0x80 if bits == 8 else 0)) >> (16 - bits)
        upper = (as_int + (1 << (bits - 1))) >> bits
        rest = as_int - (upper << bits)
        return _int16(upper).view(torch.bfloat16), rest.to(rest_dtype)
    most = float(1 << (bits - 1))
    param = master.to(torch.float16)
    overflows = _units(master, param, bits) >= most
    as_int = param.view(torch.int16)
    param = (
        torch.where(overflows, torch.where(as_int < 0, as_int - 1, as_int + 1), as_int)
        .to(torch.int16)
        .view(torch.float16)
    )
    whole = (_units(master, param, bits) + most).nan_to_num(0.0, neginf=0.0).clamp(0.0, 2 * most - 1).to(torch.int32)
    return param, (whole - int(most)).to(rest_dtype)


def join(param: Tensor, rest: Tensor) -> Tensor:
    """The float32 master of a 16-bit param and its rest."""
    bits = _BITS[rest.dtype]
    if param.dtype == torch.bfloat16:
        joined = (param.view(torch.int16).long() << 16) + (rest.long() << (16 - bits))
        return _int32(joined).view(torch.float32)
    return param.float() + rest.float() * _unit(param, bits)


def converted(rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The rest with another number of bits."""
    if rest.dtype == dtype:
        return rest
    if dtype == torch.int16:
        return rest.to(torch.int16) << 8
    return ((rest.to(torch.int32) + 128) >> 8).clamp(max=127).to(torch.int8)


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

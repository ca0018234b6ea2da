"""Params as float32 tensors, read and written, through their master weights where they have any.

Must not know of optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import without_torch_function
from . import dtensor
from .batch import check_state
from .interrupts import deferred_signals
from .layout import is_dense, like_param
from .memory import check_memory, check_readable, check_viewable, check_writable
from .state import remainders
from .state.precision import MASTER, REMAINDER, Master, Precision


def checked_master(param: Tensor, state: Mapping[str, Any], precision: Precision, name: str) -> Tensor | None:
    """The local part of a param's master weights or remainder; None if it has neither."""
    held = dtensor.local(param).detach()
    check_viewable(held, name)
    kind = precision.master_of(param)
    for key in (MASTER, REMAINDER) if kind is Master.FP32 else (REMAINDER,) if kind else ():
        if key in state:
            if key == REMAINDER:  # it belongs to the param's bits as they are in memory
                check_memory(held, name)
            master = dtensor.local(state[key])
            check_state({key: master}, held, (), name, elsewhere=True)
            return master
    return None


def fp32_param(param: Tensor, state: Mapping[str, Any], precision: Precision) -> Tensor:
    """A param as a new float32 tensor, from its master weights if it has any; as it is if it is not floating-point."""
    master, held = checked_master(param, state, precision, "a param"), dtensor.local(param).detach()
    if master is not None:
        values = master.clone() if master.dtype == torch.float32 else remainders.join(held, master)
    elif held.is_floating_point() and held.layout == torch.strided:
        values = held.to(torch.float32, copy=True)
    else:
        values = held.clone()
    return dtensor.like_param_placed(values, param)


def load_fp32_params(own: Sequence[tuple[Tensor, Precision]], given: Sequence[Tensor], states: Any) -> None:
    """Sets params, and their master weights in `states`, from float32 tensors: all, or none if one does not fit."""
    if len(own) != len(given):
        raise ValueError(f"There are {len(own)} params in this optimizer, and {len(given)} were given")
    pairs = zip((param for param, _ in own), given, strict=True)
    values = [_value_for(param, value, f"param {i}") for i, (param, value) in enumerate(pairs)]
    masters = [_new_master(dtensor.local(param), precision.master_of(param)) for param, precision in own]
    with deferred_signals(), without_torch_function():
        # Again after _value_for(), now that no Python code of subclasses runs that could free another's memory.
        for i, ((param, _), value) in enumerate(zip(own, values, strict=True)):
            check_readable(dtensor.local(param), f"param {i}")
            check_readable(value, f"param {i}: what was given")
        _write_params(states, [param for param, _ in own], values, masters)


def _write_params(
    states: Any, params: Sequence[Tensor], values: Sequence[Tensor], masters: Sequence[Tensor | None]
) -> None:
    """Writes values to the params and to their new master weights or remainders, which become part of the state."""
    for param, value, master in zip(params, values, masters, strict=True):
        held = dtensor.local(param)
        if master is None:
            held.copy_(value)
            continue
        if master.dtype == torch.float32:
            held.copy_(master.copy_(value))
        else:
            remainders.split_into(held, master, like_param(value, held))
        state = {**(states.get(param) or {})}
        for name in (MASTER, REMAINDER):
            state.pop(name, None)
        state[MASTER if master.dtype == torch.float32 else REMAINDER] = dtensor.like_param_placed(master, param)
        states[param] = state


def _value_for(param: Tensor, value: Tensor, name: str) -> Tensor:
    """The local part of the value for a param. Raises ValueError or TypeError if it does not fit."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a {type(value).__name__} was given; expected a tensor")
    if param.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(param.shape)}, and {tuple(value.shape)} was given")
    value = dtensor.local_like(value, param, f"{name}: what was given")
    held = dtensor.local(param)
    check_writable(held, name)
    check_readable(value, f"{name}: what was given")
    if not held.is_floating_point() or held.layout != torch.strided:
        if (value.dtype, value.layout) != (held.dtype, held.layout):
            raise TypeError(f"{name} is of {held.dtype} and {held.layout}, and {value.dtype}, {value.layout} was given")
    elif value.is_complex() or value.layout != torch.strided:
        raise TypeError(f"{name} is of {held.dtype}, and {value.dtype}, {value.layout} was given")
    if value.is_quantized != held.is_quantized:
        raise TypeError(f"{name} is of {held.dtype}, and a quantized tensor was given or is there")
    if value.device.type == "meta" and held.device.type != "meta":
        raise ValueError(f"{name}: what was given is on the device meta, and has no values")
    if held.layout == torch.strided and any(n > 1 and not s for n, s in zip(held.shape, held.stride(), strict=True)):
        if not torch.equal(held, value.to(held)):
            raise ValueError(f"{name} is expanded, and cannot be written")
        return held  # copying it to itself does nothing
    return value


def _new_master(param: Tensor, kind: Master) -> Tensor | None:
    """Memory for a param's master weights or remainder; None if it has neither, or has gaps, as frozen params may."""
    return torch.empty_like(param, dtype=kind.dtype, requires_grad=False) if kind and is_dense(param) else None

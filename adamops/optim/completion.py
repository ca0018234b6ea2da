"""Completes the states of a batch: what a param's first step, or a step with other settings, finds missing.

Must not know of optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import dtensor
from .backends.base import Backend
from .batch import Batch, check_nothing_lost, check_state
from .rule import State
from .state import remainders
from .state.memory_layout import in_layout_of, is_in_layout_of, moved_with
from .state.precision import MASTER, REMAINDER, SCALES, Master, Precision, scales_shape, tensors_of
from .state.quantization import format_of
from .state.quantized_states import is_quantized, with_held_names


def is_complete(state: dict[str, Any], param: Tensor, batch: Batch) -> bool:
    """Whether a state has everything that a step needs, in the memory layout of the param."""
    settings, needed = batch.settings, {"step", *batch.state_dtypes(param)} - {SCALES}
    if not state.keys() >= needed or _has_stale_masters(state, param, settings.precision):
        return False
    if not is_in_layout_of(param, state, settings.rule.states, needed):
        return False
    scales = state.get(SCALES)
    if not is_quantized(state, settings.rule.states) or not isinstance(scales, Tensor) or scales.dim() != 2:
        return True
    return scales.shape[1] >= len(settings.states)


def complete_states(backend: Backend, batch: Batch) -> None:
    """Adds what the batch's states lack: a step count of 0, zeros, and master weights that start as the params.

    Where the memory layout of a param has changed, its state follows.
    """
    settings, states = batch.settings, batch.settings.rule.states
    held = [with_held_names(state, states, name) for name, state in zip(batch.names, batch.states, strict=True)]
    dtypes_of = list(map(batch.state_dtypes, batch.params))
    for i, (name, param, state, needed) in enumerate(zip(batch.names, batch.params, held, dtypes_of, strict=True)):
        check_nothing_lost(state, states, name)
        check_state(batch.needed_of(state, param), param, states, name)  # before torch reads them
        if not is_in_layout_of(param, state, states, needed):
            local = {key: dtensor.local(state[key]) for key in moved_with(state, states, needed) if key in state}
            check_state(local, param, states, name)
            new = functools.partial(_new_like, backend, param)
            held[i] = {**state, **in_layout_of(param, local, states, needed, new)}
    completed = [
        {**state} if "step" in state else {"step": backend.new_step_count(settings), **state} for state in held
    ]
    optional = {state.name: state for state in states[1:] if state.optional}
    for key in tensors_of(states):
        lacking = [i for i, names in enumerate(dtypes_of) if key in names and key not in completed[i]]
        if key == SCALES or not lacking:
            continue
        like = [batch.params[i] for i in lacking]
        dtypes = [dtypes_of[i][key] for i in lacking]
        if key in optional:  # the other states may have another dtype than new ones would
            dtypes = [_dtype_beside(completed[i], states, optional[key]) for i in lacking]
        for i, zeros in zip(lacking, backend.zeros_like(like, dtypes), strict=True):
            is_master = key == MASTER
            completed[i][key] = _initialized_master(zeros, batch.params[i], completed[i]) if is_master else zeros
    for param, state in zip(batch.params, completed, strict=True):
        if _has_stale_masters(state, param, settings.precision):
            state.pop(MASTER, None)
            state.pop(REMAINDER, None)
        if is_quantized(state, states):
            _complete_scales(state, param, settings.states)
    batch.states = completed


def _new_like(backend: Backend, param: Tensor, dtype: torch.dtype) -> Tensor:
    (new,) = backend.zeros_like([param], [dtype])  # refuses while a CUDA graph is captured
    return new


def _dtype_beside(state: Mapping[str, Any], states: tuple[State, ...], new: State) -> torch.dtype:
    """The dtype of a new tensor beside the first state of a param, which is there."""
    first: Tensor = state[states[0].name]
    return format_of(new).dtype if is_quantized(state, states) else first.dtype


def _initialized_master(master: Tensor, param: Tensor, state: dict[str, Any]) -> Tensor:
    """Initializes float32 master weights from the param, and from its loaded remainder if there is one."""
    remainder = state.pop(REMAINDER, None)
    return master.copy_(param if remainder is None else remainders.join(param, remainder))


def _complete_scales(state: dict[str, Any], param: Tensor, in_use: tuple[State, ...]) -> None:
    """Adds the scales that a quantized state lacks. Its elements are zeros there, which any scale fits."""
    shape = scales_shape(param, in_use)
    scales = state.get(SCALES)
    if scales is None or scales.shape != shape:
        state[SCALES] = torch.zeros(shape, dtype=torch.bfloat16, device=param.device)
        # Scales of another shape belong to no states, or check_state() would have refused them.
        if scales is not None and scales.dim() == 2 and len(scales) == shape[0]:
            columns = min(scales.shape[1], shape[1])
            state[SCALES][:, :columns] = scales[:, :columns]


def _has_stale_masters(state: Mapping[str, Any], param: Tensor, precision: Precision) -> bool:
    """Whether the param, now float32, had master weights when it was of 16 bits: a step makes them stale."""
    is_used = precision.master is Master.NONE or param.dtype != torch.float32
    return not is_used and (MASTER in state or REMAINDER in state)

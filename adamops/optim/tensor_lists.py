"""A step on lists of tensors, without an optimizer: checked like a step of one, all or nothing. Must not know any one
rule.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor
from .backends.base import Backend
from .backends.loading import load_backend
from .backends.table import TableBackend
from .batch import Batch, check_counts_on, check_lowp_out, check_no_overlap, check_step
from .commit import commit
from .fp32_params import fp32_param
from .memory import PLAIN_TYPES, check_torch_computes, check_writable
from .rule import Rule
from .state.precision import SCALES, Precision
from .step import GroupStep
from .step_settings import StepSettings


class TensorLists(NamedTuple):
    """What belongs to params, in lists as long as theirs. Entries may be None where a param does not have it; a param
    without a grad is left alone.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[list[Tensor]]  # of each state in use
    step: int | list[Any]  # the counts before this step: one number, or numbers and tensors of one element
    scales: list[Tensor | None] | None = None
    masters: list[Tensor | None] | None = None  # or remainders
    lowp_outs: list[Tensor | None] | None = None


def step_on_lists(settings: StepSettings, lists: TensorLists) -> None:
    """Updates the params of lists. Step counts in tensors, in `step`, go up by 1.

    Raises
    ------
    TypeError, ValueError
        As a step of an optimizer, before anything is written. Messages name params by their positions.
    """
    if not lists.params:
        return
    check_tensor(lists.params[0], "param 0")
    backend = _backend(settings.rule, lists.params[0].device)
    if isinstance(lists.step, int) and (step := _fast_step(backend, settings, lists)):
        commit({}, [step])
        return
    with torch.no_grad():
        on_host: list[Tensor] = []
        if not isinstance(lists.step, int):
            counts, on_host = _read_counts(lists, settings)
            lists = lists._replace(step=counts)
        step = _fast_step(backend, settings, lists) or _checked_step(settings, lists)
        if on_host and not settings.overflowed:
            step.after += [functools.partial(count.add_, 1) for count in on_host]
        commit({}, [step])


def check_tensor(value: Any, name: str) -> None:
    """Raises TypeError for what is no tensor, and for a DTensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
    if dtensor.is_sharded(value):
        raise TypeError(f"{name} is a DTensor; pass what this process holds, its to_local()")


def _read_counts(lists: TensorLists, settings: StepSettings) -> tuple[list[Any], list[Tensor]]:
    """The counts, in numbers where they are on the CPU, and the tensors of these. Raises for what is no step count."""
    counts: list[Any] = []
    on_host = []
    for i, (param, grad, count) in enumerate(zip(lists.params, lists.grads, lists.step, strict=True)):  # type: ignore[arg-type]
        name = f"param {i}"
        if grad is None:
            counts.append(0)
            continue
        check_tensor(param, name)
        check_tensor(count, f"the step count of {name}")
        check_step(count, name)
        if _is_on_host(count):
            check_counts_on(count, name)
            if isinstance(settings.found_inf, Tensor):
                raise ValueError(
                    f"{name} has a step count on the CPU, which cannot tell whether found_inf, on "
                    f"{settings.found_inf.device}, skips the step; keep the counts on that device"
                )
            counts.append(int(count))
            on_host.append(count)
        elif count.dtype != torch.float32 or count.device != param.device:
            raise TypeError(
                f"{name} has a step count of {count.dtype} on {count.device}; expected torch.float32 on the device of "
                f"the param, {param.device}, or any on the CPU"
            )
        else:
            counts.append(count)
    return counts, on_host


def _is_on_host(count: Tensor) -> bool:
    return count.device.type == "cpu"


@functools.cache
def _backend(rule: Rule, device: torch.device) -> Backend:
    return load_backend(rule, device)


def _fast_step(backend: Backend, settings: StepSettings, lists: TensorLists) -> GroupStep | None:
    if backend.skips(settings) or not isinstance(backend, TableBackend):
        return None
    update = backend.prepare_lists(settings, *lists)
    return GroupStep([(backend, update)]) if update else None


def _checked_step(settings: StepSettings, lists: TensorLists) -> GroupStep:
    """The step on lists of any tensors, or the error that names the offending one."""
    check_torch_computes()
    step = GroupStep([])
    written: dict[str, Tensor] = {}
    for backend, batch in _batches_of(settings, lists):
        grads, copies = list(batch.grads), []
        if batch.lowp_outs and not backend.writes_copies:
            copies = list(zip(batch.lowp_outs, batch.params, batch.states, strict=True))
            batch.lowp_outs = None
        update = backend.prepare(batch)
        step.ran_python |= any(type(tensor) not in PLAIN_TYPES for tensor in update.borrowed())
        step.updates.append((backend, update))
        if settings.zero_grads:  # of those that were copied to be read
            step.after += [grad.zero_ for grad, read in zip(grads, batch.grads, strict=True) if grad is not read]
        for out, param, state in copies:
            if out is not None:
                check_writable(out, "a lowp_out")
                step.after.append(functools.partial(_write_copy, out, param, state, settings.precision))
        written |= _written_by_name(batch, grads, [out for out, *_ in copies] or batch.lowp_outs)
    check_no_overlap(written)
    return step


def _batches_of(settings: StepSettings, lists: TensorLists) -> list[tuple[Backend, Batch]]:
    """The params that have a grad, in a batch for each backend that does not skip this step."""
    batches: dict[torch.device, tuple[Backend, Batch]] = {}
    outs = lists.lowp_outs or [None] * len(lists.params)
    for i, (param, grad, out) in enumerate(zip(lists.params, lists.grads, outs, strict=True)):
        if grad is None:
            continue
        name, state = f"param {i}", _state_of(settings, lists, i)
        named = {name: param, f"the grad of {name}": grad, **{f"{key!r} of {name}": state[key] for key in state}}
        named.pop(f"'step' of {name}")
        for what, tensor in named.items():
            check_tensor(tensor, what)
        _check_has_master(settings, param, state, name)
        if out is not None:
            check_lowp_out(out, param, name)
        if param.device not in batches:
            batches[param.device] = _backend(settings.rule, param.device), Batch([], settings, [], [], [], lowp_outs=[])
        batch = batches[param.device][1]
        batch.append(i, name, param, grad, state, param)
        batch.lowp_outs.append(out)  # type: ignore[union-attr]
    return [(backend, batch) for backend, batch in batches.values() if not backend.skips(settings)]


def _state_of(settings: StepSettings, lists: TensorLists, i: int) -> dict[str, Any]:
    """What belongs to a param, by the names that it has in the state of an optimizer."""
    state: dict[str, Any] = {kind.name: own[i] for kind, own in zip(settings.states, lists.states, strict=True)}
    state["step"] = lists.step if isinstance(lists.step, int) else lists.step[i]
    for name, values in ((SCALES, lists.scales), (settings.precision.master.key, lists.masters)):
        if values is not None and values[i] is not None:
            state[name] = values[i]
    return state


def _check_has_master(settings: StepSettings, param: Tensor, state: dict[str, Any], name: str) -> None:
    """Raises ValueError for a float32 param with master weights, or a 16-bit one without those of the others."""
    key, needed = settings.precision.master.key, bool(settings.precision.master_of(param))
    if settings.precision.master and (key in state) != needed:
        found, expected = ("has", "none, as it is as wide") if key in state else ("has no", "one, or no list of them")
        raise ValueError(f"{name}, of {param.dtype}, {found} {key!r}; expected {expected}")


def _written_by_name(batch: Batch, grads: Sequence[Tensor], outs: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
    """The tensors that a step of a batch writes, with names for messages."""
    named: dict[str, Tensor | None] = {}
    for i, (name, param, state) in enumerate(zip(batch.names, batch.params, batch.states, strict=True)):
        named[name] = param
        named |= {f"{key!r} of {name}": value for key, value in state.items() if key != "step"}
        named[f"the lowp_out of {name}"] = outs[i] if outs else None
        named[f"the grad of {name}"] = grads[i] if batch.settings.zero_grads else None
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _write_copy(out: Tensor, param: Tensor, state: dict[str, Any], precision: Precision) -> None:
    out.copy_(fp32_param(param, state, precision))

"""A step on lists of tensors, without an optimizer: checked like a step of one, all or nothing. Must not know any one
rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor
from .backends.base import Backend
from .backends.loading import load_backend
from .backends.table import TableBackend
from .batch import Batch, check_counts_on, check_grads_apart, check_lowp_out, check_no_overlap, check_step
from .commit import commit
from .fp32_params import checked_master
from .grads import zeroable
from .memory import PLAIN_TYPES, check_torch_computes, check_writable
from .rule import Rule
from .state.precision import SCALES, Precision
from .step import GroupStep, any_run_python, write_copy
from .step_settings import StepSettings


class TensorLists(NamedTuple):
    """What belongs to params, in lists as long as theirs. Entries may be None where a param does not have it; a param
    without a grad is left alone.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[list[Tensor]]  # of each state in use
    step: int | list[Any]  # the counts before this step: one number, or tensors of one element
    scales: list[Tensor | None] | None = None
    masters: list[Tensor | None] | None = None  # or remainders
    lowp_outs: list[Tensor | None] | None = None


class _Row(NamedTuple):
    """A param that has a grad, with what belongs to it."""

    position: int  # in the lists
    param: Tensor
    grad: Tensor
    state: dict[str, Any]  # by the names that it has in the state of an optimizer, with the step count
    lowp_out: Tensor | None

    @property
    def name(self) -> str:
        """For messages."""
        return f"param {self.position}"


def step_on_lists(settings: StepSettings, lists: TensorLists) -> None:
    """Updates the params of lists. Step counts in tensors, in `step`, go up by 1.

    Raises
    ------
    TypeError, ValueError
        As a step of an optimizer, before anything is written. Messages name params by their positions.
    """
    if isinstance(lists.step, int) and (step := _fast_step(settings, lists)):
        commit({}, [step])
        return
    with torch.no_grad():
        rows = _rows_of(settings, lists)
        counts: list[Tensor] = []  # on the host
        if not isinstance(lists.step, int):
            lists, counts = _with_read_counts(settings, lists, rows)
        step = _fast_step(settings, lists) or _checked_step(settings, rows)
        if counts and not settings.overflowed:
            step.ran_python |= any_run_python(counts)
            step.after += [functools.partial(Tensor.add_, count, 1) for count in counts]
        commit({}, [step])


def check_tensor(value: Any, name: str) -> None:
    """Raises TypeError for what is no tensor, and for a DTensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
    if dtensor.is_sharded(value):
        raise TypeError(f"{name} is a DTensor; pass what this process holds, its to_local()")


@functools.cache
def _backend(rule: Rule, device: torch.device) -> Backend:
    return load_backend(rule, device)


def _fast_step(settings: StepSettings, lists: TensorLists) -> GroupStep | None:
    """The step on lists of plain tensors; None if they are not, or are to be skipped."""
    first = next((param for param, grad in zip(lists.params, lists.grads, strict=True) if grad is not None), None)
    if type(first) not in PLAIN_TYPES:
        return None
    backend = _backend(settings.rule, first.device)  # type: ignore[union-attr]
    if not isinstance(backend, TableBackend) or backend.skips(settings):
        return None
    update = backend.prepare_lists(settings, *lists)
    return GroupStep([(backend, update)]) if update else None


def _rows_of(settings: StepSettings, lists: TensorLists) -> list[_Row]:
    """The params that have a grad. Raises TypeError or ValueError for what is no tensor, or does not belong to one."""
    rows = []
    outs = lists.lowp_outs or [None] * len(lists.params)
    for i, (param, grad, out) in enumerate(zip(lists.params, lists.grads, outs, strict=True)):
        if grad is None:
            continue
        row = _Row(i, param, grad, _state_of(settings, lists, i), out)
        name = row.name
        tensors = {name: param, f"the grad of {name}": grad, f"the lowp_out of {name}": out, **_tensors_of(row)}
        for what, tensor in tensors.items():
            if tensor is not None or what != f"the lowp_out of {name}":
                check_tensor(tensor, what)
        _check_has_master(settings, row)
        rows.append(row)
    return rows


def _state_of(settings: StepSettings, lists: TensorLists, i: int) -> dict[str, Any]:
    state: dict[str, Any] = {kind.name: own[i] for kind, own in zip(settings.states, lists.states, strict=True)}
    state["step"] = lists.step if isinstance(lists.step, int) else lists.step[i]
    for name, values in ((SCALES, lists.scales), (settings.precision.master.key, lists.masters)):
        if values is not None and values[i] is not None:
            state[name] = values[i]
    return state


def _tensors_of(row: _Row) -> dict[str, Tensor]:
    """The tensors of a row's state, by names for messages."""
    return {f"{key!r} of {row.name}": value for key, value in row.state.items() if key != "step"}


def _check_has_master(settings: StepSettings, row: _Row) -> None:
    """Raises ValueError for a float32 param with master weights, or a 16-bit one without those of the others."""
    key, needed = settings.precision.master.key, bool(settings.precision.master_of(row.param))
    if settings.precision.master and (key in row.state) != needed:
        found = ("has", "none, as it is as wide") if key in row.state else ("has no", "one, or no list of them")
        raise ValueError(f"{row.name}, of {row.param.dtype}, {found[0]} {key!r}; expected {found[1]}")


# Step counts ------------------------------------------------------------------------------------------------------


def _with_read_counts(settings: StepSettings, lists: TensorLists, rows: list[_Row]) -> tuple[TensorLists, list[Tensor]]:
    """The lists, and the rows, with numbers for those step counts that are on the host; and the tensors of these.

    Counts in float32 on the device of their params stay there: the op reads and writes them.
    """
    counts: list[Any] = [0] * len(lists.params)
    on_host = []
    written: dict[str, Tensor] = {}
    for row in rows:
        count = row.state["step"]
        name = f"the step count of {row.name}"
        check_tensor(count, name)
        check_step(count, row.name)
        if _is_on_host(count):
            _check_host_count(settings, count, row)
            on_host.append(count)
        elif count.dtype != torch.float32 or count.device != row.param.device:
            raise TypeError(
                f"{row.name} has a step count of {count.dtype} on {count.device}; expected torch.float32 on the device "
                f"of the param, {row.param.device}, or any on the CPU"
            )
        counts[row.position] = row.state["step"] = int(count) if _is_on_host(count) else count
        written |= {name: count, row.name: row.param, **_tensors_of(row)}
    check_no_overlap(written)
    return lists._replace(step=counts), on_host


def _is_on_host(count: Tensor) -> bool:
    return count.device.type == "cpu"


def _check_host_count(settings: StepSettings, count: Tensor, row: _Row) -> None:
    """Raises for a count on the CPU that cannot be read now, or written after the step."""
    check_counts_on(count, row.name)
    if isinstance(settings.found_inf, Tensor):
        raise ValueError(
            f"{row.name} has a step count on the CPU, which cannot tell whether found_inf, on "
            f"{settings.found_inf.device}, skips the step; keep the counts on that device"
        )
    try:
        count.add_(0)  # what fails must fail now
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TypeError(f"{row.name} has a step count that cannot be written: {error}") from error


# Any tensors ------------------------------------------------------------------------------------------------------


def _checked_step(settings: StepSettings, rows: list[_Row]) -> GroupStep:
    """The step on any tensors, or the error that names the offending one. Grads are set to zero afterwards."""
    check_torch_computes()
    step = GroupStep([])
    copied = dataclasses.replace(settings, zero_grads=False)
    left = {row.position: row for row in rows if row.lowp_out is not None}  # whose copies no op writes
    for row in left.values():
        check_lowp_out(row.lowp_out, row.param, row.name)  # type: ignore[arg-type]
    for backend, batch in _batches_of(copied, rows):
        if backend.skips(settings):
            continue
        written = left if backend.writes_copies else {}
        batch.lowp_outs = [written.pop(i).lowp_out if i in written else None for i in batch.indices]
        update = backend.prepare(batch)
        step.updates.append((backend, update))
        step.ran_python |= any_run_python(update.borrowed())
    step.ran_python |= any_run_python(tensor for row in rows for tensor in (row.grad, row.lowp_out))
    if settings.zero_grads:
        step.after += [grad.zero_ for grad in zeroable([row.grad for row in rows], "a grad")]
    step.after += [_writer_of_copy(row, settings.precision) for row in left.values()]
    _check_overlap(settings, rows)
    return step


def _batches_of(settings: StepSettings, rows: list[_Row]) -> list[tuple[Backend, Batch]]:
    """The rows in a batch for each device."""
    batches: dict[torch.device, tuple[Backend, Batch]] = {}
    for row in rows:
        device = row.param.device
        if device not in batches:
            batches[device] = _backend(settings.rule, device), Batch([], settings, [], [], [])
        batches[device][1].append(row.position, row.name, row.param, row.grad, dict(row.state), row.param)
    return list(batches.values())


def _writer_of_copy(row: _Row, precision: Precision) -> Callable[[], object]:
    """Writes the param to its lowp_out once it is updated. What could fail is checked now."""
    assert row.lowp_out is not None
    check_writable(row.lowp_out, f"the lowp_out of {row.name}")
    checked_master(row.param, row.state, precision, row.name)
    return functools.partial(write_copy, {row.param: row.state}, row.param, row.lowp_out, precision)


def _check_overlap(settings: StepSettings, rows: list[_Row]) -> None:
    """Raises ValueError if tensors that a step writes share memory with one another, or with a grad."""
    written: dict[str, Tensor] = {}
    for row in rows:
        written |= {row.name: row.param, **_tensors_of(row)}
        if row.lowp_out is not None:
            written[f"the lowp_out of {row.name}"] = row.lowp_out
    check_no_overlap(written)
    check_grads_apart([(r.name, r.grad, () if settings.zero_grads else (r.param, r.lowp_out)) for r in rows], written)

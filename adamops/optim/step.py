"""One step of an optimizer: what the ops will do for each param group, prepared and checked. commit.py then does it.

Nothing here writes a param, a grad or a state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import dtensor
from .backends.base import Backend, Update
from .batch import Batch, check_grads_apart, check_lowp_out, check_no_overlap, check_params_and_grads
from .completion import complete_states, is_complete
from .fp32_params import checked_master, fp32_param
from .grads import sharded_grads, with_grads, zeroable_grads
from .memory import PLAIN_TYPES, check_torch_computes, check_writable, is_in_memory
from .state.precision import Precision, tensors_of
from .step_settings import StepSettings


class Steppable(Protocol):
    """What a step needs of an optimizer."""

    state: Any
    _backends: dict[torch.device, Backend]
    _shared: dict[str, Any]  # what wrappers of the optimizer share with it

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """The backend that updates the param. Raises ValueError if there is none."""


class GroupToStep(NamedTuple):
    """A param group, its name for messages, and the settings of this step."""

    where: str
    group: dict[str, Any]
    settings: StepSettings


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class GroupStep:
    """A prepared step of a param group, or of part of one. Nothing has been written yet."""

    updates: list[tuple[Backend, Update]]
    new_states: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)  # with their keys in `state`
    after: list[Callable[[], object]] = dataclasses.field(default_factory=list)  # what torch does after the ops
    sharded: list[Tensor] = dataclasses.field(default_factory=list)  # DTensors that the step writes: params and grads
    ran_python: bool = False  # whether preparing it ran Python code of tensor subclasses
    has_new_params: bool = False  # whether some were never checked for shared memory

    def adds_to_grads(self, totals: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Has the op add grads to those in float32 that this was prepared with, in its pass over the params.

        It leaves both as they are. False, and nothing is done, if it cannot.
        """
        if len(self.updates) != 1:
            return False
        backend, update = self.updates[0]
        return backend.adds_in_step(update, totals, grads)


Before = Callable[[GroupStep], None]  # is called before a prepared step is run


def prepare(
    optimizer: Steppable, groups: Sequence[GroupToStep], outs: dict[Tensor, Tensor], zero_grads: bool
) -> list[GroupStep]:
    """Prepares a step of all groups. `outs` are the 16-bit copies to write, by param. Raises if anything is wrong."""
    steps = [prepare_group(optimizer, group, outs) for group in groups]
    # Python code of tensor subclasses may have changed what was read from other groups.
    if len(steps) > 1 and any(step.ran_python for step in steps):
        steps = [
            step if step.ran_python else prepare_group(optimizer, group, outs)
            for step, group in zip(steps, groups, strict=True)
        ]
    if zero_grads and _grads_overlap(steps):
        steps = [
            prepare_group(
                optimizer, group._replace(settings=dataclasses.replace(group.settings, zero_grads=False)), outs
            )
            for group in groups
        ]
        for step, (where, group, _) in zip(steps, groups, strict=True):
            step.sharded += sharded_grads(group["params"])
            steps[-1].after += [grad.zero_ for grad in zeroable_grads(group, where)]
    return steps


def prepare_group(optimizer: Steppable, to_step: GroupToStep, outs: dict[Tensor, Tensor]) -> GroupStep:
    """Prepares the step of one group: by the fast path if all of it is eligible, else a batch for each backend."""
    where, group, settings = to_step
    params = group["params"]
    backend = optimizer._backends.get(params[0].device) if params else None
    update = backend.prepare_group(where, settings, params, optimizer.state) if backend and not outs else None
    if backend and update and not backend.skips(settings):
        sharded = [param for param in params if param.grad is not None] if update.table.sharded else []
        sharded += sharded_grads(params) if sharded and settings.zero_grads else []
        return GroupStep([(backend, update)], sharded=sharded)

    check_torch_computes()
    batches = batches_of(optimizer, to_step)
    left = {param: outs[param] for param in params if param in outs}
    step = GroupStep([])
    for backend, batch in batches:
        if left and backend.writes_copies:
            batch.lowp_outs = [left.pop(owner, None) for owner in batch.owners]
        add_batch(optimizer, step, backend, batch)
    if settings.zero_grads:
        # The other grads were copied before the update, or belong to a step that is skipped.
        read = {id(grad) for _, batch in batches for grad in batch.grads}
        step.after += [grad.zero_ for grad in zeroable_grads(group, where) if id(grad) not in read]
        step.sharded += sharded_grads(params)
    for param, out in left.items():
        state = optimizer.state.get(param) or {}
        checked_master(param, state, settings.precision, f"{where}: a param with a lowp_out")
        check_writable(out, f"{where}: a lowp_out")
        step.after.append(functools.partial(write_copy, optimizer.state, param, out, settings.precision))
    return step


def batches_of(optimizer: Steppable, to_step: GroupToStep) -> list[tuple[Backend, Batch]]:
    """The group's params that have a grad, in a batch for each backend that does not skip this step."""
    where, group, settings = to_step
    batches: dict[torch.device, tuple[Backend, Batch]] = {}
    for index, name, param, grad in with_grads(group, where):
        if param.device not in batches:
            batches[param.device] = optimizer._backend_of(param, name), Batch([], settings, [], [], [])
        owner = group["params"][index]
        batch = batches[param.device][1]
        state = optimizer.state.get(owner, {})
        if not isinstance(state, dict):
            raise TypeError(f"{name} has a {type(state).__name__} as its state; expected a dict")
        if dtensor.is_sharded(owner):
            needed = [key for key in batch.needed_of(state, param) if key in tensors_of(settings.rule.states)]
            state = dtensor.local_state(state, owner, name, needed)
        batch.append(index, name, param, grad, state, owner)
    return [(backend, batch) for backend, batch in batches.values() if not backend.skips(settings)]


def add_batch(optimizer: Steppable, step: GroupStep, backend: Backend, batch: Batch) -> None:
    """Prepares a batch, and adds it to its group's step."""
    complete = all(map(is_complete, batch.states, batch.params, [batch] * len(batch.params)))
    if not complete:
        check_params_and_grads(batch)
        complete_states(backend, batch)
    if not complete or batch.has_shards:
        names = tensors_of(batch.settings.rule.states)
        batch.owned_states = [
            dtensor.owned_state(state, owner, names, optimizer.state.get(owner))
            for owner, state in zip(batch.owners, batch.states, strict=True)
        ]
        step.new_states += zip(batch.owners, batch.owned_states, strict=True)
    step.has_new_params |= not complete
    update = backend.prepare(batch)
    step.ran_python |= any_run_python(update.borrowed())
    step.updates.append((backend, update))
    step.sharded += [owner for owner in batch.owners if dtensor.is_sharded(owner)]


def any_run_python(tensors: Iterable[Tensor | None]) -> bool:
    """Whether there are tensors of subclasses, whose Python code may change others."""
    return any(tensor is not None and type(tensor) not in PLAIN_TYPES for tensor in tensors)


def write_copy(states: Mapping[Any, Any], param: Tensor, out: Tensor, precision: Precision) -> None:
    """Writes an updated param, from its master weights if it has any, to its 16-bit copy."""
    out.copy_(dtensor.local(fp32_param(param, states.get(param) or {}, precision)))


def _grads_overlap(steps: list[GroupStep]) -> bool:
    """Whether grads share memory, as autograd's may. Then none may be zeroed before all have been read."""
    by_backend: dict[int, tuple[Any, list[Any]]] = {}
    updates = [entry for step in steps for entry in step.updates]
    if len(updates) > 1 and any(update.table is None for _, update in updates):
        return True  # perhaps: pure PyTorch does not check, and zeroes an update's grads right after it
    for backend, update in updates:
        if update.table is not None:
            by_backend.setdefault(id(backend), (backend, []))[1].append(update.table)
    return any(backend.module.grads_overlap(tables) for backend, tables in by_backend.values())


def checked_lowp_outs(
    groups: Sequence[Mapping[str, Any]], lowp_out: Sequence[Tensor | None] | None
) -> dict[Tensor, Tensor]:
    """The local 16-bit tensor to write each param to. Raises TypeError or ValueError if one does not fit."""
    if lowp_out is None:
        return {}
    named = [
        (f"param group {g}, param {i}", param)
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    ]
    if len(lowp_out) != len(named):
        raise ValueError(f"lowp_out has {len(lowp_out)} entries, expected {len(named)}, one for each param")
    outs = {}
    for (name, param), out in zip(named, lowp_out, strict=True):
        if out is not None:
            check_lowp_out(dtensor.local_like(out, param, f"{name}: its lowp_out"), dtensor.local(param), name)
            outs[param] = dtensor.local(out)
    names = {f"the lowp_out of {name}": outs[param] for name, param in named if param in outs}
    written = {name: dtensor.local(p) for name, p in named if p.grad is not None or p in outs}
    check_no_overlap({**written, **names})
    grads = [(name, dtensor.local(p.grad), (outs.get(p), dtensor.local(p))) for name, p in named if p.grad is not None]
    check_grads_apart(grads, names)
    return outs


def check_shared_memory(optimizer: Steppable, groups: Sequence[GroupToStep], steps: Sequence[GroupStep]) -> None:
    """Raises ValueError if two params that a step is to update share memory. Does nothing if none is new."""
    has_new_params = optimizer._shared.get("was_loaded") or any(step.has_new_params for step in steps)
    if has_new_params or optimizer._shared.get("shares_memory"):
        check_no_overlap({name: param for where, group, _ in groups for _, name, param, _ in with_grads(group, where)})
    if has_new_params:
        params = [param for _, group, _ in groups for param in group["params"]]
        optimizer._shared.update(was_loaded=False, shares_memory=_any_share_memory(params, optimizer.state))


def _any_share_memory(params: Sequence[Tensor], states: Any) -> bool:
    """Whether params that have a grad, or have had one, share memory, so that no step may update two of them."""
    held = [dtensor.local(param) for param in params if param.grad is not None or param in states]
    try:
        check_no_overlap({str(i): param for i, param in enumerate(held) if is_in_memory(param)})
    except ValueError:
        return True
    return False


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with autograd on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

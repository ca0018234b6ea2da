"""Commits a prepared step: all of it, or nothing if a signal handler raises before it begins."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_compat import without_torch_function
from . import dtensor
from .async_step import AsyncStep, are_one_call, run_in_one_call, run_updates
from .backends.base import Update
from .interrupts import deferred_signals
from .memory import check_still_there, check_torch_computes, count_writes
from .step import GroupStep


def commit(states: Any, steps: Sequence[GroupStep], background: AsyncStep | None = None) -> None:
    """Runs the prepared steps of an optimizer with these states.

    Those of params on the CPU are handed to the background step, if one is given.
    """
    if any(step.after for step in steps):
        check_torch_computes()
    if not any(step.ran_python for step in steps):
        _commit_proved(states, steps, background)
        return
    with without_torch_function():  # from here on, no Python code of tensor subclasses runs
        for step in steps:
            for _, update in step.updates:
                check_still_there(update.borrowed(), None if update.table is None else update.table.spans)
        _commit_proved(states, steps, background)


def _commit_proved(states: Any, steps: Sequence[GroupStep], background: AsyncStep | None) -> None:
    new_states = [entry for step in steps for entry in step.new_states]
    former = _insert(states, new_states) if new_states else {}
    if background is not None:
        _hand_to_background(states, steps, background)
        return
    updates = [entry for step in steps for entry in step.updates]
    others = [step for step in steps if step.after or step.sharded]
    if not others and are_one_call(updates):
        run_in_one_call(updates)
        return
    with deferred_signals():
        done: list[Update] = []
        try:
            run_updates(updates, done)
        except BaseException:
            if not done:  # a device that refused the first launch
                _restore(states, former)
            raise
        for step in others:
            _finish(states, step)


def _insert(states: Any, new_states: list[tuple[Any, dict[str, Any]]]) -> dict[Any, Any]:
    """Adds new states, all or none. They are equivalent to what was there: zeros at step 0 to no state, and tensors in
    another memory layout to the former ones, except that 8-bit states are quantized anew.

    Returns what was there before, or None, by key.
    """
    former = {key: states.get(key) for key, _ in new_states}
    try:
        for key, state in new_states:
            states[key] = state
    except BaseException:
        _restore(states, former)
        raise
    return former


def _restore(states: Any, former: dict[Any, Any]) -> None:
    for key, state in former.items():
        if state is None:
            states.pop(key, None)
        else:
            states[key] = state


def _finish(states: Any, step: GroupStep) -> None:
    for call in step.after:
        call()
    # For params and grads alike: autograd sees the DTensors, but their local tensors were written.
    for param in step.sharded:
        count_writes([param, *_sharded_tensors(states.get(param) or {})])


def _sharded_tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if dtensor.is_sharded(value)]


def _hand_to_background(states: Any, steps: Sequence[GroupStep], background: AsyncStep) -> None:
    """Hands updates of params on the CPU to the background; enqueues the others on this thread's stream."""
    for step in steps:
        for backend, update in step.updates:
            if update.on_cpu:
                background.add(backend, update)
            else:
                update()
    for step in steps:
        if step.after or step.sharded:
            background.add(None, Update(functools.partial(_finish, states, step), list))

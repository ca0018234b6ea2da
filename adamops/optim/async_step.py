"""A step that runs in its own thread, and the handle to it."""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from .._torch_compat import step_post_hooks, without_torch_function
from ..threads import get_num_threads
from .backends.base import Backend, Update
from .dynamo_disabled import dynamo_disabled
from .interrupts import Latch, deferred_signals

_Method = TypeVar("_Method", bound=Callable[..., Any])


class AsyncStep:
    """A step that step_async() has started. wait() raises its errors.

    The optimizer's methods wait for the step themselves. Other code must not write the params, grads or states in the
    meantime, nor read what is being written.
    """

    def __init__(self, threads: int) -> None:
        self.threads = min(threads, 2**31 - 1)  # a C int; the op itself caps the number of threads
        self._updates: list[tuple[Backend | None, Update]] = []
        self._kept: list[object] = []
        self._ended = Latch()  # not join(): when interrupted, it takes a running thread for ended
        self._process = os.getpid()
        self._is_inference = torch.is_inference_mode_enabled()
        self._error: BaseException | None = None
        self._was_told = False

    def done(self) -> bool:
        """Whether the step has ended, with or without an error."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Returns once the step is done. If a signal handler raises in the meantime, the step still goes on.

        Raises
        ------
        Exception
            What step() would have raised. If it is about a grad or a state, nothing has been written.
        RuntimeError
            In a process that was forked while the step ran: the step goes on only in the parent.
        """
        self._join()
        self._was_told = True
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Like wait(), but does not raise an error a second time."""
        if self._was_told and (self._ended.is_set() or self._process != os.getpid()):
            return
        self.wait()

    def _join(self) -> None:
        if self._process != os.getpid() and not self._ended.is_set():
            self._was_told = True
            raise RuntimeError("A step was running in the background when this process was forked, and has ended here")
        self._ended.wait()

    # For the optimizer --------------------------------------------------------------------------------------------

    def add(self, backend: Backend | None, update: Update) -> None:
        """Adds an update to run in the background, and keeps the memory that it works on alive.

        Holding the tensors alone would not do that: `param.data = ...` gives a tensor other memory.
        """
        if update.count_writes is not None:
            update.count_writes()  # now: torch.utils.swap_tensors() may later free the version counters
        self._updates.append((backend, update))
        self._kept += [tensor.untyped_storage() for tensor in update.borrowed()]

    def fail(self, error: BaseException) -> None:
        """Ends the step with an error before it has begun."""
        self._error = error
        self._ended.set()

    def start(self) -> None:
        """Starts the updates; runs them in the calling thread if no other can be started."""
        thread = threading.Thread(target=self._run, name="adamops step")
        thread.daemon = False  # even if step_async() is called in a daemon thread: a step is never cut off
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads
            self._run()

    def _run(self) -> None:
        try:
            # Each thread has its own modes. Python code of tensor subclasses might free memory that was checked before.
            with (
                torch.inference_mode(self._is_inference),
                torch.no_grad(),
                without_torch_function(),
            ):
                run_updates(self._updates)
        except BaseException as error:
            self._error = error
        finally:
            self._updates.clear()  # releases the references that they hold
            self._kept.clear()
            self._ended.set()


def are_one_call(updates: Sequence[tuple[Backend | None, Update]]) -> bool:
    """Whether all updates are of one op that can run them in one call, with no Python code between them."""
    backend = updates[0][0] if updates else None
    return backend is not None and all(other is backend and update.call for other, update in updates)


def run_updates(updates: Sequence[tuple[Backend | None, Update]], done: list[Update] | None = None) -> None:
    """Runs updates, each with its backend: in one call of the op if are_one_call(), else one by one."""
    if are_one_call(updates):
        run_in_one_call(updates)
        return
    for _, update in updates:
        update()
        if done is not None:
            done.append(update)


def run_in_one_call(updates: Sequence[tuple[Backend | None, Update]]) -> None:
    """Runs updates for which are_one_call() is true."""
    updates[0][0].run_all([update for _, update in updates])  # type: ignore[union-attr]


class ForBackground(int):
    """What step_async() gives step() as `zero_grads`: by it, step() tells this call from those of step hooks."""

    running: AsyncStep

    def __new__(cls, zero_grads: bool, running: AsyncStep) -> ForBackground:
        self = super().__new__(cls, bool(zero_grads))
        self.running = running
        return self


def after_async_step(method: _Method) -> _Method:
    """Makes a method of an optimizer wait for the background step first, and hides it from torch.compile."""

    @dynamo_disabled
    @functools.wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return method(self, *args, **kwargs)

    return cast(_Method, waiting)


def start_step(optimizer: Any, threads: int | None, zero_grads: bool, lowp_out: Any) -> AsyncStep:
    """Starts a step of an optimizer in the background: RuleOptimizer.step_async()."""
    if threads is not None and operator.index(threads) < 1:
        raise ValueError(f"Invalid threads: {threads}; expected 1 or more")
    if step_post_hooks(optimizer):
        raise RuntimeError(
            "step_async() ends before the step does, so hooks after the step cannot be called; use step()"
        )
    optimizer._settle()
    running = AsyncStep(threads or get_num_threads())
    try:
        # By its name, as schedulers and hooks wrap it.
        optimizer.step(zero_grads=ForBackground(zero_grads, running), lowp_out=lowp_out)
    except Exception as error:
        running.fail(error)
    else:
        with deferred_signals():  # no thread may write params without the optimizer knowing
            optimizer._running = running
            running.start()
    optimizer._running = running
    return running

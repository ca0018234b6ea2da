"""A call in another thread. Must not know what is called."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from ..optim.interrupts import Latch


class Task:
    """A call that an executor makes, with an end that a signal handler may wait for, too.

    A substitute for the executor's own Future, which is written in Python: a handler that waits for it while the code
    that it has interrupted is about to wait takes the notification, and that code then waits forever.

    To be made with signals deferred, as the executor's locks are not reentrant.
    """

    def __init__(self, executor: Executor, function: Callable[..., Any], *arguments: object) -> None:
        self._ended = Latch()
        self._value: Any = None
        self._error: BaseException | None = None
        executor.submit(_run, [(self, function, arguments)])

    def exception(self) -> BaseException | None:
        """Waits; what the call has raised."""
        self._ended.wait()
        return self._error

    def result(self) -> Any:
        """Waits; what the call has returned. Raises what it has raised."""
        self._ended.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            del self  # which the traceback would keep


def _run(calls: list[tuple[Task, Callable[..., Any], tuple[object, ...]]]) -> None:
    """Makes the one call, and takes it out of the list: an error's traceback has the frames of the executor, too, which
    would keep it, and the optimizer with it."""
    task, function, arguments = calls.pop()
    ended = task._ended
    try:
        task._value = function(*arguments)
    except BaseException as error:
        task._error = error
        del task, function, arguments
    finally:
        ended.set()

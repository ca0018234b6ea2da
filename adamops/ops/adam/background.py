"""A step that runs in a thread of its own, and the handle to it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class AsyncStep:
    """A step that step_async() has begun. What goes wrong with it is raised by wait().

    The optimizer's methods wait for the step by themselves. What it must not come to is that others write the params,
    grads or states meanwhile, or read what is being written.
    """

    def __init__(self, threads: int) -> None:
        self.threads = min(threads, 2**31 - 1)  # a C int; the op takes no more threads than make sense
        self._updates: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = self._was_told = False

    def done(self) -> bool:
        """Whether the step has ended, well or not."""
        return self._ended

    def wait(self) -> None:
        """Returns once the step is done.

        Raises
        ------
        Exception
            What step() would have raised. If it is about a grad or a state, nothing has been written.
        RuntimeError
            In a process that was forked while the step ran: it goes on in the parent only.
        """
        if self._thread is not None:
            self._thread.join()
        self._was_told = True
        if self._error is not None:
            raise self._error
        if not self._ended:
            raise RuntimeError("A step was running in the background when this process was forked, and has ended here")

    def settle(self) -> None:
        """As wait(), but raises no error a second time."""
        if self._thread is not None:
            self._thread.join()
        if not self._was_told:
            self.wait()

    # For the optimizer --------------------------------------------------------------------------------------------

    def add(self, update: Callable[[], None]) -> None:
        """Leaves an update to be done in the background."""
        self._updates.append(update)

    def fail(self, error: BaseException) -> None:
        """Ends the step before it has begun."""
        self._error, self._ended = error, True

    def start(self) -> None:
        """Begins with the updates."""
        self._thread = threading.Thread(target=self._run, name="adamops step")  # not a daemon: a step is never cut off
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():  # each thread has a mode of its own
                for update in self._updates:
                    update()
        except BaseException as error:
            self._error = error
        self._updates.clear()  # and with them what they hold
        self._ended = True

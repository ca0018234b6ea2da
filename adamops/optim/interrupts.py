"""Lets Python code finish before a signal handler may raise, so that a step is done entirely or not at all; and lets
threads wait for each other whatever handlers do meanwhile."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

try:  # what signal wraps; its search for an enum member takes 2 us for each of 62 signals
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

_SIGNALS = tuple(map(int, signal.valid_signals()))


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Postpones Python's signal handlers, including the one for KeyboardInterrupt, to the end of the with statement.

    They run only in the main thread, so there is nothing to do in others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, FrameType | None] = {}
    found = [(number, getsignal(number)) for number in _SIGNALS]
    handlers = {number: handler for number, handler in found if callable(handler)}  # those in Python
    try:
        for number in handlers:
            set_handler(number, arrived.setdefault)  # called with the number and the frame
        yield
    finally:
        _restore(handlers)
        with contextlib.ExitStack() as stack:  # calls all of them, even if one raises
            for number, frame in reversed(arrived.items()):
                stack.callback(handlers[number], number, frame)


def _restore(handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
    try:
        for number, handler in handlers.items():
            set_handler(number, handler)
    except BaseException:  # a handler already restored may raise here; the others must be restored too
        _restore(handlers)
        raise


class Latch:
    """A substitute for threading.Event that uses only operations in C.

    Event is written in Python. A signal handler may raise while the thread that it interrupts holds Event's lock: every
    waiter, and the thread that is to set it, would then block forever. So would a thread whose handler waits for the
    Event that it was about to wait for itself.
    """

    _LONGEST = 0.2  # seconds until a waiter checks again, as another may have been interrupted holding the lock

    def __init__(self) -> None:
        self._is_set = False
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Must be called only once."""
        self._is_set = True
        self._lock.release()

    def wait(self) -> None:
        while not self._is_set:
            if self._lock.acquire(timeout=self._LONGEST):
                self._lock.release()

"""Lets Python code finish before a signal handler may raise, so that a step is done entirely or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Postpones Python's signal handlers, including the one for KeyboardInterrupt, to the end of the with statement.

    They run only in the main thread, so there is nothing to do in others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, FrameType | None] = {}
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for valid in signal.valid_signals():
        handler = signal.getsignal(valid)
        if callable(handler):  # a handler in Python
            handlers[int(valid)] = handler
    try:
        for number in handlers:
            signal.signal(number, arrived.setdefault)  # called with the number and the frame
        yield
    finally:
        _restore(handlers)
        with contextlib.ExitStack() as stack:  # calls all of them, even if one raises
            for number, frame in reversed(arrived.items()):
                stack.callback(handlers[number], number, frame)


def _restore(handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:  # a handler already restored may raise here; the others must be restored too
        _restore(handlers)
        raise

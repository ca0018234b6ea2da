"""Lets a piece of Python run to its end before a signal's handler may raise: all of a step is done, or none of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Has Python's signal handlers, KeyboardInterrupt's among them, called at the end and not inside.

    They run in the main thread only, so in others there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, FrameType | None] = {}
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for valid in signal.valid_signals():
        handler = signal.getsignal(valid)
        if callable(handler):  # one in Python
            handlers[int(valid)] = handler
    try:
        for number in handlers:
            signal.signal(number, arrived.setdefault)  # called with the number and the frame
        yield
    finally:
        _restore(handlers)
        with contextlib.ExitStack() as stack:  # which calls all of them, also if one raises
            for number, frame in reversed(arrived.items()):
                stack.callback(handlers[number], number, frame)


def _restore(handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:  # a handler that is back already may raise here; the others must come back too
        _restore(handlers)
        raise

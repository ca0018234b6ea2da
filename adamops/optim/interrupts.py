"""Lets Python code finish before a signal handler may raise, so that a step is done entirely or not at all."""

from __future__ import annotations

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

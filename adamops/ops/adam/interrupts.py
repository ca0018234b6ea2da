"""Lets a piece of Python run to its end before a signal's handler may raise: all of a step is done, or none of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Has Python's signal handlers, KeyboardInterrupt's among them, called at the end and not inside.

    They run in the main thread only, so in others there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, FrameType | None] = {}
    former = {number: signal.getsignal(number) for number in signal.valid_signals()}
    former = {number: handler for number, handler in former.items() if callable(handler)}
    try:
        for number in former:
            signal.signal(number, lambda signum, frame: arrived.setdefault(signum, frame))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for number, frame in arrived.items():
            former[number](number, frame)  # type: ignore[operator]

"""A stand-in for an accelerator on the host, where a missing wait gives a wrong result.

Its device memory is host memory, and the caller's computations are done when they return. Copies run later: each stream
is a thread, which takes its time. Must not know of params, grads or optimizers.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..optim.interrupts import Latch, deferred_signals


class _Stream:
    """Runs what is enqueued, one after another, in a thread that ends when nobody has the stream any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(1, name)  # Python waits for it before it ends

    def enqueue(self, task: Callable[..., object], *arguments: object) -> None:
        with deferred_signals():  # a handler may enqueue, too, and the executor's locks are not reentrant
            self._thread.submit(task, *arguments)


def _drop(_: Tensor) -> None:
    """Does nothing, with a reference."""


class HostStandIn:
    """An accelerator of host memory.

    Parameters
    ----------
    gigabytes_per_second
        How fast copies are on each stream; None for as fast as memory.
    delay
        Called before each copy for the seconds that it waits; tests draw them.
    """

    def __init__(self, gigabytes_per_second: float | None = None, delay: Callable[[], float] | None = None) -> None:
        self._bytes_per_second = None if gigabytes_per_second is None else 1e9 * gigabytes_per_second
        self._delay = delay
        self.trace: list[tuple[str, str, float, float]] = []  # stream, label, begin and end in seconds
        self.pinned_bytes = 0
        self.faults: list[str] = []  # what would have been copied wrongly

    @classmethod
    def with_random_delays(cls, seed: int, most: float = 2e-3) -> HostStandIn:
        """One whose copies take random times, up to `most` seconds."""
        draw = random.Random(seed)
        return cls(delay=lambda: draw.choice((0.0, most * draw.random())))

    def new_stream(self, name: str) -> _Stream:
        return _Stream(name)

    def current_stream(self) -> None:
        """The caller itself: what it has computed is done."""

    def record(self, stream: _Stream | None) -> Latch:
        event = Latch()
        if stream is None:
            event.set()
        else:
            stream.enqueue(event.set)
        return event

    def wait(self, stream: _Stream | None, event: Latch) -> None:
        if stream is None:
            event.wait()
        else:
            stream.enqueue(event.wait)

    def synchronize(self, event: Latch) -> None:
        event.wait()

    def download(self, host: Tensor, device: Tensor, stream: _Stream, label: str) -> None:
        torch.autograd.graph.increment_version(host)  # as a copy of torch does when it is enqueued
        stream.enqueue(self._copy, lambda: host, weakref.ref(device), label, stream.name)

    def upload(self, device: Tensor, host: Tensor, stream: _Stream, label: str) -> None:
        torch.autograd.graph.increment_version(device)
        stream.enqueue(self._copy, weakref.ref(device), lambda: host, label, stream.name)

    def _copy(
        self, target_now: Callable[[], Tensor | None], source_now: Callable[[], Tensor | None], label: str, stream: str
    ) -> None:
        begin = time.perf_counter()
        if self._delay is not None:
            time.sleep(self._delay())
        target, source = target_now(), source_now()
        if target is None or source is None:  # an accelerator would copy whatever is there now
            self.faults.append(f"{label}: the tensor was dropped before its copy ran, and not kept")
            return
        if target.shape != source.shape or target.dtype != source.dtype:
            self.faults.append(f"{label}: a copy between tensors of different shapes or dtypes")
            return
        target.data.copy_(source.data)
        if self._bytes_per_second is not None:
            size = target.numel() * target.element_size()
            time.sleep(max(0.0, begin + size / self._bytes_per_second - time.perf_counter()))
        self.trace.append((stream, label, begin, time.perf_counter()))

    def keep(self, device: Tensor, stream: _Stream) -> None:
        stream.enqueue(_drop, device)

    def pinned(self, size: int) -> Tensor:
        self.pinned_bytes += size
        return torch.empty(size, dtype=torch.uint8, device="cpu")

"""Grads down, chunks of params updated in a thread of its own, params up: each beside the others, and in order.

Must not know how a chunk is updated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..optim import dtensor
from ..optim.interrupts import deferred_signals
from .chunks import Chunk, Entry
from .device import Device


class Pipeline:
    """What is on its way between a device and the host.

    Attributes
    ----------
    arrived
        Chunks that have grads, in the order in which these arrived.
    updating
        Chunks that are being updated before the step that they belong to has been called.
    in_flight
        Chunks that are being updated, or sent up, since then.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrived: dict[Chunk, None] = {}
        self.updating: dict[Chunk, Future[Any]] = {}
        self.in_flight: dict[Chunk, Future[Any]] = {}
        self.lock = threading.RLock()  # autograd has threads of its own
        self._down, self._up = (device.new_stream(name) for name in ("down", "up"))
        self._pool = ThreadPoolExecutor(1, "adamops offload")
        self._process = os.getpid()

    def check_process(self) -> None:
        """Raises RuntimeError in a process that was forked since this was made."""
        if self._process != os.getpid():
            raise RuntimeError(
                "An offloaded optimizer cannot be used in a forked process, as its thread is in the parent: make it "
                "after the fork, or start processes with 'spawn'"
            )

    def send(self, entry: Entry, chunk: Chunk, grad: Tensor) -> None:
        """Sends a param's grad down, and drops it."""
        with deferred_signals():
            entry.send(grad, self.device, self._down)
            self.arrived[chunk] = None
            entry.param.grad = None

    def update(self, chunk: Chunk, update: Callable[[Chunk], None]) -> None:
        """Has a chunk updated, and its params sent up, once its grads are there."""
        computed = self.device.record(self.device.current_stream())  # the backward pass may still read the params
        changed = self._bring_changed(chunk, computed)
        task = (self.device, self._up, chunk, update, computed, changed, torch.is_inference_mode_enabled())
        self.updating[chunk] = self._pool.submit(_update_and_send, *task)

    def _bring_changed(self, chunk: Chunk, computed: Any) -> Any:
        """Sends down those params that someone has written, as load_state_dict() of a model does."""
        changed = [entry for entry in chunk.entries if entry.which() != entry.known]
        if changed:
            self.device.wait(self._down, computed)
        for entry in changed:
            held = dtensor.local(entry.param.detach())
            self.device.download(dtensor.local(entry.host.detach()), held, self._down, "param")
            self.device.keep(held, self._down)
        return self.device.record(self._down) if changed else None

    def step(self, chunks: Iterable[Chunk], update: Callable[[Chunk], None]) -> None:
        """Has chunks updated, all or none. With them, what is already updated is in flight."""
        with self.lock, deferred_signals():
            for chunk in chunks:
                self.update(chunk, update)
            self._begin_flight()

    def finish(self, chunks: Iterable[Chunk]) -> None:
        """Waits for those of the chunks that are in flight, and has the current stream wait for their params.

        Raises the first error of an update. That chunk keeps its grads.
        """
        error: BaseException | None = None
        with self.lock:
            for chunk in chunks:
                if chunk not in self.in_flight:
                    continue
                failed = self.in_flight[chunk].exception()  # waits
                with deferred_signals():
                    done = self.in_flight.pop(chunk)
                    error = error or failed
                    if failed is None:
                        self.device.wait(self.device.current_stream(), done.result())
                        self.arrived.pop(chunk, None)
                        for entry in chunk.entries:
                            entry.drop_grads(self.device)
        if error is not None:
            raise error

    def settle(self) -> None:
        """finish() for everything."""
        with self.lock:
            self._begin_flight()
            self.finish(list(self.in_flight))

    def _begin_flight(self) -> None:
        self.in_flight |= self.updating
        self.updating = {}

    def drop_grads(self, chunks: Iterable[Chunk], to_zero: bool) -> None:
        """Drops the grads of chunks that are not being updated, or sets them to zero."""
        with self.lock:
            for chunk in chunks:
                if chunk not in self.in_flight and chunk not in self.updating:
                    for entry in chunk.entries:
                        entry.drop_grads(self.device, to_zero)
            self.arrived = {chunk: None for chunk in self.arrived if chunk.has_grads}


def _update_and_send(
    device: Device,
    stream: Any,
    chunk: Chunk,
    update: Callable[[Chunk], None],
    computed: Any,
    changed: Any,
    is_inference: bool,
) -> Any:
    """Returns the event of the params' arrival."""
    with torch.inference_mode(is_inference), torch.no_grad():
        for entry in chunk.entries:
            entry.give_grad(device)
        if changed is not None:
            device.synchronize(changed)
        update(chunk)
        device.wait(stream, computed)
        for entry in chunk.entries:
            if entry.has_grad:
                device.upload(dtensor.local(entry.param), dtensor.local(entry.host.detach()), stream, "param")
            entry.known = entry.which()
        return device.record(stream)

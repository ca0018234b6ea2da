"""Grads down, chunks of params updated in a thread of its own, params up: each beside the others, and in order.

Must not know how a chunk is updated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..optim import dtensor
from ..optim.interrupts import deferred_signals
from ..optim.step_settings import StepSettings
from .chunks import Add, Chunk, Entry
from .device import Device
from .task import Task

# Pipelines with chunks in flight, and a method that keeps their optimizer alive until somebody has waited for these.
_busy: dict[Pipeline, Callable[[Chunk], None]] = {}


class Pipeline:
    """What is on its way between a device and the host.

    Attributes
    ----------
    arrived
        Chunks that have grads, in the order in which these arrived.
    in_flight
        Chunks that are being updated, or sent up.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrived: dict[Chunk, None] = {}
        self.in_flight: dict[Chunk, Task] = {}
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

    def _submit(self, function: Callable[..., Any], *arguments: object) -> Task:
        return Task(self._pool, function, *arguments)

    def send(self, entry: Entry, chunk: Chunk, grad: Tensor, add: Add, update_adds: bool) -> None:
        """Sends a param's grad down, where it is added to others, by the update or before; and drops it."""
        with deferred_signals():
            if chunk.is_updated:
                raise RuntimeError(
                    "Params were updated on the host, and could not be copied to the device: call step() to copy them "
                    "before the next backward pass"
                )
            chunk.settings = None  # a step that failed no longer belongs to these grads
            entry.send(grad, self.device, self._down, self._submit, add, update_adds)
            self.arrived[chunk] = None
            entry.param.grad = None

    def update(
        self, chunks: Sequence[Chunk], settings: Sequence[StepSettings], update: Callable[[Chunk], None]
    ) -> None:
        """Has chunks updated, all or none, and their params sent up. The settings are those of their groups.

        Chunks whose step has failed keep the settings of that step; those in flight are left out.
        """
        chunks = [chunk for chunk in chunks if chunk not in self.in_flight]
        for chunk in chunks:
            for entry in chunk.entries:
                entry.check_param()
        with self.lock, deferred_signals():
            computed = self.device.record(self.device.current_stream())  # the backward pass may still read the params
            if chunks:
                _busy[self] = update
            for chunk in chunks:
                chunk.settings = chunk.settings or settings[chunk.group_index]
                changed = self._bring(chunk.with_grads, computed)
                task = (chunk, update, computed, changed, torch.is_inference_mode_enabled())
                self.in_flight[chunk] = self._submit(self._update_and_send, *task)

    def bring_changed(self, chunks: Iterable[Chunk]) -> None:
        """Waits until the host has what others have written to params, as load_state_dict() of a model does."""
        with self.lock:
            entries = [entry for chunk in chunks for entry in chunk.entries if entry.sent is not None]
            for entry in entries:
                entry.check_param()
            arrival = self._bring(entries, self.device.record(self.device.current_stream()))
        if arrival is not None:
            self.device.synchronize(arrival)

    def _bring(self, entries: Iterable[Entry], computed: Any) -> Any:
        """Sends down those params that others have written; the event of their arrival, None if there are none."""
        changed = [entry for entry in entries if entry.which() != entry.known]
        if not changed:
            return None
        self.device.wait(self._down, computed)
        for entry in changed:
            held = dtensor.local(entry.param.detach())
            self.device.download(dtensor.local(entry.host.detach()), held, self._down, "param")
            self.device.keep(held, self._down)
            entry.known = entry.which()
        return self.device.record(self._down)

    def _update_and_send(
        self, chunk: Chunk, update: Callable[[Chunk], None], computed: Any, changed: Any, is_inference: bool
    ) -> tuple[Any, bool]:
        """Returns the event of the params' arrival, and whether they were as they had been when this was submitted."""
        with torch.inference_mode(is_inference), torch.no_grad():
            if changed is not None:
                self.device.synchronize(changed)
            if not chunk.is_updated:  # else only its upload has failed
                for entry in chunk.entries:
                    entry.give_grad(self.device)
                update(chunk)
                chunk.is_updated = True
            self.device.wait(self._up, computed)
            are_as_known = _are_as_known(chunk)
            for entry in chunk.with_grads:
                held = dtensor.local(entry.param)
                self.device.upload(held, dtensor.local(entry.host.detach()), self._up, "param")
                self.device.keep(held, self._up)
                entry.known = entry.which()
            return self.device.record(self._up), are_as_known

    def finish(self, chunks: Sequence[Chunk]) -> None:
        """Waits for those of the chunks that are in flight, and has the current stream wait for their params.

        Raises the first error of an update, whose chunk keeps its grads; also RuntimeError if a param was written in
        the meantime.
        """
        if not any(chunk in self.in_flight for chunk in chunks):
            return
        self.check_process()
        errors: list[BaseException] = []
        failed = done = None
        with self.lock:
            for chunk in chunks:
                if chunk not in self.in_flight:
                    continue
                failed = self.in_flight[chunk].exception()  # waits
                with deferred_signals():
                    done = self.in_flight.pop(chunk, None)
                    if done is None:  # a signal handler has called this meanwhile
                        continue
                    if failed is not None:
                        errors.append(failed)
                        continue
                    arrival, are_as_known = done.result()
                    self.device.wait(self.device.current_stream(), arrival)
                    if not are_as_known or not _are_as_known(chunk):
                        errors.append(_written(chunk))
                    self.arrived.pop(chunk, None)
                    chunk.drop_grads(self.device)
            if not self.in_flight:
                _busy.pop(self, None)
        try:
            if errors:
                raise errors[0]
        finally:
            del errors, failed, done  # they refer to this frame

    def settle(self) -> None:
        """finish() for everything."""
        self.finish(list(self.in_flight))

    def drop_grads(self, chunks: Iterable[Chunk], to_zero: bool) -> None:
        """Drops the grads of chunks that are not being updated, or sets them to zero."""
        with self.lock:
            for chunk in chunks:
                if chunk not in self.in_flight:
                    chunk.drop_grads(self.device, to_zero)
            self.arrived = {chunk: None for chunk in self.arrived if chunk.has_grads}


def _are_as_known(chunk: Chunk) -> bool:
    """Whether nobody has written params that are being updated since their last copy, up or down, was enqueued."""
    return all(entry.which() == entry.known for entry in chunk.with_grads)


def _written(chunk: Chunk) -> RuntimeError:
    """The error for that. What the params hold now is read at their next update."""
    for entry in chunk.entries:
        entry.known = None
    shapes = ", ".join(str(tuple(entry.host.shape)) for entry in chunk.with_grads)
    return RuntimeError(
        f"Params were written while their update was on its way to them, and may hold either; they have the shapes "
        f"{shapes}. Call wait() of the optimizer before reading or writing params"
    )

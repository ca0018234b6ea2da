"""What offloading takes: bytes on the device and the host, bytes moved in a step, and how long a step is.

Must not know how a step is done: the pipeline is described here by its rules, and the tests hold the two together.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from ..ops.adam import DeepSpeedCPUAdam
from .device import Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": "8bit"}

# By name, the arguments of simulated_step(): what step() waits for, and when updates begin.
MODES: dict[str, dict[str, bool]] = {
    "as it is": {},
    "update_in_backward=True": {"in_backward": True},
    "model=": {"by_block": True},
    "model=, update_in_backward=True": {"by_block": True, "in_backward": True},
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of a model and its optimizer, as the optimizer's arguments name it."""

    param_dtype: str = "bf16"
    state_dtype: str = "fp32"
    masters: int | None = None  # bits of split master weights
    accumulate: int = 1

    @property
    def param(self) -> float:
        """Bytes of a param, and of its grad on the device."""
        return DTYPES[self.param_dtype].itemsize

    @property
    def pinned(self) -> float:
        """Bytes of pinned memory for a param: its copy, and its grad."""
        return 2 * self.param

    @property
    def states(self) -> float:
        """Bytes of two states of a param, and of what completes its master weight."""
        states = 2 * (1 + 2 / 256) if self.state_dtype == "8bit" else 2 * STATES[self.state_dtype].itemsize
        return states + ({None: 0, 24: 1, 32: 2}[self.masters] if self.param == 2 else 0)

    @property
    def ordinary(self) -> float:
        """Bytes of other host memory for a param: states, what completes master weights, sums of grads."""
        return self.states + (4 if self.accumulate > 1 else 0)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the parts of a step, each alone, all chunks together."""

    forward: float
    backward: float
    down: float
    update: float
    up: float
    norm: float = 0.0  # reading the grads once, to clip them

    @property
    def in_series(self) -> float:
        """One after another."""
        return self.forward + self.backward + self.down + self.norm + self.update + self.up


def simulated_step(times: Times, chunks: int, in_backward: bool = False, by_block: bool = False) -> float:
    """Seconds from one step to the next, once every step takes as long.

    With `in_backward` chunks are updated as they arrive, else after the backward pass. With `by_block` the forward pass
    waits for each chunk where it reads it, else for all.
    """
    forward, backward, down, update, up = (
        part / chunks for part in (times.forward, times.backward, times.down, times.update, times.up)
    )
    forward_order = range(chunks)
    backward_order = forward_order[::-1]
    ready = [0.0] * chunks  # when the params of each chunk have arrived on the device
    begin = copied = updated = sent = period = 0.0
    for _ in range(5):  # until the pipeline is full
        now = begin
        for i in forward_order:
            now = max(now, ready[i]) + forward
        arrived = [0.0] * chunks
        for i in backward_order:
            now += backward
            copied = arrived[i] = max(now, copied) + down
        if not in_backward:
            now = max(now, copied) + times.norm if times.norm else now
            updated = max(now, updated)
        for i in forward_order if by_block and not in_backward else backward_order:
            updated = max(updated, arrived[i]) + update
            sent = ready[i] = max(sent, updated) + up
        following = now if by_block else max(now, *ready)
        period, begin = following - begin, following
    return period


def copy_bandwidth(device: Device, place: str, size: int = 2**28) -> float:
    """Bytes per second of copies between pinned memory and a device's memory, each way while both ways are in use."""
    on_device = [torch.zeros(size, dtype=torch.uint8, device=place) for _ in range(2)]
    pinned = [device.pinned(size) for _ in range(2)]
    down, up = device.new_stream("down"), device.new_stream("up")

    def copy() -> None:
        device.download(pinned[0], on_device[0], down, "grad")
        device.upload(on_device[1], pinned[1], up, "param")
        for stream in (down, up):
            device.synchronize(device.record(stream))

    return size / _best(copy)


def seconds_per_param(precision: Precision, elements: int = 4_000_000) -> tuple[float, float]:
    """Seconds that an update takes here for a param, and those of reading its grad for the norm."""
    param = torch.nn.Parameter(torch.randn(elements).to(DTYPES[precision.param_dtype]))
    param.grad = torch.randn_like(param)
    masters = precision.masters if precision.param == 2 else None
    optimizer = DeepSpeedCPUAdam([param], state_dtype=STATES[precision.state_dtype], master_weight_bits=masters)
    optimizer.step()
    return _best(optimizer.step) / elements, _best(lambda: optimizer.clip_grad_norm_(1e9)) / elements


def _best(call: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)

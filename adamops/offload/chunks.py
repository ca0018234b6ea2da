"""Params with what belongs to them on the host, in chunks. Must not know how a step is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_compat import version_of
from ..optim import dtensor
from .device import Device

_ALIGNMENT = 64  # bytes: a cache line, so that no two params share one


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """A param on the device, with what belongs to it on the host; for DTensors, what this process holds.

    `sent` is where grads arrive, in pinned memory. `total` is their sum since the last step: the same memory, as long
    as there is one grad.
    """

    param: Tensor
    host: Parameter  # the param of the inner optimizer, in pinned memory
    sent: Tensor
    total: Tensor
    accumulates: bool  # whether `total` always has memory of its own
    has_grad: bool = False
    arrivals: int = 0  # grads since the last step
    on_its_way: Any = None  # the event of a grad that is not yet in `total`
    known: Any = None  # which() of the param when it and its copy were last the same

    def which(self) -> tuple[Any, ...]:
        """What changes if anyone writes the param, or gives it other memory."""
        held = dtensor.local(self.param)
        return version_of(held), held.data_ptr()

    def add_arrived(self, device: Device) -> None:
        """Waits for the grad on its way, if there is one, and adds it to the sum."""
        if self.on_its_way is None:
            return
        device.synchronize(self.on_its_way)
        self.on_its_way = None
        if self.total is self.sent:
            return
        if self.has_grad:
            self.total.add_(self.sent)
        else:
            self.total.copy_(self.sent)
        self.has_grad = True

    def make_room(self, device: Device) -> None:
        """Makes `sent` free for another grad."""
        self.add_arrived(device)
        if self.total is self.sent and self.has_grad:
            self.total = self.sent.clone()

    def send(self, grad: Tensor, device: Device, stream: Any) -> None:
        """Sends a grad, which may be dropped afterwards."""
        self.make_room(device)
        device.wait(stream, device.record(device.current_stream()))
        device.download(self.sent, grad, stream, "grad")
        device.keep(grad, stream)
        self.on_its_way = device.record(stream)
        self.arrivals += 1
        if self.total is self.sent:
            self.has_grad = True

    def give_grad(self, device: Device) -> None:
        """Waits for the grads, and gives their sum to the inner optimizer's param."""
        self.add_arrived(device)
        if not self.has_grad:
            self.host.grad = None
        elif self.host.grad is None or dtensor.local(self.host.grad) is not self.total:
            if hasattr(self.host, "grad_dtype"):  # since torch 2.10, without it a grad has the param's dtype
                self.host.grad = None
                self.host.grad_dtype = self.total.dtype
            self.host.grad = dtensor.like_param_placed(self.total, self.host)

    def drop_grads(self, device: Device, to_zero: bool = False) -> None:
        """Forgets all grads; or sets them to zero, if there are any."""
        self.add_arrived(device)
        self.arrivals = 0
        if to_zero and self.has_grad:
            self.total.zero_()
            return
        self.has_grad, self.host.grad = False, None
        if not self.accumulates:
            self.total = self.sent


@dataclasses.dataclass(eq=False, slots=True)
class Chunk:
    """Params next to each other in one param group."""

    group_index: int
    begin: int  # position of the first one in the group
    entries: list[Entry]

    @property
    def has_grads(self) -> bool:
        """Whether there is anything to update."""
        return any(entry.has_grad or entry.on_its_way is not None for entry in self.entries)

    def is_complete(self, arrivals: int) -> bool:
        """Whether as many grads as that have arrived for all params that get any."""
        return all(entry.arrivals == arrivals or not entry.param.requires_grad for entry in self.entries)


def chunks_of(
    group_index: int, params: Sequence[Tensor], most_bytes: int, device: Device, accumulates: bool
) -> Iterator[Chunk]:
    """The chunks of a param group, in new pinned memory that holds the params' values.

    A chunk has params of one dtype, of at most `most_bytes` together unless it is a single one.
    """
    begin, size = 0, 0
    for i, param in enumerate(params):
        own = dtensor.local(param).numel() * param.element_size()
        if i > begin and (size + own > most_bytes or param.dtype != params[begin].dtype):
            yield Chunk(group_index, begin, _new_entries(params[begin:i], device, accumulates))
            begin, size = i, 0
        size += own
    if params:
        yield Chunk(group_index, begin, _new_entries(params[begin:], device, accumulates))


def _new_entries(params: Sequence[Tensor], device: Device, accumulates: bool) -> list[Entry]:
    locals_ = [dtensor.local(param.detach()) for param in params]
    hosts, sent = (_pinned_like(locals_, device) for _ in range(2))
    entries = []
    for param, held, host, grad in zip(params, locals_, hosts, sent, strict=True):
        host.copy_(held)
        total = torch.empty(held.shape, dtype=torch.float32, device="cpu") if accumulates else grad
        own = Parameter(dtensor.like_param_placed(host, param), requires_grad=param.requires_grad)
        entries.append(Entry(param, own, grad, total, accumulates))
        entries[-1].known = entries[-1].which()
    return entries


def _pinned_like(tensors: Sequence[Tensor], device: Device) -> list[Tensor]:
    """New pinned memory for tensors of one dtype, next to each other."""
    dtype = tensors[0].dtype
    step = _ALIGNMENT // dtype.itemsize
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() // step) * step)
    memory = device.pinned(offsets[-1], dtype)
    return [memory[begin : begin + t.numel()].view(t.shape) for t, begin in zip(tensors, offsets, strict=False)]

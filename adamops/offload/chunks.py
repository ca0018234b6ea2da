"""Params with what belongs to them on the host, in chunks. Must not know how a step is done."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_compat import version_of
from ..optim import dtensor
from ..optim.step import GroupStep
from ..optim.step_settings import StepSettings
from .device import Device
from .pinned import pinned_like
from .task import Task

Add = Callable[[Tensor, Tensor, bool], None]  # a backend's add_grad()


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """A param on the device, with what belongs to it on the host; for DTensors, what this process holds.

    `sent` is where grads arrive, in pinned memory. `total` is their sum since the last step: the same memory, as long
    as there is one grad. Both are None for a frozen param until it gets a grad. If the update adds up, its pass reads
    the grad in `sent` and the sum of those before.
    """

    param: Tensor
    host: Parameter  # the param of the inner optimizer, in pinned memory
    accumulates: bool  # whether `total` always has memory of its own
    sent: Tensor | None = None
    total: Tensor | None = None
    has_grad: bool = False  # in `total`, or on its way there
    arrivals: int = 0  # grads since the last step
    was_left: bool = False  # on the device, as an error came before it could be sent
    on_its_way: Any = None  # the event of a grad's arrival in `sent`, if none of our threads waits for it
    adding: Task | None = None  # of a grad that is added to `total` once it has arrived
    update_adds: bool = False  # whether the grad in `sent` is not in `total`, as the update adds it
    known: Any = None  # which() of the param when it and its copy were last the same

    def which(self) -> tuple[Any, ...]:
        """What changes if anyone writes the param, or gives it other memory."""
        held = dtensor.local(self.param)
        memory = weakref.ref(held.untyped_storage())  # other memory may get the address of the former
        return version_of(self.param), version_of(held), held.data_ptr(), memory  # a DTensor counts writes by itself

    def check_param(self) -> None:
        """Raises ValueError if the param is no longer like its copy."""
        held, own = dtensor.local(self.param), dtensor.local(self.host)
        if held.shape != own.shape or held.dtype != own.dtype:
            raise ValueError(
                f"A param of shape {tuple(own.shape)} and {own.dtype} was given to the optimizer, and is now of shape "
                f"{tuple(held.shape)} and {held.dtype}; make the optimizer after changing the model"
            )

    def give_memory(self, host: Tensor, sent: Tensor) -> None:
        """Has the param's copy in `host`, of any content yet, and its grads arrive in `sent`."""
        dtensor.local(self.host).data = host
        self.sent, self.known = sent, None
        self.total = torch.empty_like(sent, dtype=torch.float32) if self.accumulates else sent

    def send(
        self,
        grad: Tensor,
        device: Device,
        stream: Any,
        submit: Callable[..., Task],
        add: Add,
        update_adds: bool,
    ) -> None:
        """Sends a grad, which may be dropped afterwards."""
        self.arrive(device)
        self.add_sent(add)
        assert self.sent is not None and self.total is not None
        if self.has_grad and self.total is self.sent:
            self.total = self.sent.clone()
        device.wait(stream, device.record(device.current_stream()))
        device.download(self.sent, grad, stream, "grad")
        device.keep(grad, stream)
        arrival = device.record(stream)
        self.update_adds = update_adds and self.has_grad and self.accumulates
        if self.total is self.sent or self.update_adds:
            self.on_its_way = arrival
        else:
            self.adding = submit(_add, add, device, arrival, self.total, self.sent, not self.has_grad)
        self.arrivals += 1
        self.has_grad = True

    def arrive(self, device: Device) -> None:
        """Waits until all grads are there. Raises, again and again, if one could not be added to `total`."""
        if self.adding is not None:
            self.adding.result()
            self.adding = None
        if self.on_its_way is not None:
            device.synchronize(self.on_its_way)
            self.on_its_way = None

    def add_sent(self, add: Add) -> None:
        """Adds the grad that was left to the update, which has arrived."""
        if self.update_adds:
            assert self.sent is not None and self.total is not None
            add(self.total, self.sent, False)
            self.update_adds = False

    def give_grad(self, device: Device) -> None:
        """Waits for the grads, and gives `total` to the inner optimizer's param."""
        self.arrive(device)
        if not self.has_grad:
            self.host.grad = None
        elif self.host.grad is None or dtensor.local(self.host.grad) is not self.total:
            assert self.total is not None
            if hasattr(self.host, "grad_dtype"):  # since torch 2.10, without it a grad has the param's dtype
                self.host.grad = None
                self.host.grad_dtype = self.total.dtype
            self.host.grad = dtensor.like_param_placed(self.total, self.host)

    def drop_grads(self, device: Device, to_zero: bool = False) -> None:
        """Forgets all grads; or sets them to zero, if there are any."""
        if self.adding is not None and self.adding.exception() is not None:  # waits
            self.adding, to_zero = None, False
        self.arrive(device)
        self.arrivals, self.update_adds = 0, False
        if to_zero and self.has_grad:
            assert self.total is not None
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
    settings: StepSettings | None = None  # of the step that has been asked for, and is not done
    is_updated: bool = False  # on the host, for that step

    @property
    def end(self) -> int:
        """Position in the group after the last one."""
        return self.begin + len(self.entries)

    @property
    def with_grads(self) -> list[Entry]:
        """Those that an update writes."""
        return [entry for entry in self.entries if entry.has_grad]

    @property
    def has_grads(self) -> bool:
        """Whether there is anything to update."""
        return any(entry.has_grad for entry in self.entries)

    def is_complete(self, arrivals: int) -> bool:
        """Whether as many grads as that have arrived for all params that get any, or have got some before."""
        return all(
            entry.arrivals == arrivals or not (entry.param.requires_grad or entry.has_grad) for entry in self.entries
        )

    def add_grads(self, add: Add, step: GroupStep) -> None:
        """Has a prepared step add the grads that were left to it; those that it cannot add are added now."""
        left = [entry for entry in self.entries if entry.update_adds]
        pairs = [(entry.total, entry.sent) for entry in left if dtensor.local(entry.host).numel()]
        if pairs and not step.adds_to_grads(*zip(*pairs, strict=True)):
            for entry in left:
                entry.add_sent(add)

    def drop_grads(self, device: Device, to_zero: bool = False) -> None:
        """Forgets all grads, or sets them to zero, and with them an unfinished step."""
        self.settings, self.is_updated = None, False
        for entry in self.entries:
            entry.drop_grads(device, to_zero)


def chunks_of(
    group_index: int, params: Sequence[Tensor], most_bytes: int, device: Device, accumulates: bool
) -> list[Chunk]:
    """The chunks of a param group, in new pinned memory that holds the params' values.

    A chunk has at most `most_bytes` of params, unless it is a single one. Frozen params take no memory.
    """
    entries = [_new_entry(param, accumulates) for param in params]
    trained = [entry for entry in entries if entry.param.requires_grad]
    give_memory(trained, device)
    for entry in trained:
        dtensor.local(entry.host.detach()).copy_(dtensor.local(entry.param.detach()))
        entry.known = entry.which()
    chunks: list[Chunk] = []
    size = 0
    for i, entry in enumerate(entries):
        own = 0 if entry.sent is None else entry.sent.numel() * entry.sent.element_size()
        if not chunks or (size and own and size + own > most_bytes):
            chunks.append(Chunk(group_index, i, []))
            size = 0
        chunks[-1].entries.append(entry)
        size += own
    return chunks


def give_memory(entries: Sequence[Entry], device: Device) -> None:
    """Gives params pinned memory for their copies and grads."""
    held = [dtensor.local(entry.param.detach()) for entry in entries]
    memory = pinned_like([*held, *held], device)
    for entry, host, sent in zip(entries, memory, memory[len(entries) :], strict=False):
        entry.give_memory(host, sent)


def group_on_host(group: Mapping[str, Any], chunks: list[Chunk]) -> dict[str, Any]:
    """The group of the inner optimizer, whose params are copies on the host."""
    hosts = [entry.host for chunk in chunks for entry in chunk.entries]
    pairs = zip(group["params"], hosts, strict=True)
    return {**group, "params": [(one[0], host) if isinstance(one, tuple) else host for one, host in pairs]}


def _new_entry(param: Tensor, accumulates: bool) -> Entry:
    """An entry without memory: its host param has one element, which stands for all."""
    held = dtensor.local(param.detach())
    dtype = held.dtype if held.dtype.is_floating_point else torch.float32  # others are never updated
    nothing = torch.zeros((), dtype=dtype, device="cpu").expand(held.shape)
    return Entry(param, Parameter(dtensor.like_param_placed(nothing, param), param.requires_grad), accumulates)


def _add(add: Add, device: Device, arrival: Any, total: Tensor, sent: Tensor, is_first: bool) -> None:
    """Adds a grad to the sum of others, once it has arrived."""
    device.synchronize(arrival)
    if total.dtype == torch.float32:
        add(total, sent, is_first)
    else:
        total.add_(sent)

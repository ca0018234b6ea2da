"""The interface of a backend, which updates the tensors of one device, by a compiled op or in pure PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch import Batch
from ..memory import count_writes
from ..step_settings import StepSettings


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Update:
    """An update that a backend has prepared: everything that can fail is done, and nothing has been written yet.

    Attributes
    ----------
    run
        Updates params, states and step counts in place.
    borrowed
        Returns the tensors that run() reads or writes. Their memory must stay valid until run() has returned.
    written
        The tensors that run() writes and that autograd must be told about first. The op tells it about any others.
    table
        The op's table, for backends that have one.
    call
        The arguments of the CPU op for this update, so that one call can run several updates.
    count_writes
        Tells autograd now what the op would tell it when it runs; None if the op tells it nothing.
    on_cpu
        Whether run() returns only when everything is done, and may be called from another thread.
    """

    run: Callable[[], None]
    borrowed: Callable[[], Sequence[Tensor]]
    written: Sequence[Tensor] = ()
    table: Any = None
    call: tuple[Any, ...] | None = None
    on_cpu: bool = True
    count_writes: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.written:
            count_writes(self.written)
        self.run()


class Backend(Protocol):
    """Updates params of one device by one rule. An optimizer has one for each device that its params are on."""

    name: str
    writes_copies: bool  # whether it takes batches with lowp_outs

    def skips(self, settings: StepSettings) -> bool:
        """Whether to skip the step, because torch.amp.GradScaler found infs or NaNs in the grads.

        False if the device checks that itself, within the step.
        """

    def prepare_group(
        self, where: str, settings: StepSettings, params: list[Tensor], states: dict[Any, Any]
    ) -> Update | None:
        """The update of those params that have a grad, and of their states.

        This is the fast path for the usual case, which looks up and checks everything in one pass in C++. None if a
        tensor is not eligible for it or is on another device, or if a state is missing. prepare() then does the work,
        or names the offending parameter.
        """

    def prepare(self, batch: Batch) -> Update:
        """Like prepare_group(), for any batch on this device. Raises what the checks of batch.py raise."""

    def run_all(self, updates: Sequence[Update]) -> None:
        """Runs updates of this backend, one after another."""

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> float | Tensor | None:
        """The norm of all elements of grads on this device; None if torch is to compute it.

        It is a 0-dim float64 tensor on the device if only the device knows the value yet. Raises what check_readable()
        of memory.py raises.
        """

    def add_grad(self, total: Tensor, grad: Tensor, is_first: bool, threads: int | None) -> None:
        """Adds a dense grad to a sum in float32 with the same memory layout, or begins a sum with it."""

    def adds_in_step(self, update: Update, totals: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """What GroupStep.adds_to_grads() does, for an update that this backend has prepared."""

    def samples(self, grads: Sequence[Tensor]) -> list[bytes | None]:
        """For each grad, some of its elements; None for one that cannot be read without waiting for a device."""

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors with the params' memory layout."""

    def new_step_count(self, settings: StepSettings, count: int = 0) -> int | Tensor:
        """A step count as this backend keeps it in a param's state: a number, or a tensor on the param's device."""

"""What a backend is: the one that updates the tensors of a device, by a compiled op or in pure PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import AdamBatch
from .hyper import AdamHyper
from .memory import count_writes


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Update:
    """What a backend has prepared: whatever can fail has been done, and nothing has been written yet.

    Attributes
    ----------
    run
        Updates params and states in place, step counts too.
    borrowed
        The tensors that run() reads or writes, whose memory must be there until it has returned.
    written
        Those that it writes and of which autograd is to be told before; of others the op tells autograd.
    table
        The op's table, of backends that have one.
    call
        The arguments of the CPU op's `adam_steps` for this update, which then can go with others in one call.
    on_host
        Whether run() returns when all is done, and may be called from another thread.
    """

    run: Callable[[], None]
    borrowed: Callable[[], Sequence[Tensor]]
    written: Sequence[Tensor] = ()
    table: Any = None
    call: tuple[Any, ...] | None = None
    on_host: bool = True

    def __call__(self) -> None:
        if self.written:
            count_writes(self.written)
        self.run()


class Backend(Protocol):
    """Updates params of one device. An optimizer has one for each device that its params are on."""

    name: str
    writes_copies: bool  # whether a step takes batches with lowp_outs

    def skips(self, hyper: AdamHyper) -> bool:
        """Whether the step is to be left out, as torch.amp.GradScaler found infs or NaNs in the grads.

        False where that is found out on the device, in the step itself.
        """

    def prepare_group(
        self, where: str, hyper: AdamHyper, params: list[Tensor], states: dict[Any, Any]
    ) -> Update | None:
        """The update of those of the params that have a grad, and of their states.

        This is the usual case, looked up and checked in one pass in C++: None if a tensor is not eligible for this fast
        path or on another device, or a state is missing; prepare() then does it, or says what is wrong.
        """

    def prepare(self, batch: AdamBatch) -> Update:
        """As prepare_group() for a batch of any kind, all on this device. Raises what the checks of batch.py raise."""

    def run_all(self, updates: Sequence[Update]) -> None:
        """Runs updates of this backend, one after another."""

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> float | Tensor | None:
        """The norm of all elements of dense grads on this device; None if that is for torch to compute.

        A 0-dim float64 tensor on the device where only the device knows it yet.
        """

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params."""

    def new_step_count(self, hyper: AdamHyper, count: int = 0) -> int | Tensor:
        """A step count as this backend keeps it in the state of a param, beside the param or as a number."""

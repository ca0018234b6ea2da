"""What a backend is: the one that updates the tensors of a device, by a compiled op or by torch calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import AdamBatch
from .hyper import AdamHyper


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
    ) -> Callable[[], None] | None:
        """What updates those of the params that have a grad, and their states, in place when called; step counts too.

        This is the usual case, looked up and checked in one pass in C++: None if a tensor is out of the ordinary or on
        another device, or a state is missing; prepare() then does it, or says what is wrong. Nothing is written until
        the call.
        """

    def prepare(self, batch: AdamBatch) -> Callable[[], None]:
        """As prepare_group() for a batch of any kind, all on this device. Raises what the checks of batch.py raise."""

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> float | Tensor | None:
        """The norm of all elements of dense grads on this device; None if that is for torch to compute.

        A 0-dim float64 tensor on the device where only the device knows it yet.
        """

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params."""

    def new_step_count(self, hyper: AdamHyper, count: int = 0) -> int | Tensor:
        """A step count as this backend keeps it in the state of a param, beside the param or as a number."""

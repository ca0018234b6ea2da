"""The last resort: the same update by torch calls, a tensor at a time. Slow, and without the promise of equal bits.

This is the module that the op "torch_adam" loads; it stands in where cpu_adam cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import AdamBatch, check_params_and_grads, check_states
from .hyper import AdamHyper


class TorchBackend:
    """Adam by torch calls."""

    name = "torch_adam"

    def skips(self, hyper: AdamHyper) -> bool:
        return hyper.overflowed

    def new_step_count(self, hyper: AdamHyper, count: int = 0) -> int:
        return count

    def prepare_group(self, where: str, hyper: AdamHyper, params: list[Tensor], states: Any) -> None:
        """None: there is no quick way here; prepare() does it."""

    def prepare(self, batch: AdamBatch) -> Callable[[], None]:
        """Checks the batch, and returns what updates its params and states in place when called."""
        check_params_and_grads(batch)
        check_states(batch)
        return lambda: self._step(batch)

    def _step(self, batch: AdamBatch) -> None:
        masters = batch.masters
        for i, step in enumerate(batch.steps):
            state, master = batch.states[i], masters[i]
            _adam_update(
                batch.params[i] if master is None else master,
                batch.grads[i],
                state["exp_avg"],
                state["exp_avg_sq"],
                state["max_exp_avg_sq"] if batch.hyper.amsgrad else None,
                batch.hyper.scalars(step),
                batch.hyper.l2,
            )
            if master is not None:
                batch.params[i].copy_(master)
        batch.count_step()

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params."""
        return [torch.zeros_like(param, dtype=dtype) for param, dtype in zip(params, dtypes, strict=True)]


def _adam_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scalars: tuple[float, ...],
    l2: bool,
) -> None:
    """adam_update() of csrc/adam/adam_update.h in torch calls; float32 inside, whatever the tensors hold."""
    (
        scale,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        negative_step_size,
        inverse_sqrt_bias2,
        eps,
        decay,
        l2_decay,
    ) = scalars
    p, g, m, v = param.float(), grad.float() * scale, exp_avg.float(), exp_avg_sq.float()
    if l2:
        g = g + l2_decay * p
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    largest_v = v
    if max_exp_avg_sq is not None:
        largest_v = torch.maximum(max_exp_avg_sq.float(), v)
        max_exp_avg_sq.copy_(largest_v)
    denominator = largest_v.sqrt() * inverse_sqrt_bias2 + eps
    param.copy_(p * decay + negative_step_size * (m / denominator))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)

"""The last resort: the same update in pure PyTorch, a tensor at a time. Slow, and not guaranteed to be bit-identical.

This is the module that the op "torch_adam" loads, the fallback where cpu_adam is not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import AdamBatch, check_params_and_grads, check_states
from ..hyper import AdamHyper, AdamScalars
from ..memory import check_writable
from ..state import remainders
from ..state.average_rounding import store_average
from ..state.precision import Master, averages_of
from ..state.quantized_states import dequantized_states, is_quantized, store_quantized
from .base import Update


class TorchBackend:
    """Adam in pure PyTorch."""

    name = "torch_adam"
    writes_copies = False

    def skips(self, hyper: AdamHyper) -> bool:
        return hyper.overflowed

    def new_step_count(self, hyper: AdamHyper, count: int = 0) -> int:
        return count

    def prepare_group(self, where: str, hyper: AdamHyper, params: list[Tensor], states: Any) -> None:
        """Returns None: there is no fast path here, so prepare() is called."""

    def prepare(self, batch: AdamBatch) -> Update:
        """Checks the batch and returns the update of its params and states."""
        if batch.hyper.precision.stochastic_rounding:
            raise NotImplementedError(
                "stochastic_rounding needs the compiled CPU op; python -m adamops.report says why it is not there"
            )
        check_params_and_grads(batch)
        check_states(batch)
        for tensor in batch.written():
            check_writable(tensor, "what a step is to write")
        steps = batch.steps
        return Update(lambda: self._step(batch, steps), batch.borrowed)

    def run_all(self, updates: Sequence[Update]) -> None:
        """Runs updates, one after another."""
        for update in updates:
            update()

    def _step(self, batch: AdamBatch, steps: list[int]) -> None:
        hyper = batch.hyper
        names = averages_of(hyper.amsgrad)
        for i, step in enumerate(steps):
            param, grad, state = batch.params[i], batch.grads[i], batch.states[i]
            kind, quantized = hyper.precision.master_of(param), is_quantized(state)
            master = param if kind is Master.NONE else _master(param, state, kind)
            averages = dequantized_states(state, names) if quantized else {name: state[name] for name in names}
            _adam_update(master, grad, averages, hyper.scalars(step), hyper.l2, step)
            if quantized:
                store_quantized(state, averages, step)
            if kind is Master.FP32:
                param.copy_(master)
            elif kind is not Master.NONE:
                upper, remainder = remainders.split(master, param.dtype, kind.dtype)
                param.copy_(upper)
                state[kind.key].copy_(remainder)
        if hyper.zero_grads:  # after all are read, as they may share memory
            for grad in batch.grads:
                grad.zero_()
        batch.count_step(steps)

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> None:
        """Returns None: torch computes the norm."""

    def samples(self, grads: Sequence[Tensor]) -> list[bytes | None]:
        """None for each grad: an element read by torch would cost as much as a small grad's whole step."""
        return [None] * len(grads)

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params."""
        return [torch.zeros_like(param, dtype=dtype) for param, dtype in zip(params, dtypes, strict=True)]


def _master(param: Tensor, state: dict[str, Any], kind: Master) -> Tensor:
    return state[kind.key] if kind is Master.FP32 else remainders.join(param, state[kind.key])


def _adam_update(
    param: Tensor,
    grad: Tensor,
    averages: dict[str, Tensor],
    k: AdamScalars,
    l2: bool,
    step: int,
) -> None:
    """adam_update() of csrc/rules/adam_update.h in pure PyTorch, computed in float32 for every dtype."""
    p, g = param.float(), grad.float() * k.grad_scale
    new = {name: average.float() for name, average in averages.items()}
    if l2:
        g = g + k.l2 * p
    new["exp_avg"] = k.beta1 * new["exp_avg"] + k.one_minus_beta1 * g
    new["exp_avg_sq"] = largest_v = k.beta2 * new["exp_avg_sq"] + k.one_minus_beta2 * g * g
    if "max_exp_avg_sq" in new:
        new["max_exp_avg_sq"] = largest_v = torch.maximum(new["max_exp_avg_sq"], largest_v)
    denominator = largest_v.sqrt() * k.inverse_sqrt_bias2 + k.eps
    param.copy_(p * k.decay + k.negative_step_size * (new["exp_avg"] / denominator))
    for name, value in new.items():
        store_average(averages[name], name, value, step)

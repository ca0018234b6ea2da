"""The last resort: any rule's update in pure PyTorch, a tensor at a time. Slow, and not guaranteed to be bit-identical.

This is the module that the op "torch_adam" loads, the fallback where no op is available.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, check_params_and_grads, check_states
from ..layout import add_in_pieces
from ..memory import check_writable
from ..state import remainders
from ..state.average_rounding import store_rounded
from ..state.precision import Master
from ..state.quantized_states import dequantized_states, is_quantized, store_quantized
from ..step_settings import StepSettings
from .base import Update


class TorchBackend:
    """Updates in pure PyTorch, by Rule.update()."""

    name = "torch_adam"
    writes_copies = False

    def skips(self, settings: StepSettings) -> bool:
        return settings.overflowed

    def new_step_count(self, settings: StepSettings, count: int = 0) -> int:
        return count

    def prepare_group(self, where: str, settings: StepSettings, params: list[Tensor], states: Any) -> None:
        """Returns None: there is no fast path here, so prepare() is called."""

    def prepare(self, batch: Batch) -> Update:
        """Checks the batch and returns the update of its params and states."""
        if batch.settings.precision.stochastic_rounding:
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

    def _step(self, batch: Batch, steps: list[int]) -> None:
        settings = batch.settings
        rule, states, grad_scale = settings.rule, settings.states, settings.grad_scale()
        for i, step in enumerate(steps):
            param, grad, held = batch.params[i], batch.grads[i], batch.states[i]
            kind, quantized = settings.precision.master_of(param), is_quantized(held, states)
            master = param if kind is Master.NONE else _master(param, held, kind)
            if quantized:
                values = dequantized_states(held, states)
            else:
                values = {state.name: held[state.name].float() for state in states}
            k = rule.scalars(settings.numbers(), step)
            master.copy_(rule.update(k, master.float(), grad.float() * grad_scale, values))
            if quantized:
                store_quantized(held, values, states, step)
            else:
                for state in states:
                    store_rounded(held[state.name], state, values[state.name], step)
            if kind is Master.FP32:
                param.copy_(master)
            elif kind is not Master.NONE:
                upper, remainder = remainders.split(master, param.dtype, kind.dtype)
                param.copy_(upper)
                held[kind.key].copy_(remainder)
        if settings.zero_grads:  # after all are read, as they may share memory
            for grad in batch.grads:
                grad.zero_()
        batch.count_step(steps)

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> None:
        """Returns None: torch computes the norm."""

    def add_grad(self, total: Tensor, grad: Tensor, is_first: bool, threads: int | None) -> None:
        add_in_pieces(total, grad, is_first)

    def adds_in_step(self, update: Update, totals: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Returns False: sums are formed before the step."""
        return False

    def samples(self, grads: Sequence[Tensor]) -> list[bytes | None]:
        """None for each grad: an element read by torch would cost as much as a small grad's whole step."""
        return [None] * len(grads)

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params."""
        return [torch.zeros_like(param, dtype=dtype) for param, dtype in zip(params, dtypes, strict=True)]


def _master(param: Tensor, state: dict[str, Any], kind: Master) -> Tensor:
    return state[kind.key] if kind is Master.FP32 else remainders.join(param, state[kind.key])

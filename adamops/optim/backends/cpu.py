"""Passes params on the CPU to the compiled CPU op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...threads import get_num_threads
from ..memory import PLAIN_TYPES, addresses, count_writes
from ..step_settings import StepSettings
from .base import Update
from .table import Columns, TableBackend


def _empty_like(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """New tensors with the params' memory layout.

    All tensors are created before any gets memory for its elements. The small objects that torch keeps for each then
    lie together, not scattered between the large allocations, and a step over 1000 small params touches far fewer pages
    (docs/dev/decisions.md).
    """
    plain = [type(param) in PLAIN_TYPES and param.is_contiguous() and param.device.type == "cpu" for param in params]
    tensors = [
        torch.empty(0, dtype=dtype, device="cpu") if is_plain else torch.empty_like(param, dtype=dtype)
        for param, dtype, is_plain in zip(params, dtypes, plain, strict=True)
    ]
    for tensor, param, is_plain in zip(tensors, params, plain, strict=True):
        if is_plain:
            tensor.resize_(param.shape)
    return tensors


class StepCall(NamedTuple):
    """What the op takes for the step of a table, in the order of its STEP_FIELDS."""

    table: Any
    hyper: tuple[float, ...]  # the numbers that the op's HYPER names
    loss_scale: float
    grad_factor: float
    maximize: bool
    zero_grads: bool
    stochastic_rounding: bool
    threads: int


class NativeBackend(TableBackend):
    """Updates by a CPU op, on torch's threads: one parallel region per param group, no GIL held."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, torch.device("cpu"))

    def skips(self, settings: StepSettings) -> bool:
        return settings.overflowed

    def new_step_count(self, settings: StepSettings, count: int = 0) -> int:
        return count

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors with the params' memory layout. The thread that will update a page touches it first."""
        tensors = _empty_like(params, dtypes)
        for dtype in dict.fromkeys(dtypes):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            numels = list(map(Tensor.numel, chosen))
            columns = self._columns_of_plain(chosen)
            begins = columns[0] if columns else addresses(chosen, "a new state")
            self.module.zero_fill(begins, numels, dtype.itemsize, get_num_threads())
        return tensors

    def _counts_fit(self, table: Any, settings: StepSettings) -> bool:
        return not table.counts_on_device

    def run_all(self, updates: Sequence[Update]) -> None:
        """Runs updates that have a `call` in one call of the op, so that no signal handler can run between them."""
        for update in updates:
            if update.written:
                count_writes(update.written)
        self._run([update.call for update in updates])

    def _call(self, table: Any, settings: StepSettings) -> StepCall:
        return StepCall(
            table,
            settings.numbers(),
            float(settings.loss_scale),
            float(settings.grad_factor),
            settings.maximize,
            settings.zero_grads,
            settings.precision.stochastic_rounding,
            settings.threads or get_num_threads(),
        )

    def _runner(self, table: Any, settings: StepSettings, call: tuple[Any, ...] | None) -> Callable[[], None]:
        return lambda: self._run([call])

    def _run(self, calls: list[Any]) -> None:
        self.module.steps(calls)

    def samples(self, grads: Sequence[Tensor]) -> list[bytes | None]:
        if self._reader is None:
            return super().samples(grads)
        return self.module.samples_of(self._reader, list(grads))

    def add_grad(self, total: Tensor, grad: Tensor, is_first: bool, threads: int | None) -> None:
        code = self._dtype_codes[grad.dtype]
        self.module.add_grad(
            *addresses([total, grad], "a grad"), grad.numel(), code, is_first, threads or get_num_threads()
        )
        count_writes([total])

    def adds_in_step(self, update: Update, totals: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        codes = [self._dtype_codes[grad.dtype] for grad in grads]
        return update.table.add_to_grads(addresses(totals, "a grad"), addresses(grads, "a grad"), codes)

    def _norm_of(self, columns: Columns, norm_type: float) -> float:
        return self.module.grad_norm(*columns, norm_type, get_num_threads())

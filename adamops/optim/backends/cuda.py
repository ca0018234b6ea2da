"""Passes params on a CUDA device to the compiled CUDA op, on torch's current stream, without waiting for the device.

Normally step counts are numbers, and the scalars of a step are computed on the CPU. If the scalars depend on something
that only the device knows, the step counts are kept on the device and the scalars are computed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..memory import addresses
from ..step_settings import StepSettings
from .base import Update
from .table import Columns, TableBackend, replace_unused_scales, restore_unused_scales


class CudaBackend(TableBackend):
    """Updates by a CUDA op."""

    on_cpu = False  # the step is only enqueued, and must be on the calling thread's stream

    def skips(self, settings: StepSettings) -> bool:
        return False  # the kernels check found_inf themselves

    def _norm_of(self, columns: Columns, norm_type: float) -> Tensor:
        _, numels, _ = columns
        chunks = sum(-(-numel // self.module.NORM_CHUNK) for numel in numels)
        partial = torch.empty(chunks + 1, dtype=torch.float64, device=self.device)
        (begin,) = addresses([partial], "what the norm needs on the device")
        place = {"partial": begin, "total": begin + 8 * chunks, **self._place()}
        with self._as_current_device():
            self.module.grad_norm(*columns, norm_type, **place)
        return partial[chunks]

    def new_step_count(self, settings: StepSettings, count: int = 0) -> int | Tensor:
        return self._device_count(count) if self._needs_device_counts(settings) else count

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        self._refuse_while_capturing("it would make its states anew at each replay; do one step before")
        return [torch.zeros_like(param, dtype=dtype) for param, dtype in zip(params, dtypes, strict=True)]

    def _prepare_checked(self, batch: Batch) -> Update:
        if not self._needs_device_counts(batch.settings) and all(isinstance(s["step"], int) for s in batch.states):
            return super()._prepare_checked(batch)
        counts = [self._device_count(state["step"]) for state in batch.states]
        spare = replace_unused_scales(batch)
        table = self._table_of_batch(batch, addresses(counts), counts_on_device=True)
        launch = self._runner(table, batch.settings, None)

        def run() -> None:
            for state, count in zip(batch.counted_states, counts, strict=True):
                state["step"] = count
            launch()
            restore_unused_scales(spare)

        written = [*batch.written(), *counts]
        return Update(run, lambda: [*batch.borrowed(), *counts], written, table, on_cpu=False)

    def _runner(self, table: Any, settings: StepSettings, call: tuple[Any, ...] | None) -> Callable[[], None]:
        """The function that enqueues a step. All tensors that it needs are made now, because that can fail."""
        if not len(table):
            return lambda: None
        with self._as_current_device():
            launch = (
                self._by_device_counts(table, settings) if table.counts_on_device else self._by_host_counts(settings)
            )

        def run() -> None:
            with self._as_current_device():
                launch(table)

        return run

    def _update_of_params(self, table: Any, settings: StepSettings) -> Update:
        launch = self._runner(table, settings, None)

        def run() -> None:
            table.count_writes(settings.zero_grads)
            launch()

        return Update(run, lambda: table.borrowed, (), table, on_cpu=False)

    def _counts_fit(self, table: Any, settings: StepSettings) -> bool:
        return table.counts_on_device or len(table) == 0 or not self._needs_device_counts(settings)

    def _needs_device_counts(self, settings: StepSettings) -> bool:
        """Whether the step is to be captured, or depends on what only the device knows."""
        unknown = any(self._is_on_device(value) for value in (settings.lr, settings.loss_scale, settings.grad_factor))
        return settings.capturable or settings.found_inf is not None or unknown

    def _is_on_device(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device.type

    def _device_count(self, step: int | Tensor) -> Tensor:
        """A step count as a 0-dim float32 tensor on the device; it may be `step` itself."""
        if isinstance(step, Tensor):
            return step.detach().to(device=self.device, dtype=torch.float32).reshape(())
        self._refuse_while_capturing("it would set the step count anew at each replay; do one step before")
        return torch.full((), float(step), dtype=torch.float32, device=self.device)

    def _by_host_counts(self, settings: StepSettings) -> Callable[[Any], None]:
        self._refuse_while_capturing("its step counts are on the host; construct the optimizer with capturable=True")
        numbers = settings.numbers()
        return lambda table: self._enqueue(table, settings, numbers, device_scalars=0, found_inf=0)

    def _enqueue(self, table: Any, settings: StepSettings, numbers: Sequence[float], **on_device: int) -> None:
        """Enqueues a step. Factors that only the device knows are among the scalars there."""
        here = not on_device["device_scalars"]
        self.module.step(
            table,
            numbers,
            loss_scale=float(settings.loss_scale) if here else 1.0,
            grad_factor=float(settings.grad_factor) if here else 1.0,
            maximize=settings.maximize,
            zero_grads=settings.zero_grads,
            stochastic_rounding=settings.precision.stochastic_rounding,
            **on_device,
            **self._place(),
        )

    def _place(self) -> dict[str, int]:
        """Where the op runs: the device, and torch's current stream on it."""
        return {"device": self.device.index or 0, "stream": self._stream()}

    def _by_device_counts(self, table: Any, settings: StepSettings) -> Callable[[Any], None]:
        # Tensors made here may go out of scope before the kernels run: torch reuses memory in stream order.
        scalars = torch.empty(len(table) * self.module.SCALARS_SIZE, dtype=torch.uint8, device=self.device)
        lr = self._on_device(settings.lr, _lr_dtype(settings.lr)) if self._is_on_device(settings.lr) else None
        loss_scale = self._on_device(settings.loss_scale, torch.float32) if _is_not_1(settings.loss_scale) else None
        grad_factor = self._on_device(settings.grad_factor, torch.float64) if _is_not_1(settings.grad_factor) else None
        found_inf = None if settings.found_inf is None else self._on_device(settings.found_inf, torch.float32)
        there = addresses([scalars, lr, loss_scale, grad_factor, found_inf], "what a step needs on the device")
        scalars_there, lr_there, loss_scale_there, grad_factor_there, found_inf_there = there

        numbers = settings.numbers() if lr is None else (0.0, *settings.hyper[1:])

        def launch(table: Any, _kept: object = (scalars, lr, loss_scale, grad_factor, found_inf)) -> None:
            self.module.count_steps(
                table,
                scalars=scalars_there,
                hyper=numbers,
                maximize=settings.maximize,
                lr32=lr_there if lr is not None and lr.dtype == torch.float32 else 0,
                lr64=lr_there if lr is not None and lr.dtype == torch.float64 else 0,
                loss_scale=loss_scale_there,
                grad_factor=grad_factor_there,
                found_inf=found_inf_there,
                **self._place(),
            )
            self._enqueue(table, settings, numbers, device_scalars=scalars_there, found_inf=found_inf_there)

        return launch

    def _on_device(self, value: Any, dtype: torch.dtype) -> Tensor:
        """A number or a 0-dim tensor as a tensor that kernels on this device can read."""
        if isinstance(value, Tensor):
            return value.detach().to(device=self.device, dtype=dtype, non_blocking=True)
        return torch.full((), float(value), dtype=dtype, device=self.device)

    def _stream(self) -> int:
        """The address of torch's current stream on the device."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def _as_current_device(self) -> AbstractContextManager[Any]:
        """Makes the device torch's current one; it is then current for the op's own CUDA runtime, too."""
        return torch.cuda.device(self.device)

    def _capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def _refuse_while_capturing(self, why: str) -> None:
        if self._capturing():
            raise RuntimeError(f"This step cannot be captured into a CUDA graph: {why}")


def _is_not_1(value: Any) -> bool:
    """Whether a factor matters. Any tensor is taken to: reading its value would wait for the device."""
    return isinstance(value, Tensor) or float(value) != 1


def _lr_dtype(lr: Any) -> torch.dtype:
    return lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float64

"""Hands params in host memory to the compiled CPU op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .hyper import AdamHyper
from .sharding import PLAIN_TYPES
from .table_backend import TableBackend, addresses, columns_of_grads, has_norm


def _empty_like(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """New tensors laid out like the params.

    All are made before any gets memory for its elements, so that what torch keeps of each lies together, not one small
    piece between each two large ones: a step over 1000 small params then touches far fewer pages
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


class NativeBackend(TableBackend):
    """Adam by the extension module cpu_adam, on torch's threads, in one parallel region a step, without the GIL."""

    name = "cpu_adam"

    def __init__(self, module: Any) -> None:
        super().__init__(module, torch.device("cpu"))

    def skips(self, hyper: AdamHyper) -> bool:
        return hyper.overflowed

    def new_step_count(self, hyper: AdamHyper, count: int = 0) -> int:
        return count

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params, each page first touched by the thread that will update it."""
        tensors = _empty_like(params, dtypes)
        for dtype in dict.fromkeys(dtypes):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            numels = list(map(Tensor.numel, chosen))
            self.module.zero_fill(addresses(chosen), numels, dtype.itemsize, torch.get_num_threads())
        return tensors

    def _counts_fit(self, table: Any, hyper: AdamHyper) -> bool:
        return not table.counts_on_device

    def _step(self, table: Any, hyper: AdamHyper) -> None:
        self.module.adam_step(
            table,
            hyper.numbers(),
            hyper.l2,
            hyper.threads or torch.get_num_threads(),
            zero_grads=hyper.zero_grads,
            stochastic_rounding=hyper.precision.stochastic_rounding,
        )

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> float | None:
        if not has_norm(grads, norm_type):
            return None
        return self.module.grad_norm(*columns_of_grads(grads), norm_type, torch.get_num_threads())

"""Hands batches to the compiled CPU op: turns lists of tensors into a table of addresses.

The op trusts what it is given, so every tensor is checked on the way: plain ones by the op's own reader, all others by
batch.py, which also words the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .batch import DTYPES, AdamBatch, check_params_and_grads, check_states

_dtype = attrgetter("dtype")
_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}  # enum Dtype in csrc/adam/cpu_adam_kernel.h


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


class NativeBackend:
    """Adam by the extension module cpu_adam."""

    name = "cpu_adam"

    def __init__(self, module: Any) -> None:
        self.module = module
        capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
        self._reader = module.TensorReader(capsule, (Parameter, Tensor)) if capsule is not None else None

    def prepare(self, batch: AdamBatch) -> Callable[[], None]:
        """Checks the batch, and returns what updates its params and states in place when called.

        The call runs on torch's threads, in one parallel region, without the GIL. Raises what the checks of batch.py
        raise; nothing is written until the call.
        """
        table = self._table_of_plain_tensors(batch)
        if table is None:
            check_params_and_grads(batch)
            check_states(batch)
            table = self._table_of_addresses(batch)
        distinct_steps = {step: row for row, step in enumerate(dict.fromkeys(batch.steps))}
        rows = list(map(distinct_steps.__getitem__, batch.steps))
        scalars = [batch.hyper.scalars(step) for step in distinct_steps]
        return lambda: self.module.adam_step(table, rows, scalars, batch.hyper.l2, torch.get_num_threads())

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params, each page first touched by the thread that will update it."""
        tensors = [torch.empty_like(param, dtype=dtype) for param, dtype in zip(params, dtypes, strict=True)]
        for dtype in dict.fromkeys(dtypes):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            numels = list(map(Tensor.numel, chosen))
            self.module.zero_fill(_addresses(chosen), numels, dtype.itemsize, torch.get_num_threads())
        return tensors

    def _table_of_plain_tensors(self, batch: AdamBatch) -> Any:
        """The usual case, checked and packed in one pass in C++; None if any tensor is out of the ordinary."""
        if self._reader is None:
            return None
        return self.module.table_of_tensors(
            self._reader, batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.max_exp_avg_sqs
        )

    def _table_of_addresses(self, batch: AdamBatch) -> Any:
        columns = [list(map(_dtype, tensors)) for tensors in (batch.params, batch.grads, batch.exp_avgs)]
        combinations = list(zip(*columns, strict=True))
        codes = {c: _CODE[c[0]] + 3 * _CODE[c[1]] + 9 * _CODE[c[2]] for c in set(combinations)}
        return self.module.table_of_addresses(
            params=_addresses(batch.params),
            grads=_addresses(batch.grads),
            exp_avgs=_addresses(batch.exp_avgs),
            exp_avg_sqs=_addresses(batch.exp_avg_sqs),
            max_exp_avg_sqs=None if batch.max_exp_avg_sqs is None else _addresses(batch.max_exp_avg_sqs),
            numels=list(map(Tensor.numel, batch.params)),
            dtypes=[codes[combination] for combination in combinations],
        )

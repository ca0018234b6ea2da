"""Hands param groups and batches to the compiled CPU op, as tables of addresses.

The op's kernels trust what they are given, so every tensor is checked on the way: plain ones by the op's own reader,
all others by batch.py, which also words the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .batch import DTYPES, AdamBatch, check_params_and_grads, check_states
from .hyper import AdamHyper

_dtype = attrgetter("dtype")
_PLAIN_TYPES = (Parameter, Tensor)  # subclasses may keep their data elsewhere
_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}  # enum Dtype in csrc/dtype.h


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _empty_like(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """New tensors laid out like the params.

    All are made before any gets memory for its elements, so that what torch keeps of each lies together, not one small
    piece between each two large ones: a step over 1000 small params then touches far fewer pages
    (docs/dev/decisions.md).
    """
    plain = [type(param) in _PLAIN_TYPES and param.is_contiguous() and param.device.type == "cpu" for param in params]
    tensors = [
        torch.empty(0, dtype=dtype, device="cpu") if is_plain else torch.empty_like(param, dtype=dtype)
        for param, dtype, is_plain in zip(params, dtypes, plain, strict=True)
    ]
    for tensor, param, is_plain in zip(tensors, params, plain, strict=True):
        if is_plain:
            tensor.resize_(param.shape)
    return tensors


class NativeBackend:
    """Adam by the extension module cpu_adam."""

    name = "cpu_adam"

    def __init__(self, module: Any) -> None:
        self.module = module
        capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
        self._reader = module.TensorReader(capsule, _PLAIN_TYPES) if capsule is not None else None
        self._first_states: dict[str, int] = {}  # by group: where the next step finds its states without search

    def prepare_group(
        self, where: str, hyper: AdamHyper, params: list[Tensor], states: dict[Any, Any]
    ) -> Callable[[], None] | None:
        """What updates those of the params that have a grad, and their states, in place when called; step counts too.

        This is the usual case, looked up and checked in one pass in C++: None if a tensor is out of the ordinary or a
        state missing; prepare() then does it, or says what is wrong. Nothing is written until the call, which runs on
        torch's threads, in one parallel region, without the GIL.
        """
        table = self._table_of_params(hyper, params, states, self._first_states.get(where, 0))
        if table is None:
            return None

        self._first_states[where] = table.first_state
        return lambda: self._step(table, hyper)

    def prepare(self, batch: AdamBatch) -> Callable[[], None]:
        """As prepare_group() for a batch of any kind. Raises what the checks of batch.py raise."""
        states = dict(zip(batch.params, batch.states, strict=True))
        table = self._table_of_params(batch.hyper, batch.params, states)
        if table is not None:
            return lambda: self._step(table, batch.hyper)
        check_params_and_grads(batch)
        check_states(batch)
        table = self._table_of_addresses(batch)

        def update() -> None:
            self._step(table, batch.hyper)
            batch.count_step()

        return update

    def _step(self, table: Any, hyper: AdamHyper) -> None:
        scalars = [hyper.scalars(step) for step in table.steps]
        self.module.adam_step(table, scalars, hyper.l2, torch.get_num_threads())

    def zeros_like(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """New zero tensors laid out like the params, each page first touched by the thread that will update it."""
        tensors = _empty_like(params, dtypes)
        for dtype in dict.fromkeys(dtypes):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            numels = list(map(Tensor.numel, chosen))
            self.module.zero_fill(_addresses(chosen), numels, dtype.itemsize, torch.get_num_threads())
        return tensors

    def _table_of_params(
        self, hyper: AdamHyper, params: list[Tensor], states: dict[Any, Any], first_state: int = 0
    ) -> Any:
        if self._reader is None:
            return None
        return self.module.table_of_params(self._reader, params, states, hyper.amsgrad, first_state)

    def _table_of_addresses(self, batch: AdamBatch) -> Any:
        exp_avgs = batch.column("exp_avg")
        columns = [list(map(_dtype, tensors)) for tensors in (batch.params, batch.grads, exp_avgs)]
        combinations = list(zip(*columns, strict=True))
        codes = {c: _CODE[c[0]] + 3 * _CODE[c[1]] + 9 * _CODE[c[2]] for c in set(combinations)}
        return self.module.table_of_addresses(
            params=_addresses(batch.params),
            grads=_addresses(batch.grads),
            exp_avgs=_addresses(exp_avgs),
            exp_avg_sqs=_addresses(batch.column("exp_avg_sq")),
            max_exp_avg_sqs=_addresses(batch.column("max_exp_avg_sq")) if batch.hyper.amsgrad else None,
            numels=list(map(Tensor.numel, batch.params)),
            dtypes=[codes[combination] for combination in combinations],
            steps=batch.steps,
        )

"""What the backends of the compiled ops share: they hand over params, grads and states as tables of addresses.

The ops' kernels trust what they are given, so every tensor is checked on the way: plain ones by the op's own reader,
all others by batch.py, which also words the errors.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .batch import AdamBatch, check_params_and_grads, check_states
from .hyper import AdamHyper
from .precision import DTYPES, Master
from .sharding import PLAIN_TYPES, dtensor_class

_CODE = {dtype: code for code, dtype in enumerate((*DTYPES, torch.int8))}  # enum Dtype in csrc/dtype.h; codes last
_DLPACK_DEVICE_TYPE = {"cpu": 1, "cuda": 2}
_dtype = attrgetter("dtype")


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors' elements begin; 0 for none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def has_norm(grads: Sequence[Tensor], norm_type: float) -> bool:
    """Whether the ops compute this norm of these grads."""
    return norm_type in (1.0, 2.0, math.inf) and all(grad.dtype in DTYPES for grad in grads)


def columns_of_grads(grads: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Addresses, sizes and dtype codes of dense grads, as the ops' grad_norm() takes them."""
    return addresses(grads), list(map(Tensor.numel, grads)), [DTYPES.index(grad.dtype) for grad in grads]


class TableBackend:
    """Adam by an extension module that takes tables; a subclass says how a step is done."""

    writes_copies = True

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module
        self.device = device
        capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
        self._reader = None
        if capsule is not None:
            place = (_DLPACK_DEVICE_TYPE[device.type], device.index or 0)
            with contextlib.suppress(ValueError):  # a table of another version of DLPack: tensors are read from Python
                self._reader = module.TensorReader(capsule, PLAIN_TYPES, *place)
        self._first_states: dict[str, int] = {}  # by group: where the next step finds its states without search

    def prepare_group(
        self, where: str, hyper: AdamHyper, params: list[Tensor], states: dict[Any, Any]
    ) -> Callable[[], None] | None:
        table = self._table_of_params(hyper, params, states, self._first_states.get(where, 0))
        if table is None:
            return None
        self._first_states[where] = table.first_state
        return lambda: self._step(table, hyper)

    def prepare(self, batch: AdamBatch) -> Callable[[], None]:
        if batch.has_shards and self._reader is not None:
            self._reader.sharded_type = dtensor_class()  # from now on prepare_group() takes them
        states = dict(zip(batch.params, batch.states, strict=True))
        table = self._table_of_params(batch.hyper, batch.params, states) if batch.has_all_defaults else None
        if table is not None:
            return lambda: self._step(table, batch.hyper)
        check_params_and_grads(batch)
        check_states(batch)
        return self._prepare_checked(batch)

    def _prepare_checked(self, batch: AdamBatch) -> Callable[[], None]:
        """What updates a batch that has been checked, its step counts kept as numbers."""
        table = self._table_of_addresses(batch, batch.steps)

        def update() -> None:
            self._step(table, batch.hyper)
            batch.count_step()

        return update

    def _counts_fit(self, table: Any, hyper: AdamHyper) -> bool:
        """Whether step counts are kept as this step needs them: as numbers, or in tensors on the device."""
        raise NotImplementedError

    def _step(self, table: Any, hyper: AdamHyper) -> None:
        raise NotImplementedError

    def _table_of_params(
        self, hyper: AdamHyper, params: list[Tensor], states: dict[Any, Any], first_state: int = 0
    ) -> Any:
        if self._reader is None or not isinstance(params, list):
            return None
        table = self.module.table_of_params(
            self._reader, params, states, hyper.amsgrad, hyper.precision.master, first_state, hyper.stream
        )
        return table if table is not None and self._counts_fit(table, hyper) else None

    def _table_of_addresses(self, batch: AdamBatch, steps: list[int], counts_on_device: bool = False) -> Any:
        exp_avgs = batch.column("exp_avg")
        columns = [list(map(_dtype, tensors)) for tensors in (batch.params, batch.grads, exp_avgs)]
        combinations = list(zip(*columns, strict=True))
        outs = batch.lowp_outs or []
        codes = {c: _CODE[c[0]] + 3 * _CODE[c[1]] + 9 * _CODE[c[2]] for c in set(combinations)}
        return self.module.table_of_addresses(
            params=addresses(batch.params),
            grads=addresses(batch.grads),
            exp_avgs=addresses(exp_avgs),
            exp_avg_sqs=addresses(batch.column("exp_avg_sq")),
            max_exp_avg_sqs=addresses(batch.column("max_exp_avg_sq")) if batch.hyper.amsgrad else None,
            numels=list(map(Tensor.numel, batch.params)),
            dtypes=[
                codes[combination] + (36 * _CODE[out.dtype] if out is not None else 0)
                for combination, out in itertools.zip_longest(combinations, outs)
            ],
            steps=steps,
            masters=addresses(batch.masters) if batch.hyper.precision.master else None,
            counts_on_device=counts_on_device,
            master=batch.hyper.precision.master or Master.FP32,
            scales=addresses(batch.scales),
            lowp_outs=addresses(outs) if outs else None,
            streams=[(batch.hyper.stream + index) & 0xFFFFFFFF for index in batch.indices] or None,
        )

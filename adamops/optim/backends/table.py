"""The base class of backends with a compiled op: passes it params, grads and states as a table of addresses.

The kernels trust what they are given, so every tensor is checked first: plain ones by the op's own reader, all others
by batch.py and memory.py, which also word the errors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..._torch_compat import dlpack_exchange_table, dtensor_class_for_op, without_torch_function
from ..batch import Batch, check_params_and_grads, check_states
from ..layout import add_in_pieces, dense
from ..memory import PLAIN_TYPES, addresses, check_writable, in_memory
from ..state.precision import DTYPES, GRAD_DTYPES, SCALES
from ..step_settings import StepSettings
from . import tensor_layout
from .base import Update

# The op's names of dtypes; int8 or uint8 is that of the first state if states are quantized.
_DTYPE_NAMES = {
    **{dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES},
    torch.int8: "quantized",
    torch.uint8: "quantized",
}
_DLPACK_DEVICE_TYPE = {"cpu": 1, "cuda": 2}

_NORM_TYPES = (1.0, 2.0, math.inf)

Columns: TypeAlias = tuple[list[int], list[int], list[int]]  # addresses, sizes and dtype codes


class TableBackend:
    """Updates by an extension module that takes tables. Subclasses define how a step runs."""

    writes_copies = True
    on_cpu = True  # whether a step is done when the op returns

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module
        self.name = module.__name__.rpartition(".")[2]
        self.device = device
        self._dtype_codes = {dtype: module.DTYPES[name] for dtype, name in _DTYPE_NAMES.items()}
        self._reader = self._new_reader()  # None: tensors are read and checked from Python
        self._first_states: dict[str, int] = {}  # by group: where the next step first looks for states

    def _new_reader(self) -> Any:
        capsule = dlpack_exchange_table()
        layout = tensor_layout.arguments(self.device) if capsule is not None else None
        if layout is None:
            return None
        place = (_DLPACK_DEVICE_TYPE[self.device.type], self.device.index or 0)
        with contextlib.suppress(ValueError):  # an exchange table of another DLPack version
            return self.module.TensorReader(capsule, PLAIN_TYPES, self.module.TensorLayout(**layout), *place)
        return None

    def prepare_group(
        self, where: str, settings: StepSettings, params: list[Tensor], states: dict[Any, Any]
    ) -> Update | None:
        table = self._table_of_params(settings, params, states, self._first_states.get(where, 0))
        if table is None:
            return None
        self._first_states[where] = table.first_state
        return self._update_of_params(table, settings)

    def prepare_lists(
        self, settings: StepSettings, params: list[Tensor], grads: list[Tensor | None], states: list[Any], *others: Any
    ) -> Update | None:
        """The update of lists of tensors, the fields of TensorLists in order. None if a tensor is not eligible for the
        fast path, or if tensors to be written share memory.
        """
        if self._reader is None:
            return None
        master, offset = settings.precision.master, settings.rng_offset
        table = self.module.table_of_lists(self._reader, params, grads, states, *others, master, offset)
        if table is None or not self._counts_fit(table, settings) or table.writes_overlap(settings.zero_grads):
            return None
        return self._update_of_params(table, settings)

    def prepare(self, batch: Batch) -> Update:
        if batch.has_shards and self._reader is not None:
            self._reader.sharded_type = dtensor_class_for_op()  # from now on prepare_group() takes DTensors
        states = dict(zip(batch.params, batch.states, strict=True))
        table = self._table_of_params(batch.settings, batch.params, states) if batch.has_all_defaults else None
        if table is not None:
            return self._update_of_params(table, batch.settings)
        check_params_and_grads(batch)
        check_states(batch)
        return self._prepare_checked(batch)

    def run_all(self, updates: Sequence[Update]) -> None:
        for update in updates:
            update()

    def grad_norm(self, grads: Sequence[Tensor], norm_type: float) -> float | Tensor | None:
        if norm_type not in _NORM_TYPES:
            return None
        columns = self._columns_of_plain(grads)
        if columns is not None:
            return self._norm_of(columns, norm_type)
        if any(grad.device.type == "meta" for grad in grads):
            raise ValueError("a grad is on the device meta, and has no values")
        if any(grad.layout != torch.strided or grad.dtype not in GRAD_DTYPES for grad in grads):
            return None
        read = [dense(in_memory(grad, "a grad")) for grad in grads]  # kept alive until the op has read them
        with without_torch_function():  # Python code of subclasses may have freed others meanwhile
            codes = [self._dtype_codes[grad.dtype] for grad in read]
            return self._norm_of((addresses(read, "a grad"), list(map(Tensor.numel, read)), codes), norm_type)

    def _columns_of_plain(self, tensors: Sequence[Tensor]) -> Columns | None:
        """None unless all are plain, contiguous and of a dtype in DTYPES. The op's reader proves every address."""
        return None if self._reader is None else self.module.columns_of(self._reader, list(tensors))

    def add_grad(self, total: Tensor, grad: Tensor, is_first: bool, threads: int | None) -> None:
        add_in_pieces(total, grad, is_first)

    def adds_in_step(self, update: Update, totals: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        return False

    def samples(self, grads: Sequence[Tensor]) -> list[bytes | None]:
        return [None] * len(grads)

    def _norm_of(self, columns: Columns, norm_type: float) -> float | Tensor:
        """The norm that grad_norm() returns, by the op."""
        raise NotImplementedError

    def _prepare_checked(self, batch: Batch) -> Update:
        """The update of a batch that has been checked. Step counts are kept as numbers."""
        steps = batch.steps
        spare = replace_unused_scales(batch)
        counts_here = batch.counts_in_tensors
        table = self._table_of_batch(batch, steps, None if counts_here else batch.counted_states)
        call = self._call(table, batch.settings)
        run = self._runner(table, batch.settings, call)

        def run_and_count() -> None:
            run()
            restore_unused_scales(spare)
            if counts_here:
                batch.count_step(steps)

        is_simple = not spare and not counts_here
        return Update(
            run if is_simple else run_and_count,
            batch.borrowed,
            batch.written(),
            table,
            call if is_simple else None,
            self.on_cpu,
        )

    def _update_of_params(self, table: Any, settings: StepSettings) -> Update:
        """The update of a table that the op's own reader made. The op tells autograd what it writes."""
        call = self._call(table, settings)
        return Update(
            self._runner(table, settings, call),
            lambda: table.borrowed,
            table=table,
            call=call,
            on_cpu=self.on_cpu,
            count_writes=lambda: table.count_writes(settings.zero_grads),
        )

    def _runner(self, table: Any, settings: StepSettings, call: tuple[Any, ...] | None) -> Callable[[], None]:
        """The function that runs a step for a table. `call` is what _call() returned."""
        raise NotImplementedError

    def _call(self, table: Any, settings: StepSettings) -> tuple[Any, ...] | None:
        """The arguments of the CPU op for a step; None for other ops."""
        return None

    def _counts_fit(self, table: Any, settings: StepSettings) -> bool:
        """Whether step counts are kept the way this step needs: as numbers, or as tensors on the device."""
        raise NotImplementedError

    def _table_of_params(
        self, settings: StepSettings, params: list[Tensor], states: dict[Any, Any], first_state: int = 0
    ) -> Any:
        if self._reader is None or not isinstance(params, list) or not isinstance(states, dict):
            return None
        master, offset = settings.precision.master, settings.rng_offset
        table = self.module.table_of_params(
            self._reader, params, states, len(settings.states), master, first_state, offset
        )
        return table if table is not None and self._counts_fit(table, settings) else None

    def _table_of_batch(
        self,
        batch: Batch,
        steps: list[int],
        counted_in: Sequence[dict[str, Any] | None] | None = None,
        counts_on_device: bool = False,
    ) -> Any:
        """The table of a checked batch. `steps` are counts, this step included, or addresses of counts before it."""
        states = [batch.column(state.name) for state in batch.settings.states]
        outs = batch.lowp_outs or [None] * len(batch.params)
        columns = {
            "param": addresses(batch.params),
            "grad": addresses(batch.grads),
            "states": list(zip(*map(addresses, states), strict=True)) or [()] * len(steps),
            "numel": list(map(Tensor.numel, batch.params)),
            "param_dtype": self._codes(batch.params),
            "grad_dtype": self._codes(batch.grads),
            "state_dtype": self._codes(states[0]) if states else [self._dtype_codes[torch.float32]] * len(steps),
            "step": steps,
            "master": addresses(batch.masters),
            "scales": addresses(batch.scales),
            "lowp_out": addresses(outs),
            "lowp_dtype": self._codes(outs),
            "rng_offset": [(batch.settings.rng_offset + i) & 0xFFFFFFFF for i in batch.indices or [0] * len(steps)],
            "counted_in": counted_in or [None] * len(steps),
        }
        return self.module.table_of_rows(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            state_count=len(states),
            master=batch.settings.precision.master,
            counts_on_device=counts_on_device,
        )

    def _codes(self, tensors: Sequence[Tensor | None]) -> list[int | None]:
        """The op's numbers for the dtypes of tensors; None for None."""
        return [None if tensor is None else self._dtype_codes[tensor.dtype] for tensor in tensors]


def replace_unused_scales(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Replaces scales that have columns of states that are no longer in use by copies without them.

    Returns the scales with their copies.
    """
    columns = len(batch.settings.states)
    aside = []
    for i, scales in enumerate(batch.scales):
        if scales is not None and scales.shape[1] > columns:
            check_writable(scales, f"{batch.names[i]}: its {SCALES}")
            narrow = scales[:, :columns].contiguous()
            aside.append((scales, narrow))
            if batch.owned_states is None:  # steps are counted in the optimizer's dicts, not in copies
                batch.owned_states = [*batch.states]
            batch.states[i] = {**batch.states[i], SCALES: narrow}
    return aside


def restore_unused_scales(aside: list[tuple[Tensor, Tensor]]) -> None:
    """Writes the copies back into the scales that they were made from."""
    for scales, narrow in aside:
        scales[:, : narrow.shape[1]] = narrow

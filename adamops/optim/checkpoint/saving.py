"""States as checkpoints hold them: another optimizer, or the same one on other processes, can continue from them.

loading.py is the inverse. Must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dtensor
from ..batch import check_state
from ..memory import check_readable
from ..state import remainders
from ..state.precision import AVERAGES, MASTER, REMAINDER, SCALES
from ..state.quantized_states import dequantized_states, is_quantized, with_held_names, with_saved_names


def saved_state(entry: Any, dequantize: bool = False) -> Any:
    """The state of a param as state_dict() gives it; anything else is returned as it is."""
    if not isinstance(entry, Mapping):
        return entry
    if dtensor.is_sharded(entry.get("exp_avg")) or dtensor.is_sharded(entry.get(REMAINDER)):
        entry = portable(entry)
    if dequantize:
        return in_fp32(entry)
    return with_saved_names(entry) if is_quantized(entry) else entry


def in_fp32(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param with its averages in float32, without master or remainder."""
    plain = {key: value for key, value in without_quantized(entry).items() if key not in (MASTER, REMAINDER)}
    if plain.keys().isdisjoint(AVERAGES):
        return {}  # the param was never stepped, and other optimizers would miss the averages
    return {key: value.float() if key in AVERAGES else value for key, value in plain.items()}


def without_quantized(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param with quantized averages dequantized to float32, and all else as it is."""
    entry = with_held_names(entry, "a param")
    for key, value in entry.items():
        if isinstance(value, Tensor):
            check_readable(dtensor.local(value), f"the state {key!r} of a param")
        elif key in AVERAGES:
            raise TypeError(f"the state {key!r} of a param is a {type(value).__name__}; expected a tensor")
    if not is_quantized(entry):
        return entry
    exp_avg = entry["exp_avg"]
    held = {key: dtensor.local(value) for key, value in entry.items() if key in (SCALES, *AVERAGES)}
    check_state(held, held["exp_avg"], "the state of a param", elsewhere=True)
    floats = dequantized_states(held)
    dequantized = {key: dtensor.like_param_placed(value, exp_avg) for key, value in floats.items()}
    kept = {key: value for key, value in entry.items() if key not in (SCALES, *AVERAGES)}
    return {**kept, **dequantized}


def portable(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param in a form that can be resharded: not quantized, and with the step count in a tensor.

    A remainder is saved as int32, of which the lower 16 bits count, however many bits the optimizer keeps: gloo and
    NCCL cannot send int16, and torch.distributed.checkpoint converts dtypes by value.
    """
    saved, step, remainder = without_quantized(entry), entry.get("step"), entry.get(REMAINDER)
    if isinstance(step, int):
        saved["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    if isinstance(remainder, Tensor) and remainder.dtype != torch.int32:
        wide = remainders.converted(dtensor.local(remainder), torch.int16).to(torch.int32)
        saved[REMAINDER] = dtensor.like_param_placed(wide, remainder)
    return saved


def portable_state_dicts(optimizer: Optimizer) -> None:
    """Makes ``optimizer.state_dict()`` give states that torch.distributed.checkpoint can reshard, also of plain params.

    8-bit states then become float32, and step counts 0-dim float32 tensors, as in torch.optim.AdamW. States of DTensors
    always have this form. Call this on optimizers of plain params (in one process, or under DistributedDataParallel)
    that exchange checkpoints with sharded ones, or with torch.optim.AdamW.
    """

    def hook(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        entries = state_dict["state"].items()
        state = {key: portable(entry) if isinstance(entry, dict) else entry for key, entry in entries}
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(hook)

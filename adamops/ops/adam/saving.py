"""States as checkpoints hold them: what another optimizer, or the same one on other processes, can go on with.

The way back is loading.py. Must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import remainders, sharding
from .batch import check_state, is_quantized
from .memory import check_readable
from .precision import AVERAGES, MASTER, REMAINDER, SCALES
from .quantized_states import dequantized_states, with_held_names, with_saved_names


def saved_state(entry: Any, dequantize: bool = False) -> Any:
    """The state of a param as state_dict() gives it; what is no state of a param as it is."""
    if not isinstance(entry, Mapping):
        return entry
    if sharding.is_sharded(entry.get("exp_avg")) or sharding.is_sharded(entry.get(REMAINDER)):
        entry = portable(entry)
    if dequantize:
        return in_fp32(entry)
    return with_saved_names(entry) if is_quantized(entry) else entry


def in_fp32(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param with its averages in float32, and nothing of the param itself."""
    plain = {key: value for key, value in without_quantized(entry).items() if key not in (MASTER, REMAINDER)}
    if plain.keys().isdisjoint(AVERAGES):
        return {}  # the param has made no step, and others would miss the averages
    return {key: value.float() if key in AVERAGES else value for key, value in plain.items()}


def without_quantized(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param with float32 in the place of codes and scales, and all else as it is."""
    entry = with_held_names(entry, "a param")
    for key, value in entry.items():
        if isinstance(value, Tensor):
            check_readable(sharding.local(value), f"the state {key!r} of a param")
        elif key in AVERAGES:
            raise TypeError(f"the state {key!r} of a param is a {type(value).__name__}; expected a tensor")
    if not is_quantized(entry):
        return entry
    exp_avg = entry["exp_avg"]
    held = {key: sharding.local(value) for key, value in entry.items() if key in (SCALES, *AVERAGES)}
    check_state(held, held["exp_avg"], "the state of a param", elsewhere=True)
    floats = dequantized_states(held)
    dequantized = {key: sharding.like_param_placed(value, exp_avg) for key, value in floats.items()}
    kept = {key: value for key, value in entry.items() if key not in (SCALES, *AVERAGES)}
    return {**kept, **dequantized}


def portable(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a param as it can be cut anew: no codes, and the step count in a tensor, as torch.optim has it.

    What a param lacks of its master is in int32, of which the lower 16 bits count, however many the optimizer keeps:
    gloo and NCCL cannot send int16, and torch.distributed.checkpoint converts dtypes by value.
    """
    saved, step, rest = without_quantized(entry), entry.get("step"), entry.get(REMAINDER)
    if isinstance(step, int):
        saved["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    if isinstance(rest, Tensor) and rest.dtype != torch.int32:
        wide = remainders.converted(sharding.local(rest), torch.int16).to(torch.int32)
        saved[REMAINDER] = sharding.like_param_placed(wide, rest)
    return saved


def portable_state_dicts(optimizer: Optimizer) -> None:
    """Has ``optimizer.state_dict()`` give states that torch.distributed.checkpoint can cut anew, also of plain params.

    States are then float32 in the place of 8-bit codes, and step counts are 0-dim float32 tensors, as torch.optim.AdamW
    has them. Of DTensors they always are. To be called on optimizers of plain params (of one process, or under
    DistributedDataParallel) whose checkpoints are to be read by or come from sharded ones, or torch.optim.AdamW.
    """

    def hook(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        entries = state_dict["state"].items()
        state = {key: portable(entry) if isinstance(entry, dict) else entry for key, entry in entries}
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(hook)

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
from ..rule import State
from ..state import remainders
from ..state.precision import MASTER, REMAINDER, SCALES, names_of
from ..state.quantized_states import dequantized_states, is_quantized, with_held_names, with_saved_names


def saved_state(entry: Any, states: tuple[State, ...], dequantize: bool = False) -> Any:
    """The state of a param as state_dict() gives it; anything else is returned as it is. `states` are the rule's."""
    if not isinstance(entry, Mapping):
        return entry
    if any(dtensor.is_sharded(entry.get(name)) for name in (*names_of(states[:1]), REMAINDER)):
        entry = portable(entry, states)
    if dequantize:
        return in_fp32(entry, states)
    return with_saved_names(entry, states) if is_quantized(entry, states) else entry


def in_fp32(entry: Mapping[str, Any], states: tuple[State, ...]) -> dict[str, Any]:
    """The state of a param with the rule's states in float32, without master or remainder."""
    names = names_of(states)
    plain = {key: value for key, value in without_quantized(entry, states).items() if key not in (MASTER, REMAINDER)}
    if names and plain.keys().isdisjoint(names):
        return {}  # the param was never stepped, and other optimizers would miss the states
    return {key: value.float() if key in names else value for key, value in plain.items()}


def without_quantized(entry: Mapping[str, Any], states: tuple[State, ...]) -> dict[str, Any]:
    """The state of a param with quantized states dequantized to float32, and all else as it is."""
    names = names_of(states)
    entry = with_held_names(entry, states, "a param")
    for key, value in entry.items():
        if isinstance(value, Tensor):
            check_readable(dtensor.local(value), f"the state {key!r} of a param")
        elif key in names:
            raise TypeError(f"the state {key!r} of a param is a {type(value).__name__}; expected a tensor")
    if not is_quantized(entry, states):
        return entry
    first = entry[names[0]]
    held = {key: dtensor.local(value) for key, value in entry.items() if key in (SCALES, *names)}
    check_state(held, held[names[0]], states, "the state of a param", elsewhere=True)
    floats = dequantized_states(held, states)
    dequantized = {key: dtensor.like_param_placed(value, first) for key, value in floats.items()}
    kept = {key: value for key, value in entry.items() if key not in (SCALES, *names)}
    return {**kept, **dequantized}


def portable(entry: Mapping[str, Any], states: tuple[State, ...]) -> dict[str, Any]:
    """The state of a param in a form that can be resharded: not quantized, and with the step count in a tensor.

    A remainder is saved as int32, of which the lower 16 bits count, however many bits the optimizer keeps: gloo and
    NCCL cannot send int16, and torch.distributed.checkpoint converts dtypes by value.
    """
    saved, step, remainder = without_quantized(entry, states), entry.get("step"), entry.get(REMAINDER)
    if isinstance(step, int):
        saved["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    if isinstance(remainder, Tensor) and remainder.dtype != torch.int32:
        wide = remainders.converted(dtensor.local(remainder), torch.int16).to(torch.int32)
        saved[REMAINDER] = dtensor.like_param_placed(wide, remainder)
    return saved


def portable_state_dicts(optimizer: Optimizer) -> None:
    """Makes ``optimizer.state_dict()`` give states that torch.distributed.checkpoint can reshard, also of plain params.

    8-bit states then become float32, and step counts 0-dim float32 tensors, as in torch.optim. States of DTensors
    always have this form. Call this on optimizers of plain params (in one process, or under DistributedDataParallel)
    that exchange checkpoints with sharded ones, or with torch.optim.
    """
    rule = getattr(optimizer, "rule", None)  # an optimizer of torch has none, nor quantized states
    states: tuple[State, ...] = rule.states if rule else ()

    def hook(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        entries = state_dict["state"].items()
        state = {key: portable(entry, states) if isinstance(entry, dict) else entry for key, entry in entries}
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(hook)

"""Brings loaded states into the form that the optimizers here keep: steps as ints, tensors as new ones would be.

Knows how torch.optim, DeepSpeed and apex write their checkpoints; must not know how a step is done.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import remainders, sharding
from .batch import check_state, is_coded, is_dense, like_param, same_layout
from .coded_states import coded_states, float_states
from .precision import AVERAGES, MASTER, REMAINDER, SCALES, STATE_TENSORS, Precision


class _Shielded:
    """Carries a state tensor through Optimizer.load_state_dict, which would cast it to the param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shield_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the tensors of the states shielded from Optimizer.load_state_dict's casts."""
    shielded = {
        key: {name: _Shielded(value) if name in STATE_TENSORS else value for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def adopted_states(states: dict[Any, Any], groups: list[dict[str, Any]], precision: Precision) -> defaultdict[Any, Any]:
    """Loaded states, checked, as this optimizer keeps them: steps as ints, tensors in dtype and layout as new ones.

    Master weights that the optimizer does not have are left out: they would not follow their params.
    """
    adopted: defaultdict[Any, Any] = defaultdict(dict)
    names, group_steps = {}, {}
    for g, group in enumerate(groups):
        group_step = _group_step(states, group)
        for i, param in enumerate(group["params"]):
            names[param] = f"param group {g}, param {i}"
            group_steps[param] = group_step
    for key, entry in states.items():
        if not isinstance(entry, dict):
            adopted[key] = entry
            continue
        state = {name: value.tensor if isinstance(value, _Shielded) else value for name, value in entry.items()}
        # torch.distributed.checkpoint gives an empty dict for what we have and a flattened checkpoint has not.
        state = {name: value for name, value in state.items() if not (isinstance(value, dict) and not value)}
        if state and group_steps.get(key) is not None:
            state["step"] = group_steps[key]
        if "step" in state:
            state["step"] = int(state["step"])
        if isinstance(key, Tensor):
            master = precision.master_of(key)
            for name in (MASTER, REMAINDER):
                if not master or name != master.key:
                    state.pop(name, None)
            name = names.get(key, "a param")
            held = _narrow_remainder(sharding.local_state(state, key, name))
            converted = _converted_tensors(held, sharding.local(key), name, precision)
            state.pop(SCALES, None)
            state.update(sharding.owned_state(converted, key, state))
        adopted[key] = state
    return adopted


def _group_step(states: dict[Any, Any], group: dict[str, Any]) -> int | None:
    """The step count of all params of a group, where FusedAdam of DeepSpeed or apex has counted; else None.

    apex counts in the group. DeepSpeed's (0.19.8) leaves 0 there, and counts in the state of the last param that has
    a grad, for all of the group; the others' counts stay at 0.
    """
    step = group.pop("step", None)
    if step is None:
        return None
    entries = [states[param] for param in group["params"] if param in states]
    return max([int(step), *(int(entry["step"]) for entry in entries if "step" in entry)])


def _narrow_remainder(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a remainder as saving.portable() wrote it in the dtype that it has in an optimizer."""
    rest = state.get(REMAINDER)
    if isinstance(rest, Tensor) and rest.dtype == torch.int32:
        return {**state, REMAINDER: rest.to(torch.int16)}
    return state


def _converted_tensors(state: dict[str, Any], param: Tensor, name: str, precision: Precision) -> dict[str, Tensor]:
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
    if state and missing:
        raise ValueError(
            f"{name} has no {', '.join(map(repr, missing))} in its state but {', '.join(map(repr, state))}; "
            "this is not the state of an Adam optimizer"
        )
    check_state(state, param, name, elsewhere=True)
    tensors = {key: value.to(param.device) for key, value in state.items() if key in STATE_TENSORS}
    converted = _averages(tensors, param, precision)
    if MASTER in tensors:
        converted[MASTER] = like_param(tensors[MASTER], param)
    if REMAINDER in tensors:
        converted[REMAINDER] = like_param(remainders.converted(tensors[REMAINDER], precision.master.dtype), param)
    return converted


def _averages(tensors: dict[str, Tensor], param: Tensor, precision: Precision) -> dict[str, Tensor]:
    """The averages of the grads as the optimizer keeps them, from codes or floats."""
    averages = {key: tensors[key] for key in AVERAGES if key in tensors}
    wants_codes, has_codes = precision.codes_states(param), is_coded(tensors)
    if has_codes:
        fits = all(is_dense(value) and same_layout(value, param) for value in averages.values())
        if wants_codes and fits:
            return {**averages, SCALES: tensors[SCALES].contiguous()}
        averages = float_states(tensors)
    dtype = torch.float32 if wants_codes else precision.float_state_dtype(param)
    averages = {key: like_param(value.to(dtype), param) for key, value in averages.items()}
    return coded_states(averages) if wants_codes and averages else averages

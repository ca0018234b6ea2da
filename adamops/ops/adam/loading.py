"""Brings loaded states into the form that the optimizers here keep: steps as ints, tensors as new ones would be.

Knows how torch.optim, DeepSpeed and apex write their checkpoints; must not know how a step is done.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import MASTER, STATE_TENSORS, check_state, like_param


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


def adopted_states(
    states: dict[Any, Any], groups: list[dict[str, Any]], fp32: bool, masters: bool
) -> defaultdict[Any, Any]:
    """Loaded states, checked, as this optimizer keeps them: steps as ints, tensors in dtype and layout as new ones.

    Master weights that the optimizer does not have are left out: they would not follow their params.
    """
    adopted: defaultdict[Any, Any] = defaultdict(dict)
    names, group_steps = {}, {}
    for g, group in enumerate(groups):
        group_step = group.pop("step", None)  # FusedAdam of DeepSpeed and apex counts steps by group
        for i, param in enumerate(group["params"]):
            names[param] = f"param group {g}, param {i}"
            group_steps[param] = group_step
    for key, entry in states.items():
        if not isinstance(entry, dict):
            adopted[key] = entry
            continue
        state = {name: value.tensor if isinstance(value, _Shielded) else value for name, value in entry.items()}
        if state and "step" not in state and group_steps.get(key) is not None:
            state["step"] = group_steps[key]
        if "step" in state:
            state["step"] = int(state["step"])
        if isinstance(key, Tensor):
            if not masters or key.dtype == torch.float32:
                state.pop(MASTER, None)
            state.update(_converted_tensors(state, key, names.get(key, "a param"), fp32))
        adopted[key] = state
    return adopted


def _converted_tensors(state: dict[str, Any], param: Tensor, name: str, fp32: bool) -> dict[str, Tensor]:
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
    if state and missing:
        raise ValueError(
            f"{name} has no {', '.join(map(repr, missing))} in its state but {', '.join(map(repr, state))}; "
            "this is not the state of an Adam optimizer"
        )
    dtype = torch.float32 if fp32 else param.dtype
    converted = {
        key: state[key].to(device=param.device, dtype=torch.float32 if key == MASTER else dtype)
        for key in STATE_TENSORS
        if isinstance(state.get(key), Tensor)
    }
    check_state({**state, **converted}, param, name)
    return {key: like_param(value, param) for key, value in converted.items()}

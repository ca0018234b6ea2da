"""Converts loaded states to the form that our optimizers keep: step counts as ints, tensors as new ones would be.

Knows how torch.optim, DeepSpeed and apex write their checkpoints; the rule knows which are its own. Must not know how a
step is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..batch import check_state, check_step, is_shared_count
from ..layout import is_dense, like_param, same_layout
from ..memory import check_memory, check_readable
from ..rule import Rule, State
from ..state import remainders
from ..state.precision import MASTER, REMAINDER, SCALES, SETTINGS, Master, Precision, names_of, tensors_of
from ..state.quantized_states import dequantized_states, is_quantized, quantized_states, saved_names, with_held_names


class _Shielded:
    """Carries a state tensor through Optimizer.load_state_dict, which would otherwise cast it to the param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _shielded(value: Any) -> _Shielded:
    """The value shielded, once: a hook may load a state dict while another is being loaded."""
    return value if isinstance(value, _Shielded) else _Shielded(value)


def shield_states(state_dict: dict[str, Any], states: tuple[State, ...]) -> dict[str, Any]:
    """A state dict whose state tensors are shielded from the casts of Optimizer.load_state_dict.

    Raises ValueError or TypeError if it has not the form of an optimizer's.
    """
    _check_form(state_dict)
    names = {*tensors_of(states), *saved_names(states).values()}
    shielded = {
        key: {name: _shielded(value) if name in names else value for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def _check_form(state_dict: Mapping[str, Any]) -> None:
    for name, kind in (("state", Mapping), ("param_groups", Sequence)):
        if name not in state_dict:
            keys = ", ".join(map(repr, list(state_dict)[:5])) or "nothing"
            raise ValueError(f"a state dict has no {name!r}, but {keys}; this is not the state dict of an optimizer")
        if not isinstance(state_dict[name], kind):
            found = type(state_dict[name]).__name__
            raise TypeError(f"a state dict has a {found} as {name!r}; this is not the state dict of an optimizer")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"param group {i} has no params; this is not the state dict of an optimizer")


def keep_own_settings(groups: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the precision settings of loaded param groups by those of the optimizer's `own` groups."""
    for group, before in zip(groups, own, strict=True):
        for name in SETTINGS:
            group.pop(name, None)
            if name in before:
                group[name] = before[name]
        if "stochastic_rounding_seed" in before:
            group.setdefault("stochastic_rounding_seed", before["stochastic_rounding_seed"])


def adopted_states(
    states: dict[Any, Any], groups: Sequence[dict[str, Any]], precisions: Sequence[Precision], rule: Rule
) -> defaultdict[Any, Any]:
    """Checks loaded states and converts them: step counts to ints, tensors to the dtypes and layout of new ones.

    `precisions` are those of the groups. Masters that a group does not use are dropped, as they would go stale. States
    under keys that are not params keep the dtypes and layout of their tensors.
    """
    adopted: defaultdict[Any, Any] = defaultdict(dict)
    places = {}
    for g, (group, precision) in enumerate(zip(groups, precisions, strict=True)):
        group_step = _group_step(states, group, f"param group {g}")
        for i, param in enumerate(group["params"]):
            places[param] = f"param group {g}, param {i}", group_step, precision
    for key, entry in states.items():
        if isinstance(entry, dict) and isinstance(key, Tensor) and key in places:
            adopted[key] = _adopted(entry, key, *places[key], rule)
        elif isinstance(entry, dict):  # a subgroup's state, for example
            adopted[key] = with_held_names(_unshielded(entry), rule.states, f"the state of {key!r}")
            if "step" in adopted[key]:
                adopted[key]["step"] = _adopted_step(adopted[key]["step"], f"the state of {key!r}")
        elif isinstance(key, Tensor) and key in places:
            raise TypeError(f"{places[key][0]} has a {type(entry).__name__} as its state; expected a dict")
        else:
            adopted[key] = entry
    return adopted


def _unshielded(entry: Mapping[str, Any]) -> dict[str, Any]:
    state = {name: value.tensor if isinstance(value, _Shielded) else value for name, value in entry.items()}
    # torch.distributed.checkpoint gives an empty dict for an entry that we have and a flattened checkpoint lacks.
    return {name: value for name, value in state.items() if not (isinstance(value, dict) and not value)}


def _adopted(
    entry: Mapping[str, Any], param: Tensor, name: str, group_step: int | None, precision: Precision, rule: Rule
) -> dict[str, Any]:
    """The loaded state of a param, in the form that this optimizer keeps."""
    tensors = tensors_of(rule.states)
    state = with_held_names(_unshielded(entry), rule.states, name)
    if not state:
        return state
    if group_step is not None:
        state["step"] = group_step
    if "step" in state:
        state["step"] = _adopted_step(state["step"], name)
    rule.check_loaded_state(state, name, before_first_step=(MASTER, REMAINDER))
    held = _narrow_remainder(dtensor.local_state(state, param, name, tensors), name)
    converted = _converted_tensors(held, dtensor.local(param), name, precision, rule.states)
    others = {key: value for key, value in state.items() if key not in tensors}
    return dtensor.owned_state({**others, **converted}, param, tensors, state)


def _adopted_step(step: Any, name: str) -> Any:
    """A step count as an int, or as a tensor if processes share it."""
    check_step(step, name)
    return step if isinstance(step, Tensor) and is_shared_count(step) else int(step)


def _group_step(states: dict[Any, Any], group: dict[str, Any], where: str) -> int | None:
    """The step count of all params of a group, if it is from FusedAdam of DeepSpeed or apex; else None.

    apex counts in the group. DeepSpeed's class (0.19.8) leaves 0 there. It counts for the whole group in the state of
    the last param that has a grad; the counts of the other params stay at 0.
    """
    step = group.pop("step", None)
    if step is None:
        return None
    entries = [states[param] for param in group["params"] if param in states]
    steps = [step, *(entry["step"] for entry in entries if "step" in entry)]
    for count in steps:
        check_step(count, where)
    return max(map(int, steps))


def _narrow_remainder(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The state, with the int32 remainder that saving.portable() writes narrowed to int16."""
    remainder = state.get(REMAINDER)
    if isinstance(remainder, Tensor) and remainder.dtype == torch.int32:
        check_memory(remainder, f"{name}: its state {REMAINDER!r}")
        return {**state, REMAINDER: remainder.to(torch.int16)}
    return state


def _converted_tensors(
    state: Mapping[str, Any], param: Tensor, name: str, precision: Precision, states: tuple[State, ...]
) -> dict[str, Tensor]:
    """The tensors of a loaded state, in the dtypes and layout that the optimizer keeps."""
    state = _with_one_dtype(state, name, states)
    check_state(state, param, states, name, elsewhere=True)
    tensors = {key: value.to(param.device) for key, value in state.items() if key in tensors_of(states)}
    return {
        **_states_of_rule(tensors, param, precision, states),
        **_masters(tensors, param, precision.master_of(param)),
    }


def _with_one_dtype(state: Mapping[str, Any], name: str, states: tuple[State, ...]) -> dict[str, Any]:
    """The state with the rule's states of one dtype: float32, if they have float64 or several. So has a master."""
    floats = {
        key: value
        for key in (*names_of(states), MASTER)
        if isinstance(value := state.get(key), Tensor) and value.layout == torch.strided and value.is_floating_point()
    }
    is_mixed = len({value.dtype for key, value in floats.items() if key != MASTER}) > 1
    converted = {}
    for key, value in floats.items():
        if value.dtype == torch.float64 or (is_mixed and key != MASTER):
            check_readable(value, f"{name}: its state {key!r}")
            converted[key] = value.float()
    return {**state, **converted}


def _masters(tensors: Mapping[str, Tensor], param: Tensor, kind: Master) -> dict[str, Tensor]:
    """A param's master or remainder, from loaded ones of any kind. The param may be loaded before or after."""
    if kind is Master.NONE:
        return {}
    if kind is Master.FP32:
        # A remainder becomes a master only at the first step, as the param may not have been loaded yet.
        return {key: like_param(tensors[key], param) for key in (MASTER, REMAINDER) if key in tensors}
    if REMAINDER in tensors:
        return {REMAINDER: remainders.converted(like_param(tensors[REMAINDER], param), kind.dtype)}
    if MASTER in tensors:
        return {REMAINDER: remainders.beside_nearest(like_param(tensors[MASTER], param), param.dtype, kind.dtype)}
    return {}


def _states_of_rule(
    tensors: Mapping[str, Tensor], param: Tensor, precision: Precision, states: tuple[State, ...]
) -> dict[str, Tensor]:
    """The rule's states in the form that the optimizer keeps, from quantized or float ones."""
    found = {key: tensors[key] for key in names_of(states) if key in tensors}
    is_to_be_quantized = precision.quantizes_states(param)
    dtype = torch.float32 if is_to_be_quantized else precision.float_state_dtype(param)
    if is_quantized(tensors, states):
        fits = all(is_dense(value) and same_layout(value, param) for value in found.values())
        if is_to_be_quantized and fits:
            return {**found, SCALES: tensors[SCALES].contiguous()}
        found = dequantized_states(tensors, states, dtype)
    if is_to_be_quantized:
        # Their float dtype does not matter: quantized_states() converts them to float32 a piece at a time.
        found = {key: like_param(value, param) for key, value in found.items()}
        return quantized_states(found, states) if found else found
    return {key: like_param(value.to(dtype), param) for key, value in found.items()}

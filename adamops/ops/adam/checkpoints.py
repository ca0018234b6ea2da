"""Tells from a checkpoint which other optimizer it is of, for the messages of Adam. Must not know how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Param group keys that only other optimizers have, even before their first step. Muon is before SGD, as it has both.
_KEYS_OF_OTHERS = {
    "ns_coefficients": "Muon",
    "ns_steps": "Muon",
    "clip_threshold": "Adafactor",
    "beta2_decay": "Adafactor",
    "lr_decay": "Adagrad",
    "lambd": "ASGD",
    "etas": "Rprop",
    "rho": "Adadelta",
    "alpha": "RMSprop",
    "max_iter": "LBFGS",
    "nesterov": "SGD",
}

# Names of state tensors that only other optimizers have.
_STATES_OF_OTHERS = {
    "momentum_buffer": "SGD or Muon",
    "acc_delta": "Adadelta",
    "square_avg": "RMSprop or Adadelta",
    "sum": "Adagrad",
    "exp_inf": "Adamax",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "variance": "Adafactor",
    "step_sizes": "Rprop",
    "step_size": "Rprop",
    "ax": "ASGD",
    "state1": "an optimizer of bitsandbytes",
}


def other_optimizer_of_group(group: Mapping[str, Any], missing: Sequence[str]) -> str | None:
    """The optimizer that a param group seems to be of, given which of Adam's settings it lacks."""
    others = [name for key, name in _KEYS_OF_OTHERS.items() if key in group]
    return others[0] if others else "Lion" if list(missing) == ["eps"] else None


def other_optimizer_of_state(state: Mapping[str, Any]) -> str | None:
    """The optimizer that the state of a param seems to be of, if it is not Adam."""
    others = [name for key, name in _STATES_OF_OTHERS.items() if key in state]
    if not others and state.keys() & {"exp_avg"} and state.keys() <= {"exp_avg", "step"}:
        others = ["Lion"]
    return others[0] if others else None

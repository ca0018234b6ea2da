"""Checks the settings of a param group. Each error shows the bad value and says what was expected.

Must not know what the settings do.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .memory import check_readable

_RATES = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}
FLAGS = ("bias_correction", "amsgrad", "maximize", "capturable")

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


def check_hyper(group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError or TypeError for an invalid hyper-parameter; `where` ends the message.

    A number may be a one-element tensor. Its value is read, so this waits for the GPU if the tensor is there.
    """
    check_numbers(group, where)
    for key, words in _RATES.items():
        if not float(group[key]) >= 0.0:
            raise ValueError(f"Invalid {words}: {group[key]}{where}; expected 0 or more")
    beta1, beta2 = group["betas"]
    check_betas(float(beta1), float(beta2), where)
    checked_seed(group.get("stochastic_rounding_seed"), where)


def checked_seed(seed: Any, where: str) -> int:
    """The seed of stochastic rounding as an int, 0 for None. Raises TypeError; `where` ends the message."""
    try:
        return 0 if seed is None else operator.index(seed)
    except TypeError:
        raise TypeError(f"Invalid stochastic_rounding_seed: {seed!r}{where}; expected an int, or None for 0") from None


def check_numbers(group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError or TypeError for a hyper-parameter that is not a number, or betas that are not two."""
    for key in _RATES:
        check_number(group[key], key, where)
    unpacked_betas(group["betas"], where)


def unpacked_betas(betas: Any, where: str) -> tuple[Any, Any]:
    """The two numbers in `betas`. Raises TypeError or ValueError if it is not two numbers."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise TypeError(f"Invalid betas: {betas!r}{where}; expected two numbers, such as (0.9, 0.999)") from None
    check_number(beta1, "betas[0]", where)
    check_number(beta2, "betas[1]", where)
    return beta1, beta2


def check_number(value: Any, name: str, where: str) -> None:
    """Raises TypeError or ValueError for what float() rejects, or accepts although it is not a number."""
    if type(value) is float:
        return
    if isinstance(value, Tensor):
        _check_number_in_tensor(value, name, where)
    elif isinstance(value, (str, bytes, bytearray)) or not hasattr(value, "__float__"):
        hint = ": take it out of its quotes, or write it as 1.0e-8 in YAML" if isinstance(value, str) else ""
        raise TypeError(f"Invalid {name}: {value!r}, a {type(value).__name__}{where}; expected a number{hint}")
    else:
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"Invalid {name}: {value!r}{where}; expected one number") from None


def _check_number_in_tensor(value: Tensor, name: str, where: str) -> None:
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, has shape {tuple(value.shape)}{where}")
    if value.is_complex():
        raise TypeError(f"Tensor {name} is {value.dtype}{where}; expected a real number")
    if value.device.type == "meta" or type(value).__name__ == "FakeTensor":
        raise ValueError(f"Tensor {name} has no value, as it is on the device meta or fake{where}; expected a number")
    check_readable(value, f"Tensor {name}{where}")


def check_betas(beta1: float, beta2: float, where: str) -> None:
    """Raises ValueError for a decay rate out of range."""
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}{where}; expected 0 <= beta < 1")


def check_flags(flags: Mapping[str, Any], where: str = "") -> None:
    """Raises TypeError for what is neither True nor False, such as an argument in the wrong position."""
    for name, value in flags.items():
        is_flag = isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
        if is_flag or type(value).__name__ in ("bool", "bool_"):  # NumPy's
            continue
        hint = ""
        if name == "bias_correction" and isinstance(value, (tuple, list)):
            hint = ". It stands before betas, as in DeepSpeed; pass betas by name"
        raise TypeError(f"Invalid {name}: {value!r}{where}; expected True or False{hint}")


def check_is_of_adam(group: Mapping[str, Any], index: int) -> None:
    """Raises ValueError for the param group of another optimizer's checkpoint; the message names that optimizer."""
    missing = [key for key in ("betas", "eps", "lr", "weight_decay") if key not in group]
    if not missing:
        return
    others = [name for key, name in _KEYS_OF_OTHERS.items() if key in group]
    other = others[0] if others else "Lion" if missing == ["eps"] else None
    raise ValueError(
        f"param group {index} has no {missing[0]}; this is not the state of an Adam optimizer"
        + (f", but looks like that of {other}" if other else "")
    )


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


def other_optimizer(state: Mapping[str, Any]) -> str | None:
    """The optimizer whose state this looks like, if it is not Adam."""
    others = [name for key, name in _STATES_OF_OTHERS.items() if key in state]
    if not others and state.keys() & {"exp_avg"} and state.keys() <= {"exp_avg", "step"}:
        others = ["Lion"]
    return others[0] if others else None

"""Checks the values of settings. Each error shows the bad value and says what was expected.

Must not know what the settings do.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .memory import check_readable


def checked_seed(seed: Any, where: str) -> int:
    """The seed of stochastic rounding as an int, 0 for None. Raises TypeError; `where` ends the message."""
    try:
        return 0 if seed is None else operator.index(seed)
    except (TypeError, RuntimeError):
        message = f"Invalid stochastic_rounding_seed: {shown(seed)}{where}; expected an int, or None for 0"
        raise TypeError(message) from None


def to_number(value: Any, name: str, where: str = "") -> Any:
    """A hyper-parameter as a float. A tensor on a GPU stays as it is, since float() would wait for the GPU.

    Raises TypeError or ValueError for a value that is not a number; `where` ends the message.
    """
    if type(value) is float:
        return value
    check_number(value, name, where)
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


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


def check_flags(flags: Mapping[str, Any], where: str = "", hint: str = "") -> None:
    """Raises TypeError for what is neither True nor False; `where` and `hint` end the message."""
    for name, value in flags.items():
        if value is True or value is False:
            continue
        is_flag = isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
        if is_flag or type(value).__name__ in ("bool", "bool_"):  # NumPy's
            continue
        raise TypeError(f"Invalid {name}: {shown(value)}{where}; expected True or False{hint}")


def shown(value: Any) -> str:
    """A value in a message. Elements of tensors are not shown: they may have no memory."""
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)

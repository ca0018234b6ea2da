"""Runs a function in the default floating-point environment of the calling thread: nearest-even, subnormals kept.

The compiled ops see to that themselves. This is for what is computed around them in pure PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ... import op_builder

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_default_float_environment(function: _Function) -> _Function:
    """The function, during which the calling thread neither flushes subnormals nor rounds otherwise than to nearest.

    It takes the compiled CPU op to set that; without it the function is called as it is, as pure PyTorch then does the
    updates, whose bits nobody promises.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        module = op_builder.get("cpu_adam").loaded()
        if module is None:
            return function(*args, **kwargs)
        before = module.set_float_control(module.DEFAULT_FLOAT_CONTROL)
        try:
            return function(*args, **kwargs)
        finally:
            module.set_float_control(before)

    return cast(_Function, wrapped)

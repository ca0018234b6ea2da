"""Runs a function in the default floating-point environment: round to nearest even, keep subnormals.

The compiled ops set this themselves. This is for what is computed around them in pure PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .. import op_builder

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_default_float_environment(function: _Function) -> _Function:
    """Wraps a function so that the calling thread keeps subnormals and rounds to nearest while it runs.

    Only the compiled CPU op can set this. Without the op, the function runs as it is: the updates then fall back to
    pure PyTorch, which is not guaranteed to be bit-identical.
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

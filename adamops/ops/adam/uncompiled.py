"""Keeps torch.compile out of methods that it cannot compile: it breaks its graph there, calls them, and goes on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])

WHY = "optimizers of adamops call an op that is compiled already"  # what torch.compile(fullgraph=True) says


def uncompiled(method: _Method) -> _Method:
    """The method with all that it calls hidden from torch.compile.

    Otherwise torch.compile looks into each function of the step for what it can compile, finds nothing, and takes many
    seconds and warnings for that. torch.compiler.disable() alone would not do: it imports torch._dynamo, which takes a
    second, and torch.compile(optimizer.step) would look behind it, for the method without its object.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(method)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:  # so nothing is being compiled
                return method(*args, **kwargs)
            disabled = torch.compiler.disable(method)
            disabled._torchdynamo_disable_msg = WHY  # type: ignore[attr-defined]
        return disabled(*args, **kwargs)

    return cast(_Method, hidden)

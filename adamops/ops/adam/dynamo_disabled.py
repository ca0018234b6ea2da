"""Keeps torch.compile out of methods that it cannot compile: it breaks its graph there, calls them, and goes on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])

WHY = "optimizers of adamops call an op that is compiled already"  # what torch.compile(fullgraph=True) says


def dynamo_disabled(method: _Method) -> _Method:
    """The method with all that it calls hidden from torch.compile.

    Otherwise torch.compile looks into each function of the step for what it can compile, finds nothing, and takes
    seconds and warnings for that. torch hides methods of its own by the function used here. It alone would not do: at
    its first call it imports torch._dynamo, which takes a second. Nor would torch.compiler.disable(), behind which
    torch.compile(optimizer.step) looks for the method without its object.
    """
    disabled = torch._disable_dynamo(method)
    disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, WHY  # type: ignore[attr-defined]

    @functools.wraps(method)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)  # nothing is being compiled

    return cast(_Method, hidden)

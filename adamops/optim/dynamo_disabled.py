"""Keeps torch.compile out of methods that it cannot compile: it breaks the graph, calls them, and goes on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])

WHY = "optimizers of adamops call an op that is compiled already"  # shown by torch.compile(fullgraph=True)


def dynamo_disabled(method: _Method) -> _Method:
    """Hides the method, and all that it calls, from torch.compile.

    Otherwise torch.compile searches every function of the step for something to compile and finds nothing, at the cost
    of seconds and warnings. torch hides its own methods with the function used here. That function alone is not enough:
    its first call imports torch._dynamo, which takes a second. Nor is torch.compiler.disable(): behind it,
    torch.compile(optimizer.step) looks up the method without its object.
    """
    disabled = torch._disable_dynamo(method)
    disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, WHY  # type: ignore[attr-defined]

    @functools.wraps(method)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)  # nothing is being compiled

    return cast(_Method, hidden)

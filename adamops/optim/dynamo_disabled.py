"""Keeps torch.compile out of methods that it cannot compile: it breaks the graph, calls them, and goes on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .. import _torch_compat

_Method = TypeVar("_Method", bound=Callable[..., Any])

WHY = "optimizers of adamops call an op that is compiled already"  # shown by torch.compile(fullgraph=True)


def dynamo_disabled(method: _Method) -> _Method:
    """Hides the method, and all that it calls, from torch.compile.

    Otherwise torch.compile searches every function of the step for something to compile and finds nothing, at the cost
    of seconds and warnings. torch hides its own methods with the function used here. That function alone is not enough:
    its first call imports torch._dynamo, which takes a second. Nor is torch.compiler.disable(): behind it,
    torch.compile(optimizer.step) looks up the method without its object.
    """
    disabled = _torch_compat.disable_dynamo(method, WHY)

    @functools.wraps(method)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        if _torch_compat.may_compile():
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)  # nothing is being compiled

    return cast(_Method, hidden)


def unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Strips the guard that hides a method of Optimizer from torch.compile, unless something may be compiling.

    At its first call the guard imports torch._dynamo, which takes about a second. If nobody has imported that yet,
    nothing is being compiled, and there is nothing to hide from.
    """
    return method if _torch_compat.may_compile() else inspect.unwrap(method)

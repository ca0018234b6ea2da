"""Wraps step() with hooks and profiler events, at a lower cost than torch's wrapper where neither is in use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from .. import _torch_compat


def profiled(step: Callable[..., Any], steps_in_backward: Callable[[Any], bool]) -> Callable[..., Any]:
    """Wraps step() as Optimizer.profile_hook_step() does.

    torch's wrapper records a profiler event whether or not a profiler runs, which takes 10 of the 27 microseconds of a
    step over a few small params. Here it is called only if torch.profiler runs or there are hooks. Otherwise the event
    is recorded the way torch does it in code that it compiles, for profilers that are started from outside. (An
    ExecutionTraceObserver by itself, without torch.profiler.profile(), misses it.) `steps_in_backward` says whether the
    backward pass updates all params of an optimizer, so that step() has nothing to do.
    """
    hooked = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _torch_compat.is_watched(self):
            if steps_in_backward(self):  # the backward pass has run the hooks
                return step(self, *args, **kwargs)
            return hooked(self, *args, **kwargs)
        with _torch_compat.record_event(f"Optimizer.step#{type(self).__name__}.step"):
            return step(self, *args, **kwargs)

    return wrapper

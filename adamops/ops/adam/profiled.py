"""step() with its hooks, and as profilers see it, for less than torch's wrapper takes where there is neither."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_record_event = getattr(torch._C._profiler, "_RecordFunctionFast", None)


def profiled(step: Callable[..., Any], steps_in_backward: Callable[[Any], bool]) -> Callable[..., Any]:
    """What Optimizer.profile_hook_step() makes of step().

    That notes an event for profilers whether one runs or not, which takes 10 of the 27 microseconds of a step of a few
    small params. Here torch's wrapper is called if torch.profiler runs or if there are hooks; otherwise the event is
    noted the way torch does it in code that it compiles, for profilers that are started from outside. (An
    ExecutionTraceObserver by itself, without torch.profiler.profile(), misses it.) `steps_in_backward` says whether all
    params of an optimizer are updated in the backward pass, and step() has nothing to do.
    """
    hooked = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            _record_event is None
            or getattr(profiler, "_is_profiler_enabled", True)
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
        ):
            if steps_in_backward(self):  # each backward pass has run the hooks
                return step(self, *args, **kwargs)
            return hooked(self, *args, **kwargs)
        with _record_event(f"Optimizer.step#{type(self).__name__}.step"):
            return step(self, *args, **kwargs)

    return wrapper

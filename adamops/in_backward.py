"""Updates each param inside the backward pass, as soon as its grad is there, so that few grads exist at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .ops.adam.optimizer import AdamOptimizer


class InBackward:
    """The hooks of step_in_backward()."""

    def __init__(self, model: nn.Module, optimizer: AdamOptimizer) -> None:
        self._optimizer = optimizer
        self._accumulates = False
        places = {
            param: (g, i) for g, group in enumerate(optimizer.param_groups) for i, param in enumerate(group["params"])
        }
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        missing = [name for name, param in trained if param not in places]
        if missing:
            raise ValueError(
                f"The optimizer does not have the param {missing[0]!r} of the model; give it all, or freeze it"
            )
        self._hooks = [
            param.register_post_accumulate_grad_hook(lambda param, place=places[param]: self._step(param, place))
            for _, param in trained
        ]

    def _step(self, param: Tensor, place: tuple[int, int]) -> None:
        if not self._accumulates:
            self._optimizer.step_param(*place)
            param.grad = None

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add to the grads; the next one outside steps with their sum."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def remove(self) -> None:
        """Takes the hooks away: step() is for the caller again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def step_in_backward(model: nn.Module, optimizer: AdamOptimizer) -> InBackward:
    """Has each backward pass of `model` update its params with `optimizer`, and free each grad once it is used.

    Results are the bits of a backward pass followed by ``optimizer.step()``. That call is then left out, or does
    nothing, as no grads are left. What needs all grads at once cannot be had: clip_grad_norm_(), a loss scaled by
    torch.amp.GradScaler, and grads added up over several backward passes, but for those inside ``handle.accumulate()``.

    Parameters
    ----------
    model
        Its params that require grads must all be the optimizer's.
    optimizer
        A DeepSpeedCPUAdam or FusedAdam.

    Returns
    -------
    A handle: ``accumulate()`` is a context in which grads only add up, ``remove()`` ends it all.

    Raises
    ------
    ValueError
        If a param of the model is not the optimizer's.
    TypeError
        For another optimizer. What is wrong with a grad is raised by the backward pass.
    """
    if not isinstance(optimizer, AdamOptimizer):
        raise TypeError(f"step_in_backward() takes DeepSpeedCPUAdam or FusedAdam, not {type(optimizer).__name__}")
    return InBackward(model, optimizer)

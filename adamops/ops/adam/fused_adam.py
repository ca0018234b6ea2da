"""FusedAdam: Adam and AdamW with the arguments of deepspeed.ops.adam.FusedAdam and apex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .optimizer import AdamOptimizer


class FusedAdam(AdamOptimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) and AdamW (arXiv 1711.05101, Algorithm 2) for all params of a group at once.

    A drop-in for ``deepspeed.ops.adam.FusedAdam`` and ``apex.optimizers.FusedAdam``, and a true
    ``torch.optim.Optimizer``. Unlike there, step counts are kept for each param, so that a param that joins late, or
    has no grad in some steps, gets its own bias correction; and `amsgrad` and `maximize` work.

    Parameters
    ----------
    params
        Params to optimise, or dicts of param groups. Each param is a dense tensor in host memory, of float32, bfloat16
        or float16, with a grad of the same dtype or float32. States are float32.
    lr, bias_correction, betas, eps, weight_decay, amsgrad, maximize
        As in DeepSpeedCPUAdam.
    adam_w_mode
        AdamW if true, Adam with L2 otherwise.
    set_grad_none
        Whether zero_grad() sets the grads to None, or to zero.

    Raises
    ------
    ValueError, TypeError
        As DeepSpeedCPUAdam.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        *,
        maximize: bool = False,
    ) -> None:
        self.set_grad_none = set_grad_none
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, adam_w_mode=adam_w_mode)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Sets the grads to None, or to zero, as `set_grad_none` says unless `set_to_none` is given."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: None = None,
        output_params: None = None,
        scale: None = None,
        grad_norms: None = None,
    ) -> Any:
        """Updates all params that have a grad, as DeepSpeedCPUAdam.step().

        The arguments after `closure` are those of apex before 2019, which nobody supports any more. There is no
        `grad_scaler` among them, as torch.amp.GradScaler would take it for a sign of its own old protocol.

        Raises
        ------
        RuntimeError
            For an argument besides `closure`.
        """
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedAdam.step() takes a closure only; put the grads into param.grad, scale the loss with "
                "torch.amp.GradScaler, and copy the params after the step"
            )
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("set_grad_none", True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "set_grad_none": self.set_grad_none}

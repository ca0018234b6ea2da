"""FusedAdam: Adam and AdamW with the arguments of deepspeed.ops.adam.FusedAdam and apex, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...optim.settings import check_flags
from .adam_optimizer import AdamOptimizer


class FusedAdam(AdamOptimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) and AdamW (arXiv 1711.05101, Algorithm 2) for all params of a group at once.

    A drop-in replacement for ``deepspeed.ops.adam.FusedAdam`` and ``apex.optimizers.FusedAdam``, and a true
    ``torch.optim.Optimizer``. Unlike in those, step counts are kept per param, so a param that joins late, or has no
    grad in some steps, gets its own bias correction. `amsgrad` and `maximize` work too.

    Under torch.amp.GradScaler, step counts of params on CUDA devices are kept on the device, as only the device knows
    whether a step is skipped.

    Parameters
    ----------
    params
        Params to optimize, or dicts of param groups. Each param is a dense tensor in float32, bfloat16 or float16 on
        any device. Dtypes of grads are as in DeepSpeedCPUAdam; states are float32 by default. The CUDA op updates
        params on CUDA devices, the CPU op those on the CPU. Others are updated in pure PyTorch, with a warning.
    lr, bias_correction, betas, eps, weight_decay, amsgrad, maximize
        As in DeepSpeedCPUAdam.
    adam_w_mode
        AdamW if true, Adam with L2 otherwise.
    set_grad_none
        Whether zero_grad() sets the grads to None rather than to zero.
    capturable
        Whether steps on CUDA devices are CUDA-graph capturable. Step counts are then kept on the device (as 0-dim
        float32 tensors), as is `lr` if it is a tensor there, and nothing waits for the device. Do one step before
        capturing. Has no effect on the CPU.
    master_weights
        Whether bfloat16 and float16 params have float32 master weights (``state["master_param"]``). The step updates
        these, and the params are rounded copies of them. A param changed other than by step() is overwritten by the
        next step.
    state_dtype, master_weight_bits, stochastic_rounding, stochastic_rounding_seed
        As in DeepSpeedCPUAdam.

    Raises
    ------
    ValueError, TypeError
        As in DeepSpeedCPUAdam.
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
        capturable: bool = False,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        stochastic_rounding_seed: int | None = None,
    ) -> None:
        check_flags({"set_grad_none": set_grad_none})
        self.set_grad_none = set_grad_none
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            maximize=maximize,
            adam_w_mode=adam_w_mode,
            capturable=capturable,
            master_weights=master_weights,
            state_dtype=state_dtype,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            stochastic_rounding_seed=stochastic_rounding_seed,
        )

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Sets the grads to None or to zero, as `set_to_none` says if given, else as `set_grad_none` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: None = None,
        output_params: None = None,
        scale: None = None,
        grad_norms: None = None,
        *,
        zero_grads: bool = False,
        lowp_out: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Updates all params that have a grad, as DeepSpeedCPUAdam.step() does.

        The arguments after `closure` are those of apex before 2019, which nothing supports any more. There is no
        `grad_scaler` among them, because torch.amp.GradScaler would take it as a sign of its own old protocol.

        Raises
        ------
        RuntimeError
            If one of those arguments is given.
        """
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedAdam.step() takes a closure only; put the grads into param.grad, scale the loss with "
                "torch.amp.GradScaler, and copy the params after the step"
            )
        return super().step(closure, zero_grads=zero_grads, lowp_out=lowp_out)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("set_grad_none", True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "set_grad_none": self.set_grad_none}

"""FusedAdam: Adam and AdamW with the arguments of deepspeed.ops.adam.FusedAdam and apex, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import op_builder
from .backend import Backend
from .cuda_backend import CudaBackend
from .hyper import AdamHyper
from .optimizer import AdamOptimizer, pure_pytorch
from .settings import check_flags


def _load_backend(device: torch.device) -> Backend:
    """The compiled op for params on a device that is not the host, or pure PyTorch with one warning that says why."""
    if device.type != "cuda" or torch.version.hip:
        return pure_pytorch(f"No op is compiled for params on {'AMD GPUs' if torch.version.hip else device.type}.")
    builder: Any = op_builder.get("fused_adam")
    try:
        return CudaBackend(builder.load_for_device(device.index), device)
    except op_builder.OpUnavailableError as error:
        return pure_pytorch(str(error))


class FusedAdam(AdamOptimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) and AdamW (arXiv 1711.05101, Algorithm 2) for all params of a group at once.

    A drop-in for ``deepspeed.ops.adam.FusedAdam`` and ``apex.optimizers.FusedAdam``, and a true
    ``torch.optim.Optimizer``. Unlike there, step counts are kept for each param, so that a param that joins late, or
    has no grad in some steps, gets its own bias correction; and `amsgrad` and `maximize` work.

    Parameters
    ----------
    params
        Params to optimise, or dicts of param groups. Each param is a dense tensor of float32, bfloat16 or float16 on
        any device, with a grad of the same dtype or float32. States are float32. Params on CUDA devices are updated by
        the CUDA op, those on the CPU by the CPU op, and others, with a warning, in pure PyTorch.
    lr, bias_correction, betas, eps, weight_decay, amsgrad, maximize
        As in DeepSpeedCPUAdam.
    adam_w_mode
        AdamW if true, Adam with L2 otherwise.
    set_grad_none
        Whether zero_grad() sets the grads to None, or to zero.
    capturable
        Whether steps on CUDA devices may be captured into CUDA graphs: step counts are then kept there (as 0-dim
        float32 tensors), and so is `lr` if it is a tensor there, and nothing waits for the device. Do one step before
        capturing. Without effect on the CPU.
    master_weights
        Whether bfloat16 and float16 params have a float32 master (``state["master_param"]``) that is updated, and of
        which they are rounded copies; a param that is changed otherwise than by step() is overwritten by the next.
    state_dtype, master_weight_bits, stochastic_rounding, stochastic_rounding_seed
        As in DeepSpeedCPUAdam.

    Under torch.amp.GradScaler, step counts of params on CUDA devices are kept there too, as the device alone knows
    whether a step is skipped.

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
        """Sets the grads to None, or to zero, as `set_grad_none` says unless `set_to_none` is given."""
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
        """Updates all params that have a grad, as DeepSpeedCPUAdam.step().

        The arguments after `closure` are those of apex before 2019, which nobody supports any more. There is no
        `grad_scaler` among them, as torch.amp.GradScaler would take it for a sign of its own old protocol.

        Raises
        ------
        RuntimeError
            For one of those arguments.
        """
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedAdam.step() takes a closure only; put the grads into param.grad, scale the loss with "
                "torch.amp.GradScaler, and copy the params after the step"
            )
        return super().step(closure, zero_grads=zero_grads, lowp_out=lowp_out)

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        device = param.device
        if device not in self._backends:
            self._backends[device] = _load_backend(device)
        return self._backends[device]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("set_grad_none", True)
        for i, group in enumerate(self.param_groups):
            if group.setdefault("capturable", False):
                self._place_step_counts(group, f"param group {i}")

    def _place_step_counts(self, group: dict[str, Any], where: str) -> None:
        """Moves loaded step counts to where a captured step will look for them."""
        hyper = AdamHyper.of_group(group, f" in {where}", adamw_mode=self.adam_w_mode)
        for i, param in enumerate(group["params"]):
            state = self.state.get(param)
            if state and "step" in state:
                backend = self._backend_of(param, f"{where}, param {i}")
                state["step"] = backend.new_step_count(hyper, state["step"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "set_grad_none": self.set_grad_none}

"""DeepSpeedCPUAdam: Adam and AdamW for params on the CPU, as in deepspeed.ops.adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...optim.async_step import after_async_step
from ...optim.backends.base import Backend
from ...optim.backends.loading import plugin_backend
from ...optim.batch import Batch, check_on_cpu, check_params_and_grads, check_states
from ...optim.commit import commit
from ...optim.interrupts import deferred_signals
from ...optim.settings import check_flags
from ...optim.step import GroupStep, add_batch, evaluate
from .adam_optimizer import AdamOptimizer
from .rollback import undo_step


class DeepSpeedCPUAdam(AdamOptimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) and AdamW (arXiv 1711.05101, Algorithm 2) on the CPU, in a single pass.

    A drop-in replacement for ``deepspeed.ops.adam.DeepSpeedCPUAdam`` and a true ``torch.optim.Optimizer``. Each step is
    one parallel region per param group, on torch's own threads. Results are bit-identical on every CPU, for any number
    of threads, and however the elements are split into tensors (except with 8-bit states or stochastic rounding, whose
    noise depends on the position in the tensor).

    Parameters
    ----------
    model_params
        Params to optimize, or dicts of param groups, which may have their own settings, including those of precision.
        Each param is a dense tensor on the CPU of any shape and strides, in float32, bfloat16 or float16; a frozen one
        may be of any kind. Its grad has the same dtype or float32; that of a float32 param may have any of the three.
    lr
        Learning rate, 0 or more; a float or a 0-dim tensor.
    bias_correction
        Whether to correct the averages for being initialized to zero.
    betas
        Decay rates of the two averages, each in [0, 1).
    eps
        Added to the denominator, 0 or more.
    weight_decay
        0 or more. With `adamw_mode` the param is multiplied by ``1 - lr * weight_decay``; otherwise ``weight_decay *
        param`` is added to the grad (L2).
    amsgrad
        Whether to use the maximum of all second moments so far (arXiv 1904.09237, Algorithm 2).
    adamw_mode
        AdamW if true, Adam with L2 otherwise.
    fp32_optimizer_states
        Whether states are float32 for params of every dtype. If false, 16-bit params have bfloat16 states, as with
        `state_dtype`. (DeepSpeed has float16 states for float16 params; in these, squares of small grads become zero.)
    maximize
        Whether to maximize the objective instead of minimizing it.
    state_dtype
        torch.float32, torch.bfloat16, or ``"8bit"``: quantized to 8 bits, with a scale for each 256 elements
        (adamops.optim.state.quantization), for params of 4096 elements or more. A step rounds averages to bfloat16 or 8
        bits with noise that evens out over the steps; rounding to the nearest would lose small changes for good. The
        default follows `fp32_optimizer_states`.
    master_weight_bits
        24 or 32, for split master weights: each 16-bit param has a remainder of 8 or 16 more bits in its state,
        ``"param_remainder"``, and is updated as a number of 24 or 32 bits. With 32, bfloat16 params are the float32
        params of the same training, rounded.
    stochastic_rounding
        Whether 16-bit params, or their 24-bit masters, are rounded at random to one of the two nearest numbers, so that
        updates too small for their precision count on average. The random bits depend on the seed, the index of the
        param group, the index of the param in it, the step, and the position in the param. They do not depend on
        threads or on torch's generator.
    stochastic_rounding_seed
        An int, by default 0. It is also a setting of a param group, and so part of the state dict. Replicas of a param
        must have the same seed.

    Raises
    ------
    ValueError
        For a hyper-parameter out of range, or a param whose elements overlap or leave gaps.
    TypeError
        For a param of another dtype or layout, or a setting of another type.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        stochastic_rounding_seed: int | None = None,
    ) -> None:
        check_flags({"adamw_mode": adamw_mode})
        super().__init__(
            model_params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            maximize=maximize,
            adam_w_mode=adamw_mode,
            fp32_optimizer_states=fp32_optimizer_states,
            state_dtype=state_dtype,
            master_weight_bits=master_weight_bits,
            stochastic_rounding=stochastic_rounding,
            stochastic_rounding_seed=stochastic_rounding_seed,
        )

    @after_async_step
    @torch.no_grad()
    def step_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the one param that has a grad, with the state stored under `subgroup_id` instead of under the param.

        This is how DeepSpeed's ZeRO-3 and SuperOffload lend the optimizer one flat shard after another, each time as
        the only param with a grad.

        Raises
        ------
        ValueError
            If not exactly one param has a grad, or as in step().
        """
        loss = evaluate(closure)
        self._settle()  # the closure may have started a step in the background
        batch = self._subgroup_batch(subgroup_id)
        held = self.state.get(subgroup_id)  # type: ignore[call-overload]
        batch.states, batch.owners = [held or {}], batch.params
        step = GroupStep([])
        add_batch(self, step, self._backend_of(batch.params[0], batch.names[0]), batch)
        step.new_states = [(subgroup_id, state) for _, state in step.new_states]
        commit(self.state, [step])
        return loss

    @after_async_step
    @torch.no_grad()
    def rollback_subgroup(self, sub_group_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Undoes the last step_subgroup() of `sub_group_id`, given the grad and hyper-parameters of that step.

        The update is inverted arithmetically in float64, not restored from a copy; adamops.ops.adam.rollback states the
        error bounds. The state before the first step, which is zero, is restored exactly.

        Raises
        ------
        RuntimeError
            If there is no step to undo, or it cannot be undone (amsgrad or a beta of 0 loses the former values).
        ValueError
            If not exactly one param has a grad, or as in step().
        """
        loss = evaluate(closure)
        self._settle()
        state = self.state.get(sub_group_id)  # type: ignore[call-overload]
        if not state:
            raise RuntimeError(f"Cannot roll back subgroup {sub_group_id}: it was never stepped")
        batch = self._subgroup_batch(sub_group_id)
        (param,), (grad,) = batch.params, batch.grads
        missing = [key for key in ("step", *batch.state_dtypes(param)) if key not in state]
        if missing:
            raise RuntimeError(f"Cannot roll back subgroup {sub_group_id}: its state has no {missing[0]!r}")
        batch.states = [state]
        check_states(batch)
        if int(state["step"]) < 1:
            raise RuntimeError(f"Cannot roll back subgroup {sub_group_id}: all its steps have been undone")
        with deferred_signals():
            undo_step(param, grad, state, batch.settings)
            state["step"] -= 1
        return loss

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        device = param.device
        if device.type != "cpu" and device not in self._backends:
            backend = plugin_backend(self.rule, device)
            if backend is None:
                check_on_cpu(param, name)  # raises
            else:
                self._backends[device] = backend
        return super()._backend_of(param, name)

    def _subgroup_batch(self, subgroup_id: int) -> Batch:
        """A batch of the only param that has a grad, checked, without its state."""
        found = [
            (group, param, grad)
            for group in self.param_groups
            for param in group["params"]
            if (grad := param.grad) is not None
        ]
        if len(found) != 1:
            raise ValueError(
                f"a subgroup is the one param that has a grad, but {len(found)} have one; "
                "use step() to update many, or set the other grads to None"
            )
        ((group, param, grad),) = found
        where = f"subgroup {subgroup_id}"
        batch = Batch([where], self._step_settings(group, where), [param], [grad], [])
        check_on_cpu(param, where)
        check_params_and_grads(batch)
        return batch


CPUAdam = DeepSpeedCPUAdam

"""Undoes one step of Adam by arithmetic, for DeepSpeed's SuperOffload, which steps before it knows the global norm.

The update rule is inverted in float64 from the grad, the hyper-parameters and the state after the step. Rounding in the
step itself cannot be undone, so the former values are restored to within these bounds (u is half an ulp of the stored
dtype, 2**-24 for float32; `former` is the value before the step):

    exp_avg      |error| <= 4u * max(|exp_avg|, |grad|) / beta1
    exp_avg_sq   |error| <= 4u * max(exp_avg_sq, grad**2) / beta2
    param        |error| <= 4u * (|former| + |former - param|) / (1 - lr * weight_decay), in AdamW mode and without
    decay

tests/test_subgroup.py measures them. The state before the first step is known to be zero, and is restored exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...optim.float_environment import in_default_float_environment
from ...optim.memory import check_writable
from ...optim.pieces import each_piece
from ...optim.step_settings import StepSettings
from .adam import AdamScalars


@in_default_float_environment
def undo_step(param: Tensor, grad: Tensor, state: dict[str, Any], settings: StepSettings) -> None:
    """Restores param, exp_avg and exp_avg_sq in place; the caller has checked them, and decrements the step count.

    Raises RuntimeError, before anything is written, if the step lost what is needed to undo it, and ValueError if a
    tensor is not writable.
    """
    if settings.precision.stochastic_rounding or settings.precision.master or state["exp_avg"].dtype == torch.int8:
        raise RuntimeError("Cannot roll back a step with 8-bit states, master weights or stochastic rounding")
    step = int(state["step"])
    first = step == 1
    keys = [kind.name for kind in settings.states]
    if not first and "max_exp_avg_sq" in keys:
        raise RuntimeError("Cannot roll back a step with amsgrad: it does not say what max_exp_avg_sq was before")
    _, beta1, beta2, *_ = settings.hyper
    if not first and 0.0 in (beta1, beta2):
        raise RuntimeError("Cannot roll back a step with a beta of 0: nothing is left of the former average")
    exact = torch.tensor(settings.scalars(step), dtype=torch.float32, device="cpu")
    grad_scale, *scalars = exact.double().tolist()
    k = AdamScalars._make(scalars)
    if k.decay == 0.0:
        raise RuntimeError("Cannot roll back a step with lr * weight_decay = 1: nothing is left of the former param")
    for tensor in (param, *(state[key] for key in keys)):
        check_writable(tensor, "what a roll-back is to write")
    for piece in each_piece(param, grad, *(state[key] for key in keys)):
        _undo_piece(*piece, k=k, grad_scale=grad_scale, first=first)


def _undo_piece(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    k: AdamScalars,
    grad_scale: float,
    first: bool,
) -> None:
    m, v = exp_avg.double(), exp_avg_sq.double()
    largest_v = v if max_exp_avg_sq is None else max_exp_avg_sq.double()
    denominator = largest_v.sqrt() * k.inverse_sqrt_bias2 + k.eps
    # With eps = 0 and a grad of zero, 0 / 0 made the param NaN in the step; there is nothing better to return.
    former = (param.double() - k.negative_step_size * (m / denominator)) / k.decay
    gradient = grad.double() * grad_scale + k.l2 * former
    param.copy_(former)
    if first:
        for average in (exp_avg, exp_avg_sq, max_exp_avg_sq):
            if average is not None:
                average.zero_()
    else:
        exp_avg.copy_((m - k.one_minus_beta1 * gradient) / k.beta1)
        exp_avg_sq.copy_(((v - k.one_minus_beta2 * gradient * gradient) / k.beta2).clamp_(min=0.0))

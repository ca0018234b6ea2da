"""Undoes one step of Adam by arithmetic, for DeepSpeed's SuperOffload, which steps before it knows the global norm.

The update rule is inverted in float64 from the grad, the hyper-parameters and the state after the step. Rounding in the
step itself cannot be undone, so the former values come back to within these bounds (u is half an ulp of the stored
dtype, 2**-24 for float32; `former` are the values before the step):

    exp_avg      |error| <= 4u * max(|exp_avg|, |grad|) / beta1
    exp_avg_sq   |error| <= 4u * max(exp_avg_sq, grad**2) / beta2
    param        |error| <= 4u * (|former| + |former - param|) / (1 - lr * weight_decay), in AdamW mode and without
    decay

measured in tests/test_subgroup.py. The state before the first step is known, zero, and restored exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hyper import AdamHyper


def undo_step(param: Tensor, grad: Tensor, state: dict[str, Any], hyper: AdamHyper) -> None:
    """Restores param, exp_avg and exp_avg_sq in place; the caller decrements the step count.

    Raises RuntimeError, before anything is written, if the step left too little behind to be undone.
    """
    step, first = state["step"], state["step"] == 1
    if not first and hyper.amsgrad:
        raise RuntimeError("Cannot roll back a step with amsgrad: it does not say what max_exp_avg_sq was before")
    if not first and 0.0 in (hyper.beta1, hyper.beta2):
        raise RuntimeError("Cannot roll back a step with a beta of 0: nothing is left of the former average")
    names = ("scale", "beta1", "c1", "beta2", "c2", "negative_step_size", "inverse_sqrt_bias2", "eps", "decay", "l2")
    k = dict(zip(names, torch.tensor(hyper.scalars(step), dtype=torch.float32).double().tolist(), strict=True))
    if k["decay"] == 0.0:
        raise RuntimeError("Cannot roll back a step with lr * weight_decay = 1: nothing is left of the former param")
    exp_avg, exp_avg_sq = state["exp_avg"].double(), state["exp_avg_sq"].double()
    largest_sq = state["max_exp_avg_sq"].double() if hyper.amsgrad else exp_avg_sq

    denominator = largest_sq.sqrt() * k["inverse_sqrt_bias2"] + k["eps"]
    # 0 / 0, with eps = 0 and a grad of zero, made the param NaN in the step; there is nothing better to return.
    former = (param.double() - k["negative_step_size"] * (exp_avg / denominator)) / k["decay"]
    gradient = grad.double() * k["scale"] + k["l2"] * former
    if first:
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if hyper.amsgrad else [])):
            state[key].zero_()
    else:
        state["exp_avg"].copy_((exp_avg - k["c1"] * gradient) / k["beta1"])
        state["exp_avg_sq"].copy_(((exp_avg_sq - k["c2"] * gradient * gradient) / k["beta2"]).clamp_(min=0.0))
    param.copy_(former)

"""Adam and AdamW: the rule that the engine in adamops.optim runs.

The other side is csrc/rules/adam.h. Must not know how a step is done, nor about tensors except in update(): what
may be one is used only as a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...optim.rule import DecayRates, Flag, Rate, Rule, Setting, State, integer_power
from ...optim.step_settings import StepSettings
from . import checkpoints


class AdamScalars(NamedTuple):
    """The scalars of one step in the order of Adam::Scalars in csrc/rules/adam.h, which says what each is.

    There the engine's grad_scale comes before them. They are doubles here, to be rounded to float once.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    negative_step_size: float
    inverse_sqrt_bias2: float
    eps: float
    decay: float
    l2: float


_BETAS = DecayRates("betas", (0.9, 0.999))


class AdamRule(Rule):
    """Adam (arXiv 1412.6980, Algorithm 1) with L2 weight decay, or AdamW (arXiv 1711.05101, Algorithm 2)."""

    described = "an Adam optimizer"
    states = (
        State("exp_avg"),
        State("exp_avg_sq", signed=False),
        # A maximum that stays is a bfloat16 already, and noise would raise the others.
        State("max_exp_avg_sq", signed=False, rounding="nearest", optional=True),
    )
    settings: ClassVar[tuple[Setting, ...]] = (
        Rate("lr", "learning rate"),
        _BETAS,
        Rate("eps", "epsilon value"),
        Rate("weight_decay", "weight_decay value"),
        Flag("bias_correction", True, ". It stands before betas, as in DeepSpeed; pass betas by name"),
        Flag("amsgrad"),
    )
    hyper_names = ("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "adamw_mode")
    ops = {"cpu": "cpu_adam", "cuda": "fused_adam"}  # noqa: RUF012 - a constant

    def __init__(self, adamw_mode: bool) -> None:
        self._adamw_mode = adamw_mode
        self._mode = 1.0 if adamw_mode else 0.0

    def __str__(self) -> str:
        return "AdamW: decoupled weight decay" if self._adamw_mode else "Adam: weight decay added to the grads"

    def states_of(self, group: Mapping[str, Any]) -> tuple[State, ...]:
        return self.states if group["amsgrad"] else _WITHOUT_AMSGRAD

    def hyper_of_group(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        betas = group["betas"]
        beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else _BETAS.unpacked(betas, where)
        lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
        # This is done at each step, and saves calls: most numbers are floats already.
        if type(beta1) is not float or type(beta2) is not float or not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            beta1, beta2 = _BETAS.numbers(group, where, to_number)
        return (
            lr if type(lr) is float else to_number(lr, "lr", where),
            beta1,
            beta2,
            eps if type(eps) is float else float(to_number(eps, "eps", where)),
            weight_decay if type(weight_decay) is float else float(to_number(weight_decay, "weight_decay", where)),
            1.0 if group.get("bias_correction", True) else 0.0,
            self._mode,
        )

    def scalars(self, hyper: tuple[float, ...], step: int) -> AdamScalars:
        lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode = hyper
        bias1 = 1.0 - integer_power(beta1, step) if bias_correction else 1.0
        bias2 = 1.0 - integer_power(beta2, step) if bias_correction else 1.0
        return AdamScalars(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            negative_step_size=-lr / bias1,
            inverse_sqrt_bias2=1.0 / math.sqrt(bias2),
            eps=eps,
            decay=1.0 - lr * weight_decay if adamw_mode else 1.0,
            l2=0.0 if adamw_mode else weight_decay,
        )

    def update(self, k: AdamScalars, param: Tensor, grad: Tensor, states: dict[str, Tensor]) -> Tensor:
        """start() and finish() of csrc/rules/adam.h in pure PyTorch."""
        if k.l2:
            grad = grad + k.l2 * param
        exp_avg = states["exp_avg"] = k.beta1 * states["exp_avg"] + k.one_minus_beta1 * grad
        largest_v = states["exp_avg_sq"] = k.beta2 * states["exp_avg_sq"] + k.one_minus_beta2 * grad * grad
        if "max_exp_avg_sq" in states:
            largest_v = states["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], largest_v)
        denominator = largest_v.sqrt() * k.inverse_sqrt_bias2 + k.eps
        return param * k.decay + k.negative_step_size * (exp_avg / denominator)

    def check_group(self, group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        super().check_group(group, defaults, where)
        for key in ("decoupled_weight_decay", "adamw_mode", "adam_w_mode"):
            if bool(group.get(key, self._adamw_mode)) != self._adamw_mode:
                raise ValueError(
                    f"{where} has {key}={group[key]!r}: whether weight decay is decoupled is an argument of the "
                    f"optimizer, and the same for all groups; here it is {self._adamw_mode}"
                )

    def other_optimizer_of_group(self, group: Mapping[str, Any], missing: Sequence[str]) -> str | None:
        return checkpoints.other_optimizer_of_group(group, missing)

    def other_optimizer_of_state(self, state: Mapping[str, Any]) -> str | None:
        return checkpoints.other_optimizer_of_state(state)


_WITHOUT_AMSGRAD = AdamRule.states[:2]
ADAMW, ADAM = AdamRule(adamw_mode=True), AdamRule(adamw_mode=False)


def adam_settings(
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    adamw_mode: bool = True,
    amsgrad: bool = False,
    **others: Any,
) -> StepSettings:
    """The settings of a step of Adam without a param group. `others` are the engine's fields of StepSettings."""
    rule = ADAMW if adamw_mode else ADAM
    hyper = (lr, beta1, beta2, eps, weight_decay, float(bias_correction), float(adamw_mode))
    return StepSettings(rule, hyper, rule.states_of({"amsgrad": amsgrad}), **others)

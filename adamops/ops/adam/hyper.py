"""The host's side of the update rule: hyper-parameters in, the scalars of one step out.

The other side is csrc/adam/adam_update.h. Must not know of tensors: what may be one is used as a number only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, SupportsFloat

from .precision import Precision
from .settings import check_number, check_numbers


@dataclasses.dataclass(frozen=True)
class AdamHyper:
    """The hyper-parameters of one param group, and what a step needs to know besides.

    Where a number may be a 0-dim tensor, it may be one on a GPU, and float() would wait for that.
    """

    lr: SupportsFloat
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool
    adamw_mode: bool
    amsgrad: bool
    maximize: bool
    precision: Precision = Precision()  # noqa: RUF009 - it is frozen
    capturable: bool = False  # whether a step on a GPU must be fit for CUDA graphs
    loss_scale: SupportsFloat = 1.0  # what the loss, and so the grads, have been multiplied by
    found_inf: SupportsFloat | None = None  # not 0: the grads hold infs or NaNs, and there is to be no step
    grad_factor: SupportsFloat = 1.0  # what grads are to be multiplied by besides, as their norm was too large
    zero_grads: bool = False  # whether the step also sets grads to zero
    threads: int | None = None  # that host memory is updated by; None: as many as torch uses
    stream: int = 0  # where the random bits of the group's params begin

    @classmethod
    def of_group(cls, group: dict[str, Any], where: str, **others: Any) -> AdamHyper:
        """From a param group, whose numbers may be 0-dim tensors, and what it does not have.

        Raises TypeError or ValueError for what is no number, here and not in the middle of a step; `where` is the
        group's name.
        """
        lr = group["lr"]
        if type(lr) is not float:
            check_number(lr, "lr", f" in {where}")  # it stays what it is, as a step on a GPU may read it there
        try:
            beta1, beta2 = group["betas"]
            # With a sign, as float() alone takes strings.
            numbers = float(+beta1), float(+beta2), float(+group["eps"]), float(+group["weight_decay"])
        except (TypeError, ValueError, RuntimeError):
            check_numbers(group, f" in {where}")
            raise
        beta1, beta2, eps, weight_decay = numbers
        return cls(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bool(group["bias_correction"]),
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            capturable=bool(group.get("capturable", False)),
            **others,
        )

    @property
    def l2(self) -> bool:
        """Whether weight decay is added to the gradient (Adam) and not taken from the param (AdamW)."""
        return not self.adamw_mode and self.weight_decay != 0

    @property
    def overflowed(self) -> bool:
        """Whether torch.amp.GradScaler found infs or NaNs in the grads."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def scalars(self, step: int) -> tuple[float, ...]:
        """The fields of AdamScalars in csrc/adam/adam_update.h, in order, in double; the op rounds each to float once.

        `step` counts from 1 (t in Algorithm 1 of arXiv 1412.6980).
        """
        lr, scale = float(self.lr), float(self.loss_scale)
        inverse_scale = 1.0 / scale if scale else math.copysign(math.inf, scale)  # as IEEE has it, and so GPUs
        inverse_scale *= float(self.grad_factor)
        bias1 = 1.0 - integer_power(self.beta1, step) if self.bias_correction else 1.0
        bias2 = 1.0 - integer_power(self.beta2, step) if self.bias_correction else 1.0
        return (
            -inverse_scale if self.maximize else inverse_scale,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            -lr / bias1,
            1.0 / math.sqrt(bias2),
            self.eps,
            1.0 - lr * self.weight_decay if self.adamw_mode else 1.0,
            self.weight_decay if self.l2 else 0.0,
        )


def integer_power(base: float, exponent: int) -> float:
    """base ** exponent by squaring, in double; the exponent is 0 or more.

    Its bits depend on nothing but IEEE multiplication, while pow() differs in the last place between C libraries. The
    relative error is below exponent * 2**-52 (each squaring doubles the error made so far), that is 1e-10 after a
    million steps, when the power itself is long nothing.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result

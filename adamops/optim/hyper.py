"""The host's side of the update rule: hyper-parameters in, the scalars of one step out.

The other side is csrc/rules/adam_update.h. Must not know about tensors: what may be one is used only as a number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

from .settings import check_number, checked_seed, unpacked_betas
from .state.precision import Precision


class AdamScalars(NamedTuple):
    """The scalars of one step in the order of struct AdamScalars of csrc/rules/adam_update.h, which says what each is.

    They are doubles here, to be rounded to float once.
    """

    grad_scale: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    negative_step_size: float
    inverse_sqrt_bias2: float
    eps: float
    decay: float
    l2: float


@dataclasses.dataclass(slots=True, eq=False, repr=False)  # created at each step: frozen=True would cost a microsecond
class AdamHyper:
    """The hyper-parameters of one param group, and what else a step needs to know.

    A number that may be a 0-dim tensor may be one on a GPU; float() would wait for the GPU.
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
    capturable: bool = False  # whether a step on a GPU must be CUDA-graph capturable
    loss_scale: SupportsFloat = 1.0  # the factor in the loss, and so in the grads
    found_inf: SupportsFloat | None = None  # not 0: the grads hold infs or NaNs, and the step must be skipped
    grad_factor: SupportsFloat = 1.0  # a further factor for the grads, if their norm was too large
    zero_grads: bool = False  # whether the step also sets grads to zero
    threads: int | None = None  # that update params on the CPU; None: as many as torch uses
    rng_offset: int = 0  # where the random bits of the group's params begin

    @classmethod
    def of_group(
        cls, group: dict[str, Any], where: str, to_number: Callable[..., Any] | None = None, **others: Any
    ) -> AdamHyper:
        """From a param group, whose numbers may be 0-dim tensors, and `others`, the fields that a group does not have.

        An `lr` on a GPU stays there, as float() would wait for the GPU. Raises TypeError or ValueError for a value that
        is not a number, here and not in the middle of a step; `where` ends the message. `to_number` replaces the
        function below.
        """
        to_number = to_number or globals()["to_number"]
        betas = group["betas"]
        beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else unpacked_betas(betas, where)
        lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
        return cls(  # saves calls: most numbers are floats already
            lr=lr if type(lr) is float else to_number(lr, "lr", where),
            beta1=beta1 if type(beta1) is float else float(to_number(beta1, "betas[0]", where)),
            beta2=beta2 if type(beta2) is float else float(to_number(beta2, "betas[1]", where)),
            eps=eps if type(eps) is float else float(to_number(eps, "eps", where)),
            weight_decay=weight_decay
            if type(weight_decay) is float
            else float(to_number(weight_decay, "weight_decay", where)),
            bias_correction=bool(group.get("bias_correction", True)),
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            capturable=bool(group.get("capturable", False)),
            **others,
        )

    @property
    def l2(self) -> bool:
        """Whether weight decay is added to the gradient (Adam) rather than subtracted from the param (AdamW)."""
        return not self.adamw_mode and self.weight_decay != 0

    @property
    def overflowed(self) -> bool:
        """Whether torch.amp.GradScaler found infs or NaNs in the grads."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def numbers(self, lr: float | None = None) -> tuple[float, ...]:
        """The numbers from which the ops compute a step's scalars, in the order of their HYPER. `lr` replaces the lr."""
        return (
            float(self.lr) if lr is None else lr,
            self.beta1,
            self.beta2,
            self.eps,
            self.weight_decay,
            self.bias_correction,
            self.adamw_mode,
        )

    def scalars(self, step: int) -> AdamScalars:
        """The scalars of a step, which counts from 1 (t in Algorithm 1 of arXiv 1412.6980).

        For updates in pure PyTorch. The ops compute the same scalars from numbers(), whatever the floating-point
        environment of the calling thread.
        """
        lr, scale = float(self.lr), float(self.loss_scale)
        inverse_scale = 1.0 / scale if scale else math.copysign(math.inf, scale)  # as in IEEE 754, and so on GPUs
        inverse_scale *= float(self.grad_factor)
        bias1 = 1.0 - integer_power(self.beta1, step) if self.bias_correction else 1.0
        bias2 = 1.0 - integer_power(self.beta2, step) if self.bias_correction else 1.0
        return AdamScalars(
            grad_scale=-inverse_scale if self.maximize else inverse_scale,
            beta1=self.beta1,
            one_minus_beta1=1.0 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1.0 - self.beta2,
            negative_step_size=-lr / bias1,
            inverse_sqrt_bias2=1.0 / math.sqrt(bias2),
            eps=self.eps,
            decay=1.0 - lr * self.weight_decay if self.adamw_mode else 1.0,
            l2=self.weight_decay if self.l2 else 0.0,
        )


def to_number(value: Any, name: str, where: str = "") -> Any:
    """A hyper-parameter as a float. A tensor on a GPU stays as it is, since float() would wait for the GPU.

    Raises TypeError or ValueError for a value that is not a number; `where` ends the message.
    """
    if type(value) is float:
        return value
    check_number(value, name, where)
    device = getattr(value, "device", "cpu")  # torch.device of a tensor, string of NumPy's arrays and scalars
    return float(value) if getattr(device, "type", device) == "cpu" else value


def integer_power(base: float, exponent: int) -> float:
    """base ** exponent by squaring, in double; the exponent is 0 or more.

    Its bits depend only on IEEE multiplication, while pow() differs in the last place between C libraries. The relative
    error is below exponent * 2**-52 (each squaring doubles the error made so far). That is 2.2e-10 after a million
    steps, when the power itself has long been negligible.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def rng_offset(group: dict[str, Any], where: str, offset: int) -> int:
    """The rng_offset, 32 bits, of a group's first param, or of the one at `offset`.

    It depends only on what all replicas share: the seed, which is a setting, and the indices of the group and param.
    """
    seed = checked_seed(group.get("stochastic_rounding_seed"), f" in {where}")
    begin = int.from_bytes(hashlib.blake2s(f"{seed} {where}".encode(), digest_size=4).digest(), "little")
    return (begin + offset) & 0xFFFFFFFF

"""What a step of one param group needs to know, for any rule. Must not know about tensors: what may be one is used only
as a number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, SupportsFloat

from .rule import Rule, State
from .settings import checked_seed
from .state.precision import Precision


@dataclasses.dataclass(slots=True, eq=False, repr=False)  # created at each step: frozen=True would cost a microsecond
class StepSettings:
    """The settings of a step of one param group.

    A number that may be a 0-dim tensor may be one on a GPU; float() would wait for the GPU.
    """

    rule: Rule
    hyper: tuple[Any, ...]  # the rule's hyper-parameters, as hyper_of_group() returns them
    states: tuple[State, ...]  # in use
    maximize: bool = False
    precision: Precision = Precision()  # noqa: RUF009 - it is frozen
    capturable: bool = False  # whether a step on a GPU must be CUDA-graph capturable
    loss_scale: SupportsFloat = 1.0  # the factor in the loss, and so in the grads
    found_inf: SupportsFloat | None = None  # not 0: the grads hold infs or NaNs, and the step must be skipped
    grad_factor: SupportsFloat = 1.0  # a further factor for the grads, if their norm was too large
    zero_grads: bool = False  # whether the step also sets grads to zero
    threads: int | None = None  # that update params on the CPU; None: as many as torch uses
    rng_offset: int = 0  # where the random bits of the group's params begin

    @property
    def lr(self) -> SupportsFloat:
        """The learning rate."""
        lr: SupportsFloat = self.hyper[0]
        return lr

    @property
    def overflowed(self) -> bool:
        """Whether torch.amp.GradScaler found infs or NaNs in the grads."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def from_param(self, index: int) -> StepSettings:
        """The settings of a step of the group's params from this one on."""
        if not self.precision.stochastic_rounding:
            return self
        return dataclasses.replace(self, rng_offset=(self.rng_offset + index) & 0xFFFFFFFF)

    def as_numbers(self) -> StepSettings:
        """The same settings without tensors, which others may write. Waits for those on a GPU."""
        return dataclasses.replace(
            self,
            hyper=self.numbers(),
            loss_scale=float(self.loss_scale),
            found_inf=None if self.found_inf is None else float(self.found_inf),
            grad_factor=float(self.grad_factor),
        )

    def is_like(self, other: StepSettings) -> bool:
        """Whether a step with the other settings, of the same group, has the same hyper-parameters."""
        return bool(self.hyper == other.hyper and self.maximize == other.maximize)

    def numbers(self) -> tuple[float, ...]:
        """The rule's hyper-parameters as floats."""
        hyper = self.hyper
        return hyper if type(hyper[0]) is float else (float(hyper[0]), *hyper[1:])

    def grad_scale(self) -> float:
        """The factor for the grads: the inverse loss scale times `grad_factor`, negative if the step maximizes."""
        scale = float(self.loss_scale)
        inverse = 1.0 / scale if scale else math.copysign(math.inf, scale)  # as in IEEE 754, and so on GPUs
        inverse *= float(self.grad_factor)
        return -inverse if self.maximize else inverse

    def scalars(self, step: int) -> tuple[float, ...]:
        """The scalars of a step, which counts from 1: the grad_scale and those of the rule, in double.

        For updates in pure PyTorch. The ops compute the same scalars from numbers(), whatever the floating-point
        environment of the calling thread.
        """
        return (self.grad_scale(), *self.rule.scalars(self.numbers(), step))


def rng_offset(group: dict[str, Any], where: str) -> int:
    """The rng_offset, 32 bits, of a group's first param.

    It depends only on what all replicas share: the seed, which is a setting, and the indices of the group and param.
    """
    seed = checked_seed(group.get("stochastic_rounding_seed"), f" in {where}")
    return int.from_bytes(hashlib.blake2s(f"{seed} {where}".encode(), digest_size=4).digest(), "little")

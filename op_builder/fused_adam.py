"""The builder of fused_adam, Adam for many tensors on a GPU at once."""

from __future__ import annotations

from .rules import CUDARuleBuilder


class FusedAdamBuilder(CUDARuleBuilder):
    """Adam for tensors in device memory."""

    NAME = "fused_adam"
    MODULE = "adamops._native.fused_adam"
    RULE = "Adam"
    RULE_HEADER = "rules/adam.h"

"""The builder of cpu_adam, Adam for tensors on the CPU."""

from __future__ import annotations

from .rules import CPURuleBuilder


class CPUAdamBuilder(CPURuleBuilder):
    """Adam for tensors on the CPU."""

    NAME = "cpu_adam"
    MODULE = "adamops._native.cpu_adam"
    RULE = "Adam"
    RULE_HEADER = "rules/adam.h"

"""The base builders of ops that run an optimizer's update rule on adamops' loops and kernels.

A subclass names the rule (csrc/rules/rule.h says what one is), the op and its module. Must not know any particular
rule.
"""

from __future__ import annotations

from .cpu import CPUOpBuilder
from .cuda import CUDAOpBuilder


def rule_flags(rule: str, header: str, module: str) -> list[str]:
    """The compiler flags that select a rule (csrc/rules/selected.h) and name the extension module."""
    if not rule or not header:
        raise TypeError("the builder of a rule's op must set RULE and RULE_HEADER")
    return [
        f"-DADAMOPS_RULE={rule}",
        f"-DADAMOPS_RULE_HEADER={header}",
        f"-DADAMOPS_MODULE={module.rpartition('.')[2]}",
    ]


class CPURuleBuilder(CPUOpBuilder):
    """A rule for tensors on the CPU.

    Attributes
    ----------
    RULE
        The rule's struct: its name in namespace adamops, or a qualified one.
    RULE_HEADER
        The header that it is in, relative to source_root().
    """

    RULE = ""
    RULE_HEADER = ""

    def sources(self) -> list[str]:
        return ["python/cpu_module.cpp", "python/table.cpp"]

    def kernel_sources(self) -> list[str]:
        return ["cpu/direct.cpp", "cpu/staged.cpp", "cpu/grad_norm.cpp", "cpu/grad_sum.cpp"]

    def cxx_args(self) -> list[str]:
        return rule_flags(self.RULE, self.RULE_HEADER, self.MODULE)


class CUDARuleBuilder(CUDAOpBuilder):
    """A rule for many tensors on a GPU at once; RULE and RULE_HEADER as for CPURuleBuilder."""

    RULE = ""
    RULE_HEADER = ""
    FROM_ONE_PTX = True

    def sources(self) -> list[str]:
        return ["python/cuda_module.cpp", "python/table.cpp", "cuda/launch_plan.cpp"]

    def cuda_sources(self) -> list[str]:
        return ["cuda/launches.cu"]

    def cxx_args(self) -> list[str]:
        return rule_flags(self.RULE, self.RULE_HEADER, self.MODULE)

    def nvcc_args(self) -> list[str]:
        return self.cxx_args()

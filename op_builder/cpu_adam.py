"""The builder of cpu_adam, Adam for tensors on the CPU."""

from __future__ import annotations

from .cpu import CPUOpBuilder


class CPUAdamBuilder(CPUOpBuilder):
    """Adam for tensors on the CPU, built from csrc/adam."""

    NAME = "cpu_adam"
    MODULE = "adamops._native.cpu_adam"

    def sources(self) -> list[str]:
        return ["adam/cpu_adam.cpp", "adam/adam_table.cpp"]

    def kernel_sources(self) -> list[str]:
        return ["adam/cpu_adam_kernel.cpp", "adam/cpu_adam_staged.cpp", "adam/grad_norm_kernel.cpp"]

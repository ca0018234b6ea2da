"""The builder of cpu_adam, Adam for tensors on the CPU."""

from __future__ import annotations

from .cpu import CPUOpBuilder


class CPUAdamBuilder(CPUOpBuilder):
    """Adam for tensors on the CPU, built from csrc."""

    NAME = "cpu_adam"
    MODULE = "adamops._native.cpu_adam"

    def sources(self) -> list[str]:
        return ["python/cpu_module.cpp", "python/table.cpp"]

    def kernel_sources(self) -> list[str]:
        return ["cpu/direct.cpp", "cpu/staged.cpp", "cpu/grad_norm.cpp"]

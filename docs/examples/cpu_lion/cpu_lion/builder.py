"""The builder of cpu_lion, which adamops finds by the entry point in pyproject.toml."""

from pathlib import Path

from adamops.op_builder import CPUOpBuilder


class CPULionBuilder(CPUOpBuilder):
    """Lion for tensors on the CPU."""

    NAME = "cpu_lion"
    MODULE = "cpu_lion._cpu_lion"

    def source_root(self) -> Path:
        return Path(__file__).resolve().parent / "csrc"

    def sources(self) -> list[str]:
        return ["cpu_lion.cpp"]

    def kernel_sources(self) -> list[str]:
        return ["cpu_lion_kernel.cpp"]

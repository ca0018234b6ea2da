"""The builder of fused_adam, Adam for many tensors on a GPU at once."""

from __future__ import annotations

from .cuda import CUDAOpBuilder


class FusedAdamBuilder(CUDAOpBuilder):
    """Adam for tensors in device memory, built from csrc."""

    NAME = "fused_adam"
    MODULE = "adamops._native.fused_adam"
    FROM_ONE_PTX = True

    def sources(self) -> list[str]:
        return ["python/cuda_module.cpp", "python/table.cpp", "cuda/launch_plan.cpp"]

    def cuda_sources(self) -> list[str]:
        return ["cuda/launches.cu"]

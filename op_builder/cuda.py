"""The base builder of CUDA ops. Must not know any particular op."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from . import environment
from .compiler import Compiler, cannot_compile_extensions
from .cuda_architectures import ArchitectureChoice, choose_architectures, visible_gpus
from .loading import OpBuilder
from .nvcc import Nvcc
from .spec import BuildError, Compatibility, CompileUnit, OpUnavailableError


class CUDAOpBuilder(OpBuilder):
    """An op with CUDA kernels, compiled for several architectures and statically linked with the CUDA runtime.

    So the extension needs no CUDA library, and can be imported on a machine without a GPU or a driver.
    """

    HELP = "Install the CUDA toolkit (nvcc), or a wheel that was built with CUDA."

    # Whether the kernels avoid features that only newer architectures have. Then they are compiled once to PTX, for the
    # oldest architecture, and from that PTX to machine code for each, which takes much less time.
    FROM_ONE_PTX = False

    # IEEE arithmetic without contraction, so that results are bit-identical to the CPU's. Compressed, because code for
    # many architectures is large.
    NVCC_FLAGS = (
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-ftz=false",
        "-prec-div=true",
        "-prec-sqrt=true",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
        "-Xfatbin=-compress-all",
    )

    def __init__(self) -> None:
        super().__init__()
        self._for_devices: dict[int, Any] = {}

    def cuda_sources(self) -> list[str]:
        """CUDA files; see locate()."""
        raise NotImplementedError

    def headers(self) -> list[str]:
        return [*super().headers(), *self._files_named("*.cuh")]

    def _nvcc(self) -> Nvcc:
        nvcc = Nvcc.find()
        if nvcc is None:
            raise BuildError("no nvcc found")
        return nvcc

    def _architectures(self) -> ArchitectureChoice:
        choice = choose_architectures(self._nvcc())
        return choice.by_one_ptx() if self.FROM_ONE_PTX else choice

    def compile_units(self) -> list[CompileUnit]:
        nvcc, compiler = self._nvcc(), Compiler.find()
        host = (f"-ccbin={compiler.command[0]}",) if compiler else ()
        flags = (
            *self.NVCC_FLAGS,
            *self.nvcc_args(),
            *self._architectures().nvcc_flags(),
            *host,
        )
        units = [CompileUnit(source, flags, command=(nvcc.path, "--threads={jobs}")) for source in self.cuda_sources()]
        return units + [CompileUnit(source) for source in self.sources()]

    def extra_ldflags(self) -> list[str]:
        folder = self._nvcc().static_runtime()
        return [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def record(self) -> dict[str, Any]:
        choice = self._architectures()
        return {
            "nvcc": self._nvcc().version,
            "architectures_requested": choice.requested,
            "architectures": list(choice.enabled),
            "architectures_dropped": dict(choice.dropped),
            "from_one_ptx": choice.from_one_ptx,
        }

    def not_applicable_reason(self) -> str:
        return "" if visible_gpus() else "this machine has no NVIDIA GPU"

    def facts(self, module: Any) -> dict[str, Any]:
        return {"cuda": module.status()}

    def load_for_device(self, device: int) -> Any:
        """The op's module, with kernels that run on CUDA device number `device`.

        If the prebuilt one has none, because of the device's architecture or an old driver, the op is built for this
        machine and cached.

        Raises
        ------
        OpUnavailableError
            If neither works. The outcome is remembered, as with load().
        """
        with self._lock:
            if device not in self._for_devices:
                self._for_devices[device] = self._load_for_device(device)
        found = self._for_devices[device]
        if isinstance(found, OpUnavailableError):
            raise found
        return found

    def _load_for_device(self, device: int) -> Any:
        try:
            module = self.load()
        except OpUnavailableError as error:
            return error
        problem = module.problem(device)
        if not problem:
            return module
        attempts = [f"extension as loaded: {problem}"]
        try:
            module = self.prepare(self.jit_load())
            problem = module.problem(device)
        except (RuntimeError, ImportError, OSError) as error:
            problem = str(error)
        if not problem:
            return module
        return self.unavailable([*attempts, f"build at run time: {problem}"])

    def toolchain(self) -> Sequence[str]:
        return [f"nvcc {self._nvcc().version}"]

    def compatibility(self) -> Compatibility:
        reason = cannot_compile_extensions("the CUDA ops")
        if reason:
            return Compatibility(False, reason)
        nvcc = Nvcc.find()
        if nvcc is None:
            home = os.environ.get("CUDA_HOME", "").strip()
            where = f"in CUDA_HOME={home}" if home else "on PATH or in NVIDIA's wheels (set CUDA_HOME)"
            return Compatibility(False, f"no nvcc that runs was found {where}")
        if missing := nvcc.missing():
            return Compatibility(False, f"nvcc {nvcc.version} has no {missing}")
        choice = choose_architectures(nvcc)
        if not choice.enabled:
            numbers = ", ".join(environment.capability(name) for name, _ in choice.dropped)
            return Compatibility(False, f"nvcc {nvcc.version} does not know {numbers} ({choice.requested})")
        return Compatibility(True, f"nvcc {nvcc.version} on {platform.machine()}")

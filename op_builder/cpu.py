"""The base builder of CPU ops, whose kernels are compiled once per SIMD target. Must not know any particular op."""

from __future__ import annotations

from typing import Any

from . import environment
from .compiler import Compiler, cannot_compile_extensions
from .loading import OpBuilder
from .simd import TargetChoice, choose_targets
from .spec import Compatibility, CompileUnit


class CPUOpBuilder(OpBuilder):
    """An op whose kernels are compiled once per SIMD target; CPUID selects the target when the op is loaded."""

    # For run-time builds too. "native" would cost a second of py-cpuinfo in each process that loads the op from the
    # cache, and a cache shared by different machines would hold a build for each.
    default_targets = "all"

    # Sources that are compiled into every CPU op, in addition to its own.
    SHARED = ("runtime/parallel.cpp", "runtime/cpu_features.cpp")

    def kernel_sources(self) -> list[str]:
        """C++ files that are compiled once per SIMD target; see locate()."""
        raise NotImplementedError

    def target_choice(self) -> TargetChoice:
        """The SIMD targets that a build on this machine includes, and those that it drops."""
        compiler = Compiler.find()
        if compiler is None:
            raise RuntimeError("no C++ compiler found")
        return choose_targets(compiler, self.default_targets)

    def compile_units(self) -> list[CompileUnit]:
        choice = self.target_choice()
        names = " ".join(f"X({target.name})" for target in choice.enabled)
        common = (*choice.enabled[-1].flags, f"-DADAMOPS_TARGETS(X)={names}")
        units = [CompileUnit(source, common) for source in (*self.sources(), *self.SHARED)]
        for target in choice.enabled:
            flags = (
                *target.flags,
                f"-DADAMOPS_TARGET={target.name}",
                f'-DADAMOPS_SIMD_HEADER="{target.header}"',
                # GCC 12 warns about uninitialized values in its own AVX-512 headers (GCC bug 105593).
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            )
            units += [CompileUnit(source, flags, target.name) for source in self.kernel_sources()]
        return units

    def record(self) -> dict[str, Any]:
        choice = self.target_choice()
        return {
            "targets_requested": choice.requested,
            "targets": [target.name for target in choice.enabled],
            "targets_dropped": dict(choice.dropped),
        }

    def compatibility(self) -> Compatibility:
        reason = cannot_compile_extensions("the CPU ops")
        compiler = None if reason else Compiler.find()
        if compiler is None:
            return Compatibility(False, reason)
        return Compatibility(True, f"{compiler.version} for {compiler.machine}")

    def prepare(self, module: Any) -> Any:
        """Forces the SIMD target that ADAMOPS_SIMD names, if it is set."""
        wanted = environment.simd(module.supported_targets())
        if wanted:
            module.use_target(wanted)
        return module

    def facts(self, module: Any) -> dict[str, Any]:
        supported = module.supported_targets()
        return {
            "simd": {
                "in_binary": module.targets(),
                "supported_here": supported,
                "chosen": module.target(),
                "forced": environment.simd(supported),
            },
            "openmp_runtime": module.openmp_runtime() or None,
        }

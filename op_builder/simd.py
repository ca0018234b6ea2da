"""SIMD targets: which exist, and which the compiler and this CPU support.

Runs at build time. At run time the extension itself asks CPUID, which takes no time; py-cpuinfo takes about a second.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from . import environment
from .compiler import Compiler


class SimdTarget(NamedTuple):
    """One way to compile the kernels.

    `machine` is the architecture (None: any other). `flags` are the compiler flags. `cpu_flags` are the features that
    a CPU must have, by py-cpuinfo's names. `header` is the vector wrapper in csrc, which states the same for CPUID.
    """

    name: str
    machine: str | None
    flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    header: str


def _x86(name: str, header: str, *extensions: str) -> SimdTarget:
    # -march first: it overrides any -march=native in CXXFLAGS, so that "baseline" means what it says.
    flags = ("-march=x86-64", "-mtune=generic", *(f"-m{extension}" for extension in extensions))
    return SimdTarget(name, "x86_64", flags, frozenset(extensions), header)


# Best first. To add a target, add a row here and the wrapper that it names.
TARGETS = (
    _x86("avx512", "simd/avx512.h", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    _x86("avx2", "simd/avx2.h", "avx2", "fma", "f16c"),
    _x86("baseline", "simd/sse2.h"),
    SimdTarget("neon", "aarch64", ("-march=armv8-a",), frozenset(), "simd/neon.h"),
    SimdTarget("baseline", None, (), frozenset(), "simd/scalar.h"),
)


def targets_of(machine: str) -> list[SimdTarget]:
    """The targets of an architecture, best first."""
    own = [target for target in TARGETS if target.machine == machine]
    return own or [target for target in TARGETS if target.machine is None]


@functools.cache
def native_cpu_flags() -> frozenset[str]:
    """The features of this machine's CPU, by py-cpuinfo's names. Raises ValueError without that package."""
    try:
        import cpuinfo
    except ImportError:
        raise ValueError("ADAMOPS_CPU_TARGETS='native' needs py-cpuinfo: pip install py-cpuinfo") from None

    return frozenset(cpuinfo.get_cpu_info().get("flags", ()))


class TargetChoice(NamedTuple):
    """Which targets were requested, which will be built (best first), and which were dropped and why."""

    requested: str
    enabled: tuple[SimdTarget, ...]
    dropped: tuple[tuple[str, str], ...]


def choose_targets(compiler: Compiler, default: str) -> TargetChoice:
    """The targets to build with this compiler: those of ADAMOPS_CPU_TARGETS, or of `default` if that is unset.

    The baseline is always included, so that a build runs on every CPU of its architecture.
    """
    available = targets_of(compiler.machine)
    requested = environment.cpu_targets([target.name for target in available]) or default
    enabled, dropped = [], []
    for target in available:
        if requested == "native" and not target.cpu_flags <= native_cpu_flags():
            missing = ", ".join(sorted(target.cpu_flags - native_cpu_flags()))
            dropped.append((target.name, f"this CPU has no {missing}"))
        elif isinstance(requested, list) and target.name not in requested and target is not available[-1]:
            dropped.append((target.name, "not requested"))
        elif not compiler.accepts(target.flags):
            dropped.append((target.name, f"the compiler does not accept {' '.join(target.flags)}"))
        else:
            enabled.append(target)
    words = requested if isinstance(requested, str) else " ".join(requested)
    return TargetChoice(words, tuple(enabled), tuple(dropped))

"""The environment variables of adamops, each read in one place.

Must not know what they are used for. An invalid value raises a ValueError that names the valid ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# Those that adamops reads, besides ADAMOPS_BUILD_ and the name of an op.
VARIABLES = (
    "ADAMOPS_BUILD_OPS",
    "ADAMOPS_CACHE_DIR",
    "ADAMOPS_CPU_TARGETS",
    "ADAMOPS_CUDA_ARCHS",
    "ADAMOPS_NUM_THREADS",
    "ADAMOPS_SIMD",
)
_OF_TESTS_AND_SCRIPTS = re.compile("ADAMOPS_(TEST_.*|WORK|FRAMEWORKS_ENV|DEMO_VENV|CHECKOUT)")


def unknown(ops: Iterable[str]) -> list[str]:
    """Variables named ADAMOPS_... that nothing reads, each with the name that may be meant; `ops` are all ops."""
    import difflib  # not at the top: only the report needs it

    known = [*VARIABLES, *(f"ADAMOPS_BUILD_{op.upper()}" for op in ops)]
    found = []
    for name in sorted(os.environ):
        if name.startswith("ADAMOPS_") and name not in known and not _OF_TESTS_AND_SCRIPTS.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1)
            found.append(f"nothing reads {name}" + (f"; is {near[0]} meant?" if near else ""))
    return found


def _switch(name: str) -> bool | None:
    value = os.environ.get(name, "").strip()
    if value == "":
        return None
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} is not valid; use 0 (never build), 1 (must build) or leave it unset")
    return value == "1"


def build_switch(op: str) -> tuple[bool | None, str]:
    """Whether to build the op (False: never; True: it must succeed; None: if compatible), and which setting says so."""
    own = f"ADAMOPS_BUILD_{op.upper()}"
    for variable in (own, "ADAMOPS_BUILD_OPS"):
        decision = _switch(variable)
        if decision is not None:
            return decision, f"{variable}={int(decision)}"
    return None, f"{own} is not set"


def cpu_targets(valid: Sequence[str]) -> list[str] | str | None:
    """ADAMOPS_CPU_TARGETS: the word "native" or "all", a list of target names, or None if unset."""
    value = os.environ.get("ADAMOPS_CPU_TARGETS", "").strip()
    if not value:
        return None
    if value in ("native", "all"):
        return value
    names = value.replace(",", " ").replace(";", " ").split()
    unknown = [name for name in names if name not in valid]
    if unknown:
        raise ValueError(
            f"ADAMOPS_CPU_TARGETS={value!r} names no target: {', '.join(unknown)}; "
            f"use native, all, or a list of {', '.join(valid)}"
        )
    return names


# torch's names for compute capabilities in TORCH_CUDA_ARCH_LIST (torch/utils/cpp_extension.py).
_NAMED_ARCHITECTURES = {
    "Maxwell+Tegra": ["5.3"],
    "Maxwell": ["5.0", "5.2+PTX"],
    "Pascal": ["6.0", "6.1+PTX"],
    "Volta+Tegra": ["7.2"],
    "Volta": ["7.0+PTX"],
    "Turing": ["7.5+PTX"],
    "Ampere": ["8.0", "8.6+PTX"],
    "Ampere+Tegra": ["8.7"],
    "Ada": ["8.9+PTX"],
    "Hopper": ["9.0+PTX"],
    "Blackwell+Tegra": ["11.0"],
    "Blackwell": ["10.0", "10.3", "12.0", "12.1+PTX"],
}


def capability(name: str) -> str:
    """As torch and NVIDIA write it: 9.0 for "90", 9.0a for "90a"."""
    return re.sub(r"(\d\D?)$", r".\1", name)


class CudaArchs(NamedTuple):
    """What a variable asks for. 9.0 is "90", 9.0a is "90a", and 9.0+PTX is "90+PTX"."""

    said: str  # the variable, as "NAME=value"
    names: list[str]  # or one word, "native" or "all"
    unknown: list[
        str
    ]  # what this nvcc does not compile for; only a list that is meant for other packages, too, has such


def cuda_archs(valid: Sequence[str]) -> CudaArchs | None:
    """ADAMOPS_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST; None if neither is set.

    Torch's syntax: "8.0;9.0+PTX", names such as "Hopper", or one of the words "native" and "all". `valid` lists the
    numbers that nvcc knows.
    """
    for variable in ("ADAMOPS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        value = os.environ.get(variable, "").strip()
        if value.strip(";, "):
            break
    else:
        return None
    said = f"{variable}={value}"
    if value in ("native", "all"):
        return CudaArchs(said, [value], [])
    found: list[str] = []
    unknown: list[str] = []
    for word in value.replace(",", " ").replace(";", " ").split():
        for entry in _NAMED_ARCHITECTURES.get(word, [word]):
            number, plus, ptx = entry.partition("+")
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)", number)  # nvcc does not list the names with a letter
            known = match is not None and match[1] + match[2] in valid
            if not match or (plus and ptx != "PTX") or (not known and variable == "ADAMOPS_CUDA_ARCHS"):
                numbers = map(capability, valid)
                raise ValueError(
                    f"{variable}={value!r}: {word!r} is not an architecture that this nvcc knows; use native, all, or "
                    f"a list of {', '.join(numbers)}, {', '.join(_NAMED_ARCHITECTURES)}, with +PTX where PTX is wanted"
                )
            name = "".join(match.groups())
            found.append(name + ("+PTX" if plus else "")) if known else unknown.append(name)
    return CudaArchs(said, list(dict.fromkeys(found)), list(dict.fromkeys(unknown)))


def num_threads() -> int | None:
    """ADAMOPS_NUM_THREADS: how many threads a step on the CPU uses, or None if unset."""
    return _positive("ADAMOPS_NUM_THREADS")


def simd(valid: Sequence[str]) -> str | None:
    """ADAMOPS_SIMD: the SIMD target to use at run time, or None if unset."""
    value = os.environ.get("ADAMOPS_SIMD", "").strip()
    if not value:
        return None
    if value not in valid:
        raise ValueError(f"ADAMOPS_SIMD={value!r} is not valid on this machine; use one of {', '.join(valid)}")
    return value


def words(name: str) -> list[str]:
    """The words of CXX, CXXFLAGS or LDFLAGS, split as a shell would; empty if the variable is unset."""
    import shlex  # not at the top: most processes do not need it

    value = os.environ.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is not valid: {error}; quote it as for a shell") from error


def read_by_compilers() -> list[str]:
    """What compilers take from the environment besides their arguments, as NAME=value: header folders and flags."""
    names = ("CPATH", "CPLUS_INCLUDE_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def quoted(command: Iterable[str]) -> str:
    """The inverse of words(): a command as one would type it."""
    import shlex

    return shlex.join(command)


def max_jobs() -> int:
    """MAX_JOBS: how many compilers may run at once; the number of CPUs if unset."""
    return _positive("MAX_JOBS") or cores()


def cores() -> int:
    """How many cores this process may run on: those of its affinity mask, where the system has such masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch("[0-9]*[1-9][0-9]*", value):
        raise ValueError(f"{name}={value!r} is not valid; use a positive integer")
    return int(value)


def cache_dir() -> Path:
    """ADAMOPS_CACHE_DIR: where ops built at run time are cached; the user's cache folder if unset."""
    value = os.environ.get("ADAMOPS_CACHE_DIR", "").strip()
    if value:
        return Path(value).expanduser()
    try:
        import platformdirs
    except ImportError:  # in a checkout that was not installed
        raise ValueError(
            "platformdirs is missing, which finds the user's cache folder: pip install platformdirs, or set "
            "ADAMOPS_CACHE_DIR"
        ) from None
    return Path(platformdirs.user_cache_dir("adamops", appauthor=False))


def check_cache_dir() -> None:
    """Raises ValueError if cache_dir() cannot be a folder because it, or a parent, is a file."""
    folder = cache_dir()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if existing is not None and not existing.is_dir():
        raise ValueError(f"ADAMOPS_CACHE_DIR={str(folder)!r} is not valid: {existing} is not a folder")

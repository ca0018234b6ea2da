"""CUDA architectures: which to compile for, and which GPUs run the result. Must not know of ops.

At run time the extension itself asks the CUDA runtime, which is linked into it.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from . import environment
from .nvcc import Nvcc, output_of

# The architectures of the wheels, as compute capabilities times ten. PTX is added, for newer GPUs.
WHEEL_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


class ArchitectureChoice(NamedTuple):
    """Which architectures were requested and by what, which will be built, and which were dropped and why.

    In `enabled`, "90" stands for machine code, and "90+PTX" for machine code and PTX.
    """

    requested: str
    enabled: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    from_one_ptx: bool = False  # all machine code is compiled from the PTX of the oldest architecture

    def _plain_numbers(self) -> dict[str, str]:
        """The number of each name, except for names like "90a", which always have their own PTX."""
        numbers = {name: name.removesuffix("+PTX") for name in self.enabled}
        return {name: number for name, number in numbers.items() if number.isdigit()}

    def by_one_ptx(self) -> ArchitectureChoice:
        """The same choice, compiled from one PTX. It also replaces any newer PTX: it runs wherever that would."""
        renamed = self._plain_numbers()
        if any(name != number for name, number in renamed.items()):
            renamed[min(renamed, key=lambda name: int(renamed[name]))] += "+PTX"
        enabled = tuple(renamed.get(name, name) for name in self.enabled)
        return self._replace(enabled=enabled, from_one_ptx=True)

    def nvcc_flags(self) -> list[str]:
        """The nvcc flags for these architectures."""
        plain = self._plain_numbers()
        oldest = min(plain.values(), key=int, default="")
        codes: dict[str, list[str]] = {}  # by the PTX that they are compiled from
        for name in self.enabled:
            number = name.removesuffix("+PTX")
            ptx = oldest if self.from_one_ptx and name in plain else number
            codes.setdefault(ptx, []).append(f"sm_{number}")
            if name != number:
                codes[ptx].append(f"compute_{ptx}")
        return [f"-gencode=arch=compute_{ptx},code=[{','.join(names)}]" for ptx, names in codes.items()]


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """The architectures of this machine's GPUs, such as "90", without duplicates."""
    command = shutil.which("nvidia-smi")
    rows = output_of(command, "--query-gpu=compute_cap", "--format=csv,noheader").split() if command else []
    return tuple(sorted({row.replace(".", "") for row in rows if re.fullmatch(r"\d+\.\d", row)}, key=int))


class Coverage(NamedTuple):
    """Whether a GPU runs a build, and how, or what to do."""

    runs: bool
    how: str


def coverage(architectures: Sequence[str], gpu: str) -> Coverage:
    """Whether and how a GPU, such as "90", runs a build for these architectures.

    Machine code runs on GPUs of the same major version and an equal or higher minor version. PTX runs on GPUs of its
    own version and newer. A name that ends with "a" is for GPUs of just that version, "f" for all that machine code is.
    """
    has_ptx = {name.removesuffix("+PTX"): name.endswith("+PTX") for name in architectures}
    if {gpu, f"{gpu}a", f"{gpu}f"} & has_ptx.keys():
        return Coverage(True, "compiled for it")
    family = [name.removesuffix("f") for name in has_ptx if not name.endswith("a")]  # "90a" runs on 9.0 only
    if any(name[:-1] == gpu[:-1] and int(name) < int(gpu) for name in family):
        return Coverage(True, "compiled for an older one of its kind")
    plain = {name: ptx for name, ptx in has_ptx.items() if name.isdigit()}
    if any(ptx and int(name) < int(gpu) for name, ptx in plain.items()):
        return Coverage(True, "from PTX, which the driver compiles at first use")
    return Coverage(False, "it is in none of the architectures; build with ADAMOPS_CUDA_ARCHS")


def choose_architectures(nvcc: Nvcc) -> ArchitectureChoice:
    """Those of ADAMOPS_CUDA_ARCHS, else of TORCH_CUDA_ARCH_LIST, else of the visible GPUs, else of the wheels.

    TORCH_CUDA_ARCH_LIST is meant for other packages, too: what this nvcc does not know of it is dropped, and without a
    GPU its "native" is no wish. Raises ValueError if a variable names what is no architecture, or ADAMOPS_CUDA_ARCHS
    one that this nvcc does not know, or this machine's GPUs where there are none.
    """
    asked = environment.cuda_archs(nvcc.known)

    def dropped(numbers: Sequence[str]) -> tuple[tuple[str, str], ...]:
        return tuple((number, f"nvcc {nvcc.version} does not know it") for number in numbers)

    if asked and asked.names not in (["native"], ["all"]):
        return ArchitectureChoice(asked.said, tuple(asked.names), dropped(asked.unknown))
    gpus = () if asked and asked.names == ["all"] else visible_gpus()
    if asked and asked.said == "ADAMOPS_CUDA_ARCHS=native" and not gpus:
        raise ValueError(f"{asked.said} asks for the GPUs of this machine, but nvidia-smi shows none")
    wanted = gpus or WHEEL_ARCHITECTURES
    enabled = [number for number in wanted if number in nvcc.known]
    if enabled:  # the driver compiles PTX of the newest for GPUs that are newer still
        enabled[-1] += "+PTX"
    source = asked.said if asked else "the visible GPUs" if gpus else "the list of the wheel"
    return ArchitectureChoice(source, tuple(enabled), dropped([name for name in wanted if name not in nvcc.known]))

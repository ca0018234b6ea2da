"""CUDA at build time: finding nvcc, choosing the architectures, and the base builder of CUDA ops.

Must not know any particular op. At run time the extension itself asks the CUDA runtime, which is linked into it.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import environment
from .builder import Compatibility, OpBuilder, OpUnavailableError
from .compile import BuildError, Compiler, CompileUnit, cannot_compile_extensions

# The architectures of the wheels, as compute capabilities times ten. PTX is added, for newer GPUs.
WHEEL_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


class Nvcc(NamedTuple):
    """A CUDA compiler, with what it reports about itself."""

    path: str
    version: str
    library_folders: tuple[str, ...]
    known: tuple[str, ...]  # architectures, such as "90" and "90a"

    @classmethod
    def find(cls) -> Nvcc | None:
        """The nvcc in $CUDA_HOME if that is set, else the first on PATH or in NVIDIA's wheels; None if none runs."""
        import sysconfig  # not at the top: it takes a millisecond, and most processes compile nothing

        home = os.environ.get("CUDA_HOME", "").strip()
        wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
        candidates = (
            [Path(home) / "bin" / "nvcc"]
            if home
            else [Path(shutil.which("nvcc") or ""), *sorted(wheels.glob("*/bin/nvcc"), reverse=True)]
        )
        return next((found for path in candidates if path.is_file() and (found := cls._ask(str(path)))), None)

    @classmethod
    @functools.cache
    def _ask(cls, path: str) -> Nvcc | None:
        version = re.search(r"release ([\d.]+)", _output(path, "--version"))
        # A dry run shows where the toolkit is, even if `path` is a wrapper script.
        folders = re.search(r"LIBRARIES=(.*)", _output(path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "x.o"))
        known = re.findall(r"sm_(\d+[a-z]?)", _output(path, "--list-gpu-code"))
        if not version or not known:
            return None
        found = re.findall(r'"-L([^"]+)"', folders.group(1)) if folders else []
        usual = Path(path).resolve().parent.parent
        found += [str(usual / "lib64"), str(usual / "lib")]
        return cls(path, version.group(1), tuple(dict.fromkeys(map(os.path.normpath, found))), tuple(known))

    def static_runtime(self) -> str | None:
        """The folder of the static CUDA runtime library; None if it is missing."""
        return next(
            (folder for folder in self.library_folders if (Path(folder) / "libcudart_static.a").is_file()), None
        )

    def missing(self) -> str:
        """What the toolkit lacks to build an extension; empty if nothing. Each of NVIDIA's wheels has only a part."""
        if self.static_runtime() is None:
            return "libcudart_static.a (install cuda-cudart-dev, or the wheel nvidia-cuda-runtime)"
        headers = [Path(folder).parent / "include" for folder in self.library_folders]
        half = next((path for folder in headers if (path := folder / "cuda_fp16.h").is_file()), None)
        if half is None:
            return "cuda_fp16.h (install cuda-cudart-dev, or the wheel nvidia-cuda-runtime)"
        includes_target = "<nv/target>" in half.read_text(errors="replace")
        found = any((folder / name).is_file() for folder in headers for name in ("nv/target", "cccl/nv/target"))
        if includes_target and not found:
            return "nv/target (install cuda-cccl, or the wheel nvidia-cuda-cccl)"
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


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
    rows = _output(command, "--query-gpu=compute_cap", "--format=csv,noheader").split() if command else []
    return tuple(sorted({row.replace(".", "") for row in rows if re.fullmatch(r"\d+\.\d", row)}, key=int))


def covers(architectures: Sequence[str], gpu: str) -> str:
    """Whether and how a GPU, such as "90", runs a build for these architectures: a text that begins with yes or no.

    Machine code runs on GPUs of the same major version and an equal or higher minor version. PTX runs on GPUs of its
    own version and newer.
    """
    if any(name.removesuffix("+PTX") == gpu for name in architectures):
        return "yes: compiled for it"
    numbers = {name.removesuffix("+PTX"): name.endswith("+PTX") for name in architectures}
    plain = {name: ptx for name, ptx in numbers.items() if name.isdigit()}  # "90a" runs on 9.0 only
    if any(name[:-1] == gpu[:-1] and int(name) < int(gpu) for name in plain):
        return "yes: compiled for an older one of its kind"
    if any(ptx and int(name) < int(gpu) for name, ptx in plain.items()):
        return "yes: from PTX, which the driver compiles at first use"
    return "no: it is in none of the architectures; build with ADAMOPS_CUDA_ARCHS"


def choose_architectures(nvcc: Nvcc) -> ArchitectureChoice:
    """Those of ADAMOPS_CUDA_ARCHS, else of TORCH_CUDA_ARCH_LIST, else of the visible GPUs, else of the wheels.

    Raises ValueError if a variable names an architecture that does not exist or that this nvcc does not know, or asks
    for this machine's GPUs where there are none.
    """
    asked = environment.cuda_archs(nvcc.known)
    if asked and asked[1] not in (["native"], ["all"]):
        return ArchitectureChoice(asked[0], tuple(asked[1]), ())
    words = asked[1] if asked else []
    gpus = visible_gpus() if words != ["all"] else ()
    if words == ["native"] and not gpus:
        raise ValueError(f"{asked[0] if asked else ''} asks for the GPUs of this machine, but nvidia-smi shows none")
    wanted = gpus or WHEEL_ARCHITECTURES
    enabled = [number for number in wanted if number in nvcc.known]
    dropped = [(number, f"nvcc {nvcc.version} does not know it") for number in wanted if number not in nvcc.known]
    if enabled:  # the driver compiles PTX of the newest for GPUs that are newer still
        enabled[-1] += "+PTX"
    source = asked[0] if asked else "the visible GPUs" if gpus else "the list of the wheel"
    return ArchitectureChoice(source, tuple(enabled), tuple(dropped))


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
        if not choose_architectures(nvcc).enabled:
            return Compatibility(False, f"nvcc {nvcc.version} knows none of this machine's GPUs")
        return Compatibility(True, f"nvcc {nvcc.version} on {platform.machine()}")

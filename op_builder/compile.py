"""Runs the C++ compiler: finds it, asks what it supports, and builds one extension from one builder.

The only module that compiles anything, both for setup.py (through build_ext.py) and for run-time builds (jit.py).
Must not know any particular op.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import environment

if TYPE_CHECKING:
    from .builder import OpBuilder


SCRATCH_PREFIX = "adamops-"


class BuildError(RuntimeError):
    """An op could not be compiled; the message contains the compiler's output."""


class CompileUnit(NamedTuple):
    """One compiler run: a source, which the builder locates, and its additional flags.

    `label` distinguishes the objects of a source that is compiled more than once (say, once per SIMD target).
    `command` is a compiler other than the C++ compiler (nvcc). It gets only the unit's own flags and the include
    paths; "{jobs}" in it is replaced by the number of jobs that it may run at once.
    """

    source: str
    flags: tuple[str, ...] = ()
    label: str = ""
    command: tuple[str, ...] = ()

    @property
    def object_name(self) -> str:
        stem = self.source.replace("/", "_").removesuffix(".cpp")  # "x.cu" and "x.cpp" may both exist
        return f"{stem}.{self.label}.o" if self.label else f"{stem}.o"


class Compiler:
    """A C++ compiler that accepts GCC's options (GCC, Clang)."""

    # Order matters: later flags override $CXXFLAGS, which may hold -march=native or -ffast-math.
    # Never fast math or contraction: bit-identical results on every machine are the point of this project.
    # No debug info and no absolute paths, so that the same sources compile to the same bytes.
    COMMON_FLAGS = (
        "-std=c++17",
        "-O3",
        "-g0",
        "-DNDEBUG",  # else pybind11 asks at every change of a reference count whether the GIL is held
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-fast-math",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",  # changes no value, and lets loops with conditions vectorize
        "-Wall",
        "-Wextra",
    )
    LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,-s")

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    @classmethod
    def find(cls) -> Compiler | None:
        """The compiler named by $CXX, else the first of c++, g++ and clang++ on PATH; None if there is none."""
        named = environment.words("CXX")
        for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
            if shutil.which(command[0]):
                return cls(command)
        return None

    @functools.cached_property
    def version(self) -> str:
        """The compiler's one-line description of itself."""
        return self._ask("--version").splitlines()[0].strip()

    @functools.cached_property
    def machine(self) -> str:
        """The architecture it compiles for: x86_64, aarch64, ..."""
        return self._ask("-dumpmachine").strip().split("-")[0]

    def _ask(self, question: str) -> str:
        result = subprocess.run([*self.command, question], capture_output=True, text=True, check=False)
        if result.returncode or not result.stdout.strip():
            raise BuildError(f"{environment.quoted(self.command)} {question} failed: {result.stderr.strip()}")
        return result.stdout

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether it compiles an empty file with these flags."""
        return _compiles((*self.command, *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull))

    def run(self, arguments: Sequence[str]) -> None:
        """Runs the compiler with these arguments. Raises BuildError with its output if it fails."""
        command = [*self.command, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise BuildError(f"{environment.quoted(command)}\nfailed:\n{result.stderr or result.stdout}")


@functools.cache
def _compiles(command: tuple[str, ...]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def python_headers() -> Path:
    """The folder of Python.h."""
    import sysconfig  # not at the top: it takes a millisecond, and most processes compile nothing

    return Path(sysconfig.get_paths()["include"])


def extension_suffix() -> str:
    """The file-name suffix of extensions for this Python."""
    # Not sysconfig's EXT_SUFFIX: it is None for a moment while another thread queries sysconfig for the first time.
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def pybind11_headers() -> Path | None:
    """The folder of pybind11's headers: from its own package, else the copy bundled with torch; None without either."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(location) / "include"
            if (folder / "pybind11" / "pybind11.h").is_file():
                return folder
    return None


def cannot_compile_extensions(what: str) -> str:
    """Why C++ extension modules cannot be compiled here; empty if they can. `what` is the subject of the message."""
    if os.name != "posix":
        return f"{what} need a POSIX system with GCC or Clang, this is {platform.system()}"
    try:
        compiler = Compiler.find()
        environment.words("CXXFLAGS"), environment.words("LDFLAGS")
    except ValueError as error:
        return str(error)
    if compiler is None:
        return "no C++ compiler found (set CXX, or install g++ or clang++)"
    if not (python_headers() / "Python.h").is_file():
        return f"no Python.h in {python_headers()} (install python3-dev)"
    if pybind11_headers() is None:
        return "pybind11 is not installed"
    return ""


def compile_op(builder: OpBuilder, output: Path, scratch_root: Path | None = None) -> dict[str, Any]:
    """Compiles and links the builder's extension into `output`, and returns the record of what was built.

    Works in a new folder in `scratch_root`, by default the system's folder for temporary files. On failure it raises
    BuildError and writes nothing to `output`.
    """
    compiler = Compiler.find()
    if compiler is None:
        raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")
    environment_flags = environment.words("CXXFLAGS")
    include_paths = [*builder.include_paths(), str(python_headers())]
    includes = [f"-I{path}" for path in include_paths]
    # Headers embed their own paths in messages, and an isolated build has pybind11's in a new place each time.
    prefix_maps = [f"-ffile-prefix-map={path}=." for path in (*include_paths, *builder.source_roots())]
    flags = [*environment_flags, *Compiler.COMMON_FLAGS, *builder.cxx_args()]
    link_flags = [*builder.extra_ldflags(), *environment.words("LDFLAGS")]
    units = builder.compile_units()

    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{builder.NAME}-", dir=scratch_root) as scratch:

        def compile_unit(unit: CompileUnit) -> None:
            command = [word.format(jobs=environment.max_jobs()) for word in unit.command]
            tool, common = (Compiler(command), []) if command else (compiler, [*flags, *prefix_maps])
            tool.run(
                [*common, *unit.flags, *includes, "-c", str(builder.locate(unit.source))]
                + ["-o", str(Path(scratch) / unit.object_name)]
            )

        with ThreadPoolExecutor(environment.max_jobs()) as pool:
            list(pool.map(compile_unit, units))
        linked, exports = Path(scratch) / "linked.so", Path(scratch) / "exports.map"
        # Export only the module's entry point. Exported templates of the C++ library would be shared with other
        # libraries that have them, and torch's own CUDA runtime, perhaps of another version, is in the same process.
        exports.write_text(f"{{ global: PyInit_{builder.MODULE.rpartition('.')[2]}; local: *; }};\n")
        objects = [str(Path(scratch) / unit.object_name) for unit in units]
        compiler.run(
            [*objects, *Compiler.LINK_FLAGS, f"-Wl,--version-script={exports}", *link_flags, "-o", str(linked)]
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(linked, output)

    return {
        "op": builder.NAME,
        "built": True,
        "compiler": compiler.version,
        "machine": compiler.machine,
        "flags": [flag for flag in (*flags, *link_flags) if not flag.startswith("-L")],  # no paths
        "units": {unit.object_name: list(unit.flags) for unit in units},
        **builder.record(),
    }


def record_path(extension: Path) -> Path:
    """The path of an extension's record: next to the extension, with the same name for every Python."""
    return extension.with_name(extension.name.split(".")[0] + ".build.json")


def write_record(extension: Path, record: dict[str, Any]) -> None:
    path = record_path(extension)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_record(extension: Path) -> dict[str, Any] | None:
    """The record written when the extension was built or left out; None if it is missing or damaged."""
    try:
        record = json.loads(record_path(extension).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None

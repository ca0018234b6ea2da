"""OpSpec: what is known of an op before anything is built: sources, flags, whether it can be built here.

Must not know any particular op, nor how ops are compiled, cached or loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .python_extension import extension_suffix, pybind11_headers, read_record

# adamops' own C++ sources. Other packages' ops may include them and compile them into their extensions.
SHARED_SOURCES = Path(__file__).resolve().parent.parent / "csrc"


class BuildError(RuntimeError):
    """An op could not be compiled; the message contains the compiler's output."""


class OpUnavailableError(RuntimeError):
    """An op cannot be loaded. The message lists each attempt, why it failed, and what to do."""


class Compatibility(NamedTuple):
    """Whether an op can be built on this machine, and why or why not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


class CompileUnit(NamedTuple):
    """One compiler run: a source, which the builder locates, and its additional flags.

    `label` distinguishes the objects of a source that is compiled more than once (say, once per SIMD target).
    `command` is a compiler other than the C++ compiler (nvcc). It gets only the unit's own flags and the include
    paths, in a checkout also -MD, -MF and -MT with GCC's meaning; "{jobs}" in it is replaced by the number of jobs that
    it may run at once.
    """

    source: str
    flags: tuple[str, ...] = ()
    label: str = ""
    command: tuple[str, ...] = ()

    @property
    def object_name(self) -> str:
        stem = self.source.replace("/", "_").removesuffix(".cpp")  # "x.cu" and "x.cpp" may both exist
        return f"{stem}.{self.label}.o" if self.label else f"{stem}.o"


@runtime_checkable
class Op(Protocol):
    """What an op must have, whoever wrote it. OpBuilder has it all; an object of another class will do, too."""

    NAME: str

    def compatibility(self) -> Compatibility:
        """Whether the op can be built here, with the reason."""

    def is_prebuilt(self) -> bool:
        """Whether the package ships an extension for this Python."""

    def load(self) -> Any:
        """The op's module. Raises OpUnavailableError."""


@runtime_checkable
class RecordedOp(Protocol):
    """An op that knows how it was built."""

    def build_record(self) -> dict[str, Any] | None:
        """The record from the package's build: compiler and flags, or why the op was left out."""


@runtime_checkable
class SituationalOp(Protocol):
    """An op that not every machine has a use for."""

    def not_applicable_reason(self) -> str:
        """Why this machine has no use for the op; empty if the op would be used here."""


def missing_of(op: object) -> list[str]:
    """What an object lacks to be an Op: names of attributes."""
    members = [*Op.__annotations__, *(name for name, member in vars(Op).items() if callable(member) and name[0] != "_")]
    return [name for name in members if not hasattr(op, name)]


class OpSpec:
    """One op: what to compile, whether that is possible here, and what is already built.

    Attributes
    ----------
    NAME
        The op's name in ``adamops.op_builder.get(NAME)``, the report and ADAMOPS_BUILD_<NAME>.
    MODULE
        Dotted name of the extension module in the wheel of the package that ships it.
    HELP
        What a user should do when the op is not available; one sentence.
    """

    NAME = ""
    MODULE = ""
    HELP = "Install a C++ compiler (g++ or clang++), or a wheel that was built for this platform."

    # What to compile -----------------------------------------------------------------------------------------------

    def source_root(self) -> Path:
        """The folder of the op's own sources; by default adamops' own csrc, next to this package."""
        return SHARED_SOURCES

    def source_roots(self) -> list[Path]:
        """The folders that source and header names are relative to: the op's own, then the one that all ops share."""
        return list(dict.fromkeys([self.source_root(), SHARED_SOURCES]))

    def locate(self, name: str) -> Path:
        """The path of a source or header, in the first of source_roots() that has it. Raises BuildError."""
        for root in self.source_roots():
            if (root / name).is_file():
                return root / name
        raise BuildError(f"{self.NAME} has no source {name} in {', '.join(map(str, self.source_roots()))}")

    def sources(self) -> list[str]:
        """C++ files that are compiled once, as relative paths with '/'; see locate()."""
        raise NotImplementedError

    def headers(self) -> list[str]:
        """Files that the sources include. A change to any of them makes run-time builds stale."""
        return self._files_named("*.h")

    def _files_named(self, pattern: str) -> list[str]:
        return sorted({str(path.relative_to(root)) for root in self.source_roots() for path in root.rglob(pattern)})

    def compile_units(self) -> list[CompileUnit]:
        """The compiler runs that produce the extension."""
        return [CompileUnit(source) for source in self.sources()]

    def include_paths(self) -> list[str]:
        """Folders for -I, in addition to Python's own."""
        return [*map(str, self.source_roots()), str(pybind11_headers())]

    def cxx_args(self) -> list[str]:
        """C++ compiler flags for all units, in addition to Compiler.COMMON_FLAGS."""
        return []

    def nvcc_args(self) -> list[str]:
        """nvcc flags, for ops that have CUDA sources."""
        return []

    def extra_ldflags(self) -> list[str]:
        """Additional linker flags."""
        return []

    def toolchain(self) -> Sequence[str]:
        """Compilers other than the C++ compiler, with versions. A change to any of them makes run-time builds stale."""
        return []

    def record(self) -> dict[str, Any]:
        """This op's entries in the build record, in addition to compiler and flags."""
        return {}

    # Whether it can be built here ----------------------------------------------------------------------------------

    def compatibility(self) -> Compatibility:
        """Whether the op can be built here, with the reason."""
        raise NotImplementedError

    def not_applicable_reason(self) -> str:
        """Why this machine has no use for the op (no GPU, for example); empty if the op would be used here."""
        return ""

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the op can be built here. With `verbose`, prints the reason if it cannot."""
        found = self.compatibility()
        if verbose and not found:
            print(f"adamops: {self.NAME} cannot be built here: {found.reason}")
        return found.ok

    # What is already built -----------------------------------------------------------------------------------------

    def prebuilt_path(self) -> Path | None:
        """The extension's path for this Python in the installed package, existing or not; None without the package."""
        package, _, name = self.MODULE.rpartition(".")
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            return None
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(next(iter(spec.submodule_search_locations))) / f"{name}{extension_suffix()}"

    def is_prebuilt(self) -> bool:
        """Whether the package ships an extension for this Python."""
        path = self.prebuilt_path()
        return path is not None and path.is_file()

    def build_record(self) -> dict[str, Any] | None:
        """The record from the package's build: compiler and flags, or why the op was left out."""
        path = self.prebuilt_path()
        return None if path is None else read_record(path)

"""OpBuilder: the contract between an op and whatever builds, finds, loads or reports it.

Must not know any particular op, nor how compilers are run (compile.py) or builds are cached (jit.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .compile import BuildError, CompileUnit, extension_suffix, pybind11_headers, read_record

# adamops' own C++, which ops of other packages may include and compile into theirs.
SHARED_SOURCES = Path(__file__).resolve().parent.parent / "csrc"


class OpUnavailableError(RuntimeError):
    """An op can be loaded in no way; the message lists each attempt, why it failed, and what to do."""


class Compatibility(NamedTuple):
    """Whether an op can be built on this machine, and the reason in words either way."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


_builders: weakref.WeakSet[OpBuilder] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """In a forked child the thread that held a builder's lock is gone, and nobody would release it."""
    for builder in _builders:
        builder._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


class OpBuilder:
    """One op: what to compile, whether that is possible here, and how to get the result.

    A subclass sets NAME, MODULE and PACKAGE and says what its sources and flags are. Third parties offer theirs under
    the entry-point group ``adamops.op_builders``.

    Attributes
    ----------
    NAME
        What the op is called in ``adamops.op_builder.get(NAME)``, the report and ADAMOPS_BUILD_<NAME>.
    MODULE
        Dotted name of the extension module, as it lies in the wheel of the package that ships it.
    HELP
        What a user should do when the op is not available; one sentence.
    """

    NAME = ""
    MODULE = ""
    HELP = "Install a C++ compiler (g++ or clang++), or a wheel that was built for this platform."

    def __init__(self) -> None:
        self._module: Any = None
        self._failure: OpUnavailableError | None = None
        self._lock = threading.RLock()  # held while the op is loaded, which may take a build
        _builders.add(self)

    # What to compile -----------------------------------------------------------------------------------------------

    def source_root(self) -> Path:
        """The folder of the op's own sources. adamops' own lie beside this package."""
        return SHARED_SOURCES

    def source_roots(self) -> list[Path]:
        """The folders that names of sources and headers are relative to: the op's own, and that which all ops share."""
        return list(dict.fromkeys([self.source_root(), SHARED_SOURCES]))

    def locate(self, name: str) -> Path:
        """Where a source or header lies: below the first of source_roots() that has it. Raises BuildError."""
        for root in self.source_roots():
            if (root / name).is_file():
                return root / name
        raise BuildError(f"{self.NAME} has no source {name} in {', '.join(map(str, self.source_roots()))}")

    def sources(self) -> list[str]:
        """C++ files that are compiled once, with '/' between folders; see locate()."""
        raise NotImplementedError

    def headers(self) -> list[str]:
        """Files that the sources include: a change of one makes builds at run time stale."""
        return self._files_named("*.h")

    def _files_named(self, pattern: str) -> list[str]:
        return sorted({str(path.relative_to(root)) for root in self.source_roots() for path in root.rglob(pattern)})

    def compile_units(self) -> list[CompileUnit]:
        """The runs of the compiler that make the extension."""
        return [CompileUnit(source) for source in self.sources()]

    def include_paths(self) -> list[str]:
        """Folders for -I, besides Python's own."""
        return [*map(str, self.source_roots()), str(pybind11_headers())]

    def cxx_args(self) -> list[str]:
        """Compiler flags of all units, besides Compiler.COMMON_FLAGS."""
        return []

    def nvcc_args(self) -> list[str]:
        """Flags for nvcc, of ops that have CUDA sources."""
        return []

    def extra_ldflags(self) -> list[str]:
        """Flags for the linker."""
        return []

    def toolchain(self) -> Sequence[str]:
        """The compilers and their versions besides that of C++: a change of one makes builds at run time stale."""
        return []

    def record(self) -> dict[str, Any]:
        """What the build record says of this op besides compiler and flags."""
        return {}

    # Whether that is possible --------------------------------------------------------------------------------------

    def compatibility(self) -> Compatibility:
        """Whether the op can be built here, with the reason."""
        raise NotImplementedError

    def not_applicable_reason(self) -> str:
        """Why nobody misses the op on this machine, if it cannot be had; empty if it would be used."""
        return ""

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the op can be built here; with `verbose`, a reason against it is printed."""
        found = self.compatibility()
        if verbose and not found:
            print(f"adamops: {self.NAME} cannot be built here: {found.reason}")
        return found.ok

    # What is there already -----------------------------------------------------------------------------------------

    def prebuilt_path(self) -> Path | None:
        """Where the extension of this Python lies, or would lie, in the installed package; None if that is missing."""
        package, _, name = self.MODULE.rpartition(".")
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            return None
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(next(iter(spec.submodule_search_locations))) / f"{name}{extension_suffix()}"

    def is_prebuilt(self) -> bool:
        """Whether an extension for this Python came with the package."""
        path = self.prebuilt_path()
        return path is not None and path.is_file()

    def build_record(self) -> dict[str, Any] | None:
        """What was recorded when the package was built: flags and compiler, or why the op was left out."""
        path = self.prebuilt_path()
        return None if path is None else read_record(path)

    # Getting it ----------------------------------------------------------------------------------------------------

    def load(self) -> Any:
        """The op's module: the prebuilt one, else one built now (and kept for the next time).

        Raises
        ------
        OpUnavailableError
            If neither works. The outcome is kept: later calls return or raise the same.
        """
        if self._module is None:
            with self._lock:
                self._load_once()
        return self._module

    def loaded(self) -> Any:
        """The op's module if load() has succeeded, else None."""
        return self._module

    def _load_once(self) -> None:
        if self._failure is not None:
            # Without the frames of earlier calls, which hold what they were called with.
            raise self._failure.with_traceback(None)
        if self._module is None:
            try:
                self._module = self._load_first_possible()
            except OpUnavailableError as error:
                self._failure = error
                raise

    def _load_first_possible(self) -> Any:
        attempts = []
        try:
            return self.prepare(self.load_prebuilt())
        except ImportError as error:
            attempts.append(f"prebuilt extension: {error}")
        try:
            return self.prepare(self.jit_load())
        except (RuntimeError, ImportError, OSError) as error:
            attempts.append(f"build at run time: {error}")
        raise self.unavailable(attempts)

    def unavailable(self, attempts: list[str]) -> OpUnavailableError:
        """The error that lists attempts to load the op, each with why it failed."""
        return OpUnavailableError(
            f"The op {self.NAME!r} is not available:\n"
            + "".join(f"  - {attempt}\n" for attempt in attempts)
            + f"{self.HELP} `python -m adamops.report` shows the state of every op."
        )

    def load_prebuilt(self) -> ModuleType:
        """Imports the extension that came with the package; ImportError, with the reason, if that fails."""
        if self.is_prebuilt():
            return importlib.import_module(self.MODULE)
        record = self.build_record() or {}
        raise ImportError(record.get("reason", "none came with this installation"))

    def jit_load(self) -> ModuleType:
        """Builds the op for this machine, or takes it from the cache, and loads it. Raises BuildError."""
        from . import jit

        return jit.load(self)

    def prepare(self, module: Any) -> Any:
        """Called once with the loaded module; what it returns is what load() returns."""
        return module

"""OpBuilder: the contract between an op and the code that builds, finds, loads or reports it.

Must not know any particular op, how compilers are run (compile.py) or how builds are cached (jit.py).
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

# adamops' own C++ sources. Other packages' ops may include them and compile them into their extensions.
SHARED_SOURCES = Path(__file__).resolve().parent.parent / "csrc"


class OpUnavailableError(RuntimeError):
    """An op cannot be loaded. The message lists each attempt, why it failed, and what to do."""


class Compatibility(NamedTuple):
    """Whether an op can be built on this machine, and why or why not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


_builders: weakref.WeakSet[OpBuilder] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """Replaces the locks in a forked child: a thread that held one does not exist there, and never releases it."""
    for builder in _builders:
        builder._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


class OpBuilder:
    """One op: what to compile, whether that is possible here, and how to get the result.

    A subclass sets NAME and MODULE, and defines its sources and flags. Third parties register theirs under the
    entry-point group ``adamops.op_builders``.

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

    def __init__(self) -> None:
        self._module: Any = None
        self._failure: OpUnavailableError | None = None
        self._lock = threading.RLock()  # held while the op is loaded, which may include building it
        _builders.add(self)

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

    # Loading it ----------------------------------------------------------------------------------------------------

    def load(self) -> Any:
        """The op's module: the prebuilt one, or else one that is built now and cached.

        Raises
        ------
        OpUnavailableError
            If neither works. The outcome is remembered: later calls return or raise the same.
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
            # Drop the traceback of earlier calls: its frames would keep their arguments alive.
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
        """The error that lists the attempts to load the op and why each failed."""
        return OpUnavailableError(
            f"The op {self.NAME!r} is not available:\n"
            + "".join(f"  - {attempt}\n" for attempt in attempts)
            + f"{self.HELP} `python -m adamops.report` shows the state of every op."
        )

    def load_prebuilt(self) -> ModuleType:
        """Imports the extension that the package ships. Raises ImportError, with the reason, if that fails."""
        if self.is_prebuilt():
            return importlib.import_module(self.MODULE)
        record = self.build_record() or {}
        raise ImportError(record.get("reason", "none came with this installation"))

    def jit_load(self) -> ModuleType:
        """Builds the op for this machine, or finds it in the cache, and loads it. Raises BuildError or ImportError."""
        from . import jit

        return jit.load(self)

    def prepare(self, module: Any) -> Any:
        """Called once with each module that is loaded; load() returns its result."""
        return module

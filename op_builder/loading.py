"""OpBuilder: an OpSpec that can be loaded: the prebuilt extension, or one that is built now.

Must not know any particular op, how compilers are run (compile.py) or how builds are cached (cache.py).
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from types import ModuleType
from typing import Any

from . import cache
from .spec import OpSpec, OpUnavailableError

_builders: weakref.WeakSet[OpBuilder] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """Replaces the locks in a forked child: a thread that held one does not exist there, and never releases it."""
    for builder in _builders:
        builder._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


class OpBuilder(OpSpec):
    """One op: what to compile, whether that is possible here, and how to get the result.

    A subclass sets NAME and MODULE, and defines its sources and flags: see OpSpec. Third parties register theirs under
    the entry-point group ``adamops.op_builders``.
    """

    def __init__(self) -> None:
        self._module: Any = None
        self._failure: OpUnavailableError | None = None
        self._lock = threading.RLock()  # held while the op is loaded, which may include building it
        _builders.add(self)

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
        return cache.load(self)

    def prepare(self, module: Any) -> Any:
        """Called once with each module that is loaded; load() returns its result."""
        return module

    def facts(self, module: Any) -> dict[str, Any]:
        """What the op's loaded module says of itself, as JSON types, for the report."""
        return {}

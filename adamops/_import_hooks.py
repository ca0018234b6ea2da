"""Calls a function once a module is imported, whoever imports it.

Imports nothing heavy: multiprocessing's children import this, whether they train or not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module through the finders after it, and wraps its loader so that an action follows the import."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        after = sys.meta_path.index(self) + 1 if self in sys.meta_path else 0
        for finder in sys.meta_path[after:]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec  # perhaps for a caller that only checks whether the module exists
        return None

    def loaded(self) -> None:
        """Runs the action, once."""
        if self in sys.meta_path:  # not withdrawn
            self.withdraw()
            self._action()

    def withdraw(self) -> None:
        """Cancels the action."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(importlib.abc.Loader):
    """Wraps a module's own loader. The loaded module refers to its own loader, not to this one."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # get_code(), is_package(), ...
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.loaded()


def when_imported(name: str, action: Callable[[], object]) -> Callable[[], None]:
    """Calls an action now if a module is already imported, else once it is. Returns a function that cancels this."""
    if name in sys.modules:
        action()
        return lambda: None
    finder = _Finder(name, action)
    sys.meta_path.insert(0, finder)
    return finder.withdraw

"""Patches DeepSpeed in the processes that multiprocessing spawns, which inherit nothing else from their parent.

Imports nothing heavy: such children import this, whether they train or not.
"""

from __future__ import annotations

import importlib
import multiprocessing
import warnings
from typing import Any

from ._import_hooks import when_imported


class PatchedChildren:
    """Sent to each spawned child with multiprocessing's settings. Patches DeepSpeed there when it is unpickled.

    The patch waits until the child imports DeepSpeed, as children that only load data do not need it.

    Attributes
    ----------
    patcher
        Name of the module whose ``patch(**settings)`` does it.
    """

    def __init__(self, patcher: str, **settings: Any) -> None:
        self.patcher, self.settings = patcher, settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived_in_child, (self.patcher, self.settings)

    @classmethod
    def _inherited(cls) -> dict[str, Any]:
        """The settings of this process that its children inherit."""
        return getattr(multiprocessing.current_process(), "_config", {})

    def enable(self) -> None:
        """From now on, children of this process are patched, and their children too."""
        self._inherited()[self.patcher] = self

    def disable(self) -> None:
        """From now on, new children are not patched."""
        self._inherited().pop(self.patcher, None)


def _arrived_in_child(patcher: str, settings: dict[str, Any]) -> PatchedChildren:
    def patch() -> None:
        try:
            importlib.import_module(patcher).patch(**settings)
        except Exception as error:  # the child may not need it
            warnings.warn(f"{patcher} cannot patch DeepSpeed in this child process: {error}", stacklevel=2)

    when_imported("deepspeed", patch)
    return PatchedChildren(patcher, **settings)

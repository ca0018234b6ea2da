"""Handles what Accelerate, DeepSpeed and multiprocessing do to adamops' optimizers without being asked.

Imports neither Accelerate nor DeepSpeed nor torch: multiprocessing's children import this, whether they train or not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import multiprocessing
import sys
import types
import warnings
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


# DeepSpeed reads states by name -----------------------------------------------------------------------------------

_expecting_deepspeed = False


def expect_deepspeed(has_quantized_states: bool) -> None:
    """Called for each optimizer. Teaches DeepSpeed's helpers to read its states, now or once DeepSpeed is imported."""
    global _expecting_deepspeed
    if _expecting_deepspeed or not (has_quantized_states or "deepspeed" in sys.modules):
        return
    _expecting_deepspeed = True

    def teach() -> None:
        from . import _deepspeed_states

        _deepspeed_states.install()

    when_imported("deepspeed", teach)


# Accelerate replaces optimizers ------------------------------------------------------------------------------------


def check_not_replaced(optimizer: Any, caller: types.FrameType) -> None:
    """Called when an optimizer's defaults are read. Accelerate reads them to replace the optimizer by DeepSpeed's.

    It does so for an offloaded optimizer. It carries over lr and weight decay, but neither decoupled decay nor
    precision. No return value would make it keep the optimizer, so all that can be done here is to report it.

    Raises
    ------
    RuntimeError
        If DeepSpeed's optimizer would compute something else. Otherwise there is only a warning.
    """
    if caller.f_code.co_name != "map_pytorch_optim_to_deepspeed":
        return
    lost = optimizer.not_in_deepspeeds_adam()
    said = (
        f"Accelerate replaces this {type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__} by "
        "DeepSpeed's DeepSpeedCPUAdam, as the optimizer is offloaded"
    )
    remedy = (
        "call adamops.deepspeed.patch() before accelerator.prepare(), or set "
        '"zero_force_ds_cpu_optimizer": false and "zero_allow_untested_optimizer": true in DeepSpeed\'s config'
    )
    if lost:
        raise RuntimeError(f"{said}, which does not have its {', '.join(lost)}. To keep it, {remedy}")
    warnings.warn(f"{said}, which compiles its op at the first step. To keep it, {remedy}", stacklevel=4)


# Children of multiprocessing are new processes ----------------------------------------------------------------------


class PatchedChildren:
    """Sent to each spawned child with multiprocessing's settings. Patches DeepSpeed there when it is unpickled.

    The patch waits until the child imports DeepSpeed, as children that only load data do not need it.
    """

    _KEY = "adamops.deepspeed"

    def __init__(self, shm_comm: bool | None) -> None:
        self._shm_comm = shm_comm

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived_in_child, (self._shm_comm,)

    @classmethod
    def _settings(cls) -> dict[str, Any]:
        """The settings of this process that its children inherit."""
        return getattr(multiprocessing.current_process(), "_config", {})

    def enable(self) -> None:
        """From now on, children of this process are patched, and their children too."""
        self._settings()[self._KEY] = self

    def disable(self) -> None:
        """From now on, new children are not patched."""
        self._settings().pop(self._KEY, None)


def _arrived_in_child(shm_comm: bool | None) -> PatchedChildren:
    def patch() -> None:
        from . import deepspeed

        try:
            deepspeed.patch(shm_comm=shm_comm)
        except Exception as error:  # the child may not need it
            warnings.warn(f"adamops.deepspeed cannot patch DeepSpeed in this child process: {error}", stacklevel=2)

    when_imported("deepspeed", patch)
    return PatchedChildren(shm_comm)

"""The part of an offloaded optimizer that saves and loads: its states and settings are those of the inner optimizer.

Must not know how a step is done.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..optim.optimizer import RuleOptimizer
from .chunks import Chunk, Entry
from .pipeline import Pipeline


class CheckpointedOffload(Optimizer):
    """Has an inner optimizer, whose params are copies on the host, and the same settings as that one."""

    _pipeline: Pipeline
    _inner: RuleOptimizer
    _entries: dict[Tensor, tuple[Entry, Chunk]]
    _chunks: list[Chunk]
    _ids: list[list[int]]  # of the params of each group

    def wait(self) -> None:
        """Returns once all params are updated and on their way. What is computed from now on comes after them."""
        self._pipeline.settle()

    @property  # type: ignore[override]
    def state(self) -> Mapping[Tensor, Any]:
        """The states of the inner optimizer, by the params on the device. A new dict at each access."""
        if "_inner" not in vars(self):
            return {}
        self.wait()
        states = self._inner.state
        own = {param: states[entry.host] for param, (entry, _) in self._entries.items() if entry.host in states}
        return _States(own, any(chunk.has_grads for chunk in self._chunks))

    @state.setter
    def state(self, value: Any) -> None:
        if value or "_ids" in vars(self):  # torch's constructor sets none
            raise AttributeError("the states of an offloaded optimizer are its inner one's; use load_state_dict()")

    def state_dict(self, **options: Any) -> dict[str, Any]:
        """The state dict that the inner optimizer would have for the params on the device, with its options."""
        self._bring_params()
        self._give_settings()
        return self._inner.state_dict(**options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the inner optimizer loads."""
        self._bring_params()
        self._inner.load_state_dict(state_dict)
        self._take_settings()

    def _bring_params(self) -> None:
        """Waits until the inner optimizer has the params as they are on the device."""
        self.wait()
        self._pipeline.bring_changed(self._chunks)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self._inner.register_state_dict_pre_hook(_given(self, hook), prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self._inner.register_state_dict_post_hook(_given(self, hook), prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self._inner.register_load_state_dict_pre_hook(_given(self, hook), prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self._inner.register_load_state_dict_post_hook(_given(self, hook), prepend)

    def __getstate__(self) -> Any:
        raise TypeError("an offloaded optimizer cannot be copied or pickled; save its state_dict()")

    def _give_settings(self) -> None:
        """Gives the inner optimizer the groups' settings, and what GradScaler has set for a step.

        Raises ValueError if someone has changed which params the groups have.
        """
        if [list(map(id, group["params"])) for group in self.param_groups] != self._ids:
            raise ValueError(
                "The params in param_groups are no longer those that the optimizer was given; use add_param_group(), "
                "or make a new optimizer"
            )
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            _copy_settings(group, own)
        for name in ("grad_scale", "found_inf"):
            if hasattr(self, name):
                setattr(self._inner, name, getattr(self, name))
            else:
                vars(self._inner).pop(name, None)

    def _take_settings(self, first: int = 0) -> None:
        """Takes over what the inner optimizer has completed or loaded, in groups from this index on."""
        for group, own in list(zip(self.param_groups, self._inner.param_groups, strict=False))[first:]:
            _copy_settings(own, group)


def _given(optimizer: Optimizer, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of the inner optimizer that calls this one with the optimizer that the user has."""
    owner = weakref.ref(optimizer)
    return lambda _, *arguments: hook(owner(), *arguments)


def _copy_settings(group: Mapping[str, Any], to: dict[str, Any]) -> None:
    """Gives a param group all settings of another, and none that the other lacks."""
    for name in to.keys() - group.keys():
        del to[name]
    to.update({name: value for name, value in group.items() if name != "params"})


class _States(dict[Tensor, Any]):
    """States by param. True also if there are none yet, but grads for the first step.

    torch.distributed.checkpoint would make states then, by a step of its own, if it saw neither states nor grads.
    """

    def __init__(self, states: Mapping[Tensor, Any], has_grads: bool) -> None:
        super().__init__(states)
        self._has_grads = has_grads

    def __bool__(self) -> bool:
        return self._has_grads or len(self) > 0

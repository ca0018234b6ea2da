"""The precision of each param group, which cannot change in the middle of training. Must not know of optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .state.precision import SETTINGS, Precision, own_settings, precision_of


class _Kept(NamedTuple):
    group: dict[str, Any]  # held, so that its id() is not given to another
    settings: dict[str, Any]  # its own precision settings
    precision: Precision
    size: int  # number of its keys if it has no such settings, else -1


class GroupPrecisions:
    """The precisions of an optimizer's param groups, from the groups' own settings or the optimizer's."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def keep(self, group: dict[str, Any], precision: Precision) -> None:
        """Records the precision of a group as it is set now."""
        settings = own_settings(group)
        self._kept[id(group)] = _Kept(group, settings, precision, -1 if settings else len(group))

    def of(self, group: dict[str, Any], where: str, default: Precision) -> Precision:
        """The precision of a group's params and states; `default` is the optimizer's.

        Raises ValueError if the group's precision settings were changed: its states still have the former precision.
        """
        kept = self._kept.get(id(group))
        if kept is None:  # a copy of a group
            return checked_precision(group, where, default)
        if kept.size == len(group) and group.keys().isdisjoint(SETTINGS):  # none before, and none now
            return kept.precision
        settings = own_settings(group)
        if settings != kept.settings:
            raise ValueError(
                f"The precision of {where} was set to {settings}, from {kept.settings}: it cannot be changed in the "
                "middle of training, but optimizer.load_state_dict(optimizer.state_dict()) converts the states"
            )
        self.keep(group, kept.precision)
        return kept.precision

    def settings_of(self, group: dict[str, Any]) -> Mapping[str, Any]:
        """The precision settings that the group had when they were recorded."""
        return self._kept[id(group)].settings

    def forget_others(self, groups: Sequence[dict[str, Any]]) -> None:
        """Releases groups that are not among these, with their params."""
        if len(self._kept) > len(groups):
            ids = set(map(id, groups))
            self._kept = {key: kept for key, kept in self._kept.items() if key in ids}

    def clear(self) -> None:
        """Forgets all groups."""
        self._kept.clear()


def checked_precision(group: Mapping[str, Any], where: str, default: Precision) -> Precision:
    """The precision that the group's own settings give, else the default. Raises what precision_of() raises."""
    settings = own_settings(group)
    if not settings:
        return default
    try:
        return precision_of(settings, default)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None

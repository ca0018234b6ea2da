"""What makes an optimizer that optimizer: its states, its hyper-parameters, and how a step updates a param.

A rule is a subclass of Rule. All else is the engine's, and no rule needs to know it: precision, clipping, loss scaling,
devices, checkpoints. Must not know of optimizers, memory or any one rule.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .settings import check_flags, check_number


class State(NamedTuple):
    """A tensor that a rule keeps for each param, of the param's shape, which starts at zero."""

    name: str
    signed: bool = True  # if not, its elements are never negative
    # How a step rounds it to bfloat16: "average", with noise that evens out over the steps, or "nearest".
    rounding: str = "average"
    optional: bool = False  # whether some param groups do without it; only the last ones may be


@functools.cache
def required(states: tuple[State, ...]) -> tuple[str, ...]:
    """The names of the states that every param group uses."""
    return tuple(state.name for state in states if not state.optional)


class Setting:
    """A setting of a param group that a rule has. Subclasses say which values are valid.

    `default` is for groups of older checkpoints that lack it; without one, it must be there.
    """

    default: Any = None

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its numbers."""
        return (self.name,)

    def check_numbers(self, value: Any, where: str) -> None:
        """Raises TypeError or ValueError for what is no number; `where` ends the message."""

    def check_range(self, value: Any, where: str) -> None:
        """Raises ValueError for a number out of range, when a param group is added; reads its value."""

    def check_loaded(self, value: Any, where: str) -> None:
        """Like check_range(), for a checkpoint, whose numbers a scheduler may be about to replace."""

    def numbers(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        """Its numbers, for a step. Raises what check_numbers() raises."""
        raise NotImplementedError


class Rate(Setting):
    """A number of 0 or more. `words` are for messages."""

    def __init__(self, name: str, words: str | None = None) -> None:
        super().__init__(name)
        self.words = words or name

    def check_numbers(self, value: Any, where: str) -> None:
        check_number(value, self.name, where)

    def check_range(self, value: Any, where: str) -> None:
        if not float(value) >= 0.0:
            raise ValueError(f"Invalid {self.words}: {value}{where}; expected 0 or more")

    def numbers(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        value = group[self.name]
        if type(value) is float:
            return (value,)
        number = to_number(value, self.name, where)
        # A learning rate on a GPU stays there, as float() would wait for the GPU.
        return (number if self.name == "lr" else float(number),)


class DecayRates(Setting):
    """Decay rates of averages, each in [0, 1): as many as there are in `example`."""

    def __init__(self, name: str, example: tuple[float, ...]) -> None:
        super().__init__(name)
        self.example = example
        self._one = name.removesuffix("s")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self._one}{i + 1}" for i in range(len(self.example)))

    def check_numbers(self, value: Any, where: str) -> None:
        self.unpacked(value, where)

    def check_range(self, value: Any, where: str) -> None:
        self.check_decays(tuple(map(float, value)), where)

    check_loaded = check_range

    def numbers(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        values = self.unpacked(group[self.name], where)
        decays = tuple(float(to_number(value, f"{self.name}[{i}]", where)) for i, value in enumerate(values))
        self.check_decays(decays, where)
        return decays

    def unpacked(self, values: Any, where: str) -> tuple[Any, ...]:
        """The numbers. Raises TypeError or ValueError if these are not as many numbers as expected."""
        count = len(self.example)
        try:
            unpacked = tuple(values)
        except (TypeError, ValueError):
            unpacked = ()
        if len(unpacked) != count:
            how_many = "two numbers" if count == 2 else f"as many numbers as in {self.example}"
            raise TypeError(f"Invalid {self.name}: {values!r}{where}; expected {how_many}, such as {self.example}")
        for i, value in enumerate(unpacked):
            check_number(value, f"{self.name}[{i}]", where)
        return unpacked

    def check_decays(self, decays: Sequence[float], where: str) -> None:
        """Raises ValueError for a decay rate out of range."""
        for i, decay in enumerate(decays):
            if not 0.0 <= decay < 1.0:
                one = self._one
                raise ValueError(f"Invalid {one} parameter at index {i}: {decay}{where}; expected 0 <= {one} < 1")


class Flag(Setting):
    """True or False. `hint` is for a message about a tuple or list, as of an argument in the wrong position."""

    def __init__(self, name: str, default: bool = False, hint: str = "") -> None:
        super().__init__(name)
        self.default = default
        self.hint = hint

    def check(self, value: Any, where: str) -> None:
        """Raises TypeError for what is neither True nor False."""
        check_flags({self.name: value}, where, self.hint if isinstance(value, (tuple, list)) else "")

    def numbers(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        return (1.0 if group.get(self.name, self.default) else 0.0,)


class Rule(abc.ABC):
    """An update rule. It keeps nothing about any optimizer, so all optimizers of a kind may share one.

    Attributes
    ----------
    described
        What messages call an optimizer with this rule, such as "a Lion optimizer".
    states
        All states that a param may have, in order. A param group uses the first ones of them: states_of().
    settings
        The settings of a param group, the first of which is ``Rate("lr")``.
    hyper_names
        The names of the numbers that hyper_of_group() returns, in order; those of the settings, if not set.
    ops
        The name of the compiled op for each type of device that has one. Without one, steps are done by update().
    """

    described: ClassVar[str]
    states: ClassVar[tuple[State, ...]] = ()
    settings: ClassVar[tuple[Setting, ...]]
    hyper_names: ClassVar[tuple[str, ...]]
    ops: ClassVar[Mapping[str, str]] = {}

    def __str__(self) -> str:
        """In words, for those who print an optimizer."""
        return type(self).__name__

    def in_words(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """In words, as these param groups use it."""
        return str(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "settings" in cls.__dict__ and (not cls.settings or cls.settings[0].name != "lr"):
            raise TypeError(f"The first of the settings of {cls.__name__} must be the learning rate, 'lr'")
        if "hyper_names" not in cls.__dict__ and "settings" in cls.__dict__:
            cls.hyper_names = tuple(name for setting in cls.settings for name in setting.names)
        names = ["step", *(state.name for state in cls.states)]
        if len(set(names)) < len(names):
            raise TypeError(f"The states of {cls.__name__} need different names, and none is 'step'")
        if [state.optional for state in cls.states] != sorted(state.optional for state in cls.states):
            raise TypeError(f"Of the states of {cls.__name__} only the last may be optional")

    # The update -------------------------------------------------------------------------------------------------------

    def scalars(self, hyper: tuple[float, ...], step: int) -> Any:
        """What update() needs of the hyper-parameters in a step, which counts from 1; computed in double."""
        return hyper

    @abc.abstractmethod
    def update(self, k: Any, param: Tensor, grad: Tensor, states: dict[str, Tensor]) -> Tensor:
        """Returns the new param, and replaces the tensors in `states` by new ones. All are of float32.

        `k` is what scalars() returned. The grad is to be minimized along: it is unscaled, clipped, and negated if the
        objective is to be maximized. This is done where no op is compiled; an op does the same. It must not raise:
        other params of the step are updated by then.
        """

    # Settings of param groups -----------------------------------------------------------------------------------------

    def states_of(self, group: Mapping[str, Any]) -> tuple[State, ...]:
        """The states that a param group uses: `states`, perhaps without the last ones."""
        return self.states

    def hyper_of_group(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        """The hyper-parameters of a group as numbers: floats, but `lr` may be a tensor on a GPU. Flags are 0 or 1.

        Called at each step. Raises TypeError or ValueError for what is no number or must not reach an op; `where` ends
        the message. `to_number(value, name, where)` converts a value.
        """
        return tuple(number for setting in self.settings for number in setting.numbers(group, where, to_number))

    def check_group(self, group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        """Raises TypeError or ValueError for a param group, to be added, with a setting that is invalid.

        `defaults` are the settings that the group does not have itself. `where` is the name of the group, or empty for
        the optimizer's arguments.
        """
        values, in_group = {**defaults, **group}, f" in {where}" if where else ""
        for setting in self.settings:
            if setting.name in values and isinstance(setting, Flag):
                setting.check(values[setting.name], in_group)
        numbers = self._numbers()
        if missing := [setting.name for setting in numbers if setting.name not in values]:
            raise TypeError(f"{self.described} needs the setting {missing[0]!r}{in_group}")
        for setting in numbers:
            setting.check_numbers(values[setting.name], in_group)
        for setting in numbers:
            setting.check_range(values[setting.name], in_group)

    def _numbers(self) -> list[Setting]:
        """The settings that every group must have: all but flags, which have defaults."""
        return [setting for setting in self.settings if not isinstance(setting, Flag)]

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def check_loaded_group(self, group: Mapping[str, Any], where: str) -> None:
        """Raises TypeError or ValueError for the param group of a checkpoint that is invalid or another optimizer's."""
        needed = self._numbers()
        missing = [setting.name for setting in needed if setting.name not in group]
        if missing:
            raise ValueError(
                f"{where} has no {missing[0]}; this is not the state of {self.described}"
                + _but_looks_like(self.other_optimizer_of_group(group, missing))
            )
        for setting in needed:
            setting.check_numbers(group[setting.name], f" in {where}")
        for setting in needed:
            setting.check_loaded(group[setting.name], f" in {where}")

    def check_loaded_state(self, state: Mapping[str, Any], name: str, before_first_step: Sequence[str]) -> None:
        """Raises ValueError for the loaded state of a param that lacks a tensor or is another optimizer's.

        A param that never had a grad may lack all states, if it has only what may be loaded `before_first_step`.
        """
        missing = [key for key in ("step", *required(self.states)) if key not in state]
        not_begun = state.keys() <= {"step", *before_first_step} and state.get("step", 0) == 0
        if not missing or not_begun:
            return
        raise ValueError(
            f"{name} has no {', '.join(map(repr, missing))} in its state but {', '.join(map(repr, state))}; "
            f"this is not the state of {self.described}" + _but_looks_like(self.other_optimizer_of_state(state))
        )

    def other_optimizer_of_group(self, group: Mapping[str, Any], missing: Sequence[str]) -> str | None:
        """The name of the other optimizer that a group in a checkpoint seems to be of, which lacks settings."""
        return None

    def other_optimizer_of_state(self, state: Mapping[str, Any]) -> str | None:
        """The name of the other optimizer that the state of a param in a checkpoint seems to be of."""
        return None

    def add_missing_settings(self, group: dict[str, Any]) -> None:
        """Adds flags that a group of an older or another checkpoint lacks."""
        for setting in self.settings:
            if isinstance(setting, Flag):
                group.setdefault(setting.name, setting.default)


def sign(x: Tensor) -> Tensor:
    """1, -1 or 0 for each element; NaN stays NaN, as in csrc/rules/rule.h, where torch's is 0."""
    return torch.where(x.isnan(), x, x.sign())


def _but_looks_like(other: str | None) -> str:
    return f", but looks like that of {other}" if other else ""


def integer_power(base: float, exponent: int) -> float:
    """base ** exponent by squaring, in double; the exponent is 0 or more.

    Its bits depend only on IEEE multiplication, while pow() differs in the last place between C libraries. The relative
    error is below exponent * 2**-52 (each squaring doubles the error made so far). That is 2.2e-10 after a million
    steps, when the power itself has long been negligible.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result

"""The precision in which an optimizer keeps states and params: the tensors in a param's state, and their dtypes."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import State
from ..settings import check_flags
from .quantization import block_count, format_of

# The dtypes that the ops know, in the order of csrc/formats/dtype.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAM_DTYPES = DTYPES  # of params, and of loaded states
HALF_DTYPES = PARAM_DTYPES[1:]  # of params that may have master weights
GRAD_DTYPES = DTYPES  # of the grads of float32 params; others have the param's dtype or float32
LOWP_DTYPES = HALF_DTYPES  # of copies of params
EIGHT_BIT = "8bit"
STATE_DTYPES = (torch.float32, torch.bfloat16, EIGHT_BIT)
LEAST_QUANTIZED = 4096  # elements: with 8-bit states, smaller params keep float32 states

SCALES = "block_scales"
QUANTIZED = "quantized_"  # a prefix in state dicts: nobody takes quantized states for floats
MASTER = "master_param"
REMAINDER = "param_remainder"
OF_ENGINE = (SCALES, MASTER, REMAINDER)  # tensors in the state of a param that no rule knows

SETTINGS = ("state_dtype", "fp32_optimizer_states", "master_weight_bits", "master_weights", "stochastic_rounding")
_FLAGS = ("fp32_optimizer_states", "master_weights", "stochastic_rounding")
_OF_STATES, _OF_MASTERS = SETTINGS[:2], SETTINGS[2:4]  # a param group that sets one of a pair inherits neither


class Master(enum.IntEnum):
    """The kind of master weights of a 16-bit param: enum Master in csrc/tensor.h."""

    NONE = 0
    FP32 = 1  # a float32 master, of which the param is a rounded copy
    REMAINDER_8 = 2  # the bits that complete the param to a 24-bit master
    REMAINDER_16 = 3  # or to a 32-bit master

    @property
    def key(self) -> str:
        """The name of the master or remainder in the state of a param."""
        return MASTER if self is Master.FP32 else REMAINDER

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the master or remainder."""
        return {Master.FP32: torch.float32, Master.REMAINDER_8: torch.int8, Master.REMAINDER_16: torch.int16}[self]

    @classmethod
    def of_bits(cls, bits: int | None) -> Master:
        """The kind that `master_weight_bits` asks for."""
        kinds = {None: cls.NONE, 24: cls.REMAINDER_8, 32: cls.REMAINDER_16}
        if isinstance(bits, bool) or not isinstance(bits, (int, type(None))) or bits not in kinds:
            raise ValueError(f"Invalid master_weight_bits: {bits!r}; expected None, 24 or 32")
        return kinds[bits]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of an optimizer's states and params. `state_dtype` None: states are as wide as their param."""

    state_dtype: torch.dtype | str | None = torch.float32
    master: Master = Master.NONE
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        if self.state_dtype == torch.float16:
            raise ValueError(
                "Invalid state_dtype: torch.float16, in which the squares of small grads (0.001, say) become zero, and "
                "params run away; use torch.bfloat16, which takes as much memory, or '8bit'"
            )
        if self.state_dtype is not None and self.state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"Invalid state_dtype: {self.state_dtype}; expected torch.float32, torch.bfloat16 or '8bit'"
            )
        if self.master is Master.FP32 and self.state_dtype != torch.float32:
            found = self.state_dtype or "those of the params' dtype"
            raise ValueError(f"master_weights=True goes with float32 states, not {found}; use master_weight_bits=32")
        if self.stochastic_rounding and self.master in (Master.FP32, Master.REMAINDER_16):
            raise ValueError(
                "stochastic_rounding=True goes with no master weights, or with 24-bit ones: wider ones lose nothing"
            )

    def __str__(self) -> str:
        """In words, for those who print an optimizer."""
        states = "their param's dtype" if self.state_dtype is None else str(self.state_dtype).removeprefix("torch.")
        masters = {
            Master.NONE: "no master weights",
            Master.FP32: "float32 master weights",
            Master.REMAINDER_8: "24-bit master weights",
            Master.REMAINDER_16: "32-bit master weights",
        }
        words = ["8-bit states" if self.state_dtype == EIGHT_BIT else f"states of {states}", masters[self.master]]
        return ", ".join([*words, "stochastic rounding"] if self.stochastic_rounding else words)

    def quantizes_states(self, param: Tensor) -> bool:
        """Whether the states of a param are quantized to 8 bits."""
        return self.state_dtype == EIGHT_BIT and param.numel() >= LEAST_QUANTIZED

    def master_of(self, param: Tensor) -> Master:
        """The kind of master weights of a param; NONE if it is not a 16-bit param."""
        return self.master if param.dtype in HALF_DTYPES else Master.NONE

    def float_state_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of states that are not quantized."""
        if self.state_dtype is None:
            # Never float16, for the reason in __post_init__().
            return torch.float32 if param.dtype == torch.float32 else torch.bfloat16
        return torch.float32 if isinstance(self.state_dtype, str) else self.state_dtype

    def state_dtypes(self, param: Tensor, states: Sequence[State]) -> dict[str, torch.dtype]:
        """The dtypes of the tensors in the state of a param, by name, given the states in use."""
        if states and self.quantizes_states(param):
            dtypes = {state.name: format_of(state).dtype for state in states} | {SCALES: torch.bfloat16}
        else:
            dtypes = dict.fromkeys((state.name for state in states), self.float_state_dtype(param))
        master = self.master_of(param)
        return dtypes | {master.key: master.dtype} if master else dtypes


def own_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The precision settings that a param group sets itself."""
    return {name: group[name] for name in SETTINGS if name in group}


def precision_of(settings: Mapping[str, Any], inherited: Precision) -> Precision:
    """The precision of a param group, from settings named like the optimizers' arguments.

    What they do not say about states, masters or rounding comes from `inherited`. Raises ValueError or TypeError if
    they contradict each other, or if one has an invalid value.
    """
    check_flags({name: settings[name] for name in _FLAGS if name in settings})
    state_dtype, master = inherited.state_dtype, inherited.master
    if not settings.keys().isdisjoint(_OF_STATES):
        given, in_fp32 = settings.get("state_dtype"), settings.get("fp32_optimizer_states", True)
        if given is not None and not in_fp32:
            raise ValueError(f"fp32_optimizer_states=False and state_dtype={given!r}: give one of them")
        default = torch.float32 if in_fp32 else None
        state_dtype = default if given is None else given
    if not settings.keys().isdisjoint(_OF_MASTERS):
        bits, in_fp32 = settings.get("master_weight_bits"), settings.get("master_weights", False)
        master = Master.of_bits(bits)
        if in_fp32 and master:
            raise ValueError(f"master_weights=True and master_weight_bits={bits}: give one of them")
        master = Master.FP32 if in_fp32 else master
    return Precision(state_dtype, master, bool(settings.get("stochastic_rounding", inherited.stochastic_rounding)))


@functools.cache
def names_of(states: tuple[State, ...]) -> tuple[str, ...]:
    """The names of states."""
    return tuple(state.name for state in states)


@functools.cache
def tensors_of(states: tuple[State, ...]) -> tuple[str, ...]:
    """The names of all tensors, but the step count, that the state of a param may have."""
    return (*names_of(states), *OF_ENGINE)


def scales_shape(param: Tensor, states: Sequence[State]) -> tuple[int, int]:
    """The shape of a param's scales: a row for each quantization block, a column for each state in use."""
    return block_count(param.numel()), len(states)

"""In what precision an optimizer keeps states and params: the tensors in the state of a param, and their dtypes."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from .block_codes import CODES, blocks_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BIT = "8bit"
STATE_DTYPES = (torch.float32, torch.bfloat16, EIGHT_BIT)
LEAST_CODED = 4096  # elements: states of smaller params are float32 where those of others are 8-bit codes

AVERAGES = tuple(CODES)
SCALES = "block_scales"
MASTER = "master_param"
REMAINDER = "param_remainder"
STATE_TENSORS = (*AVERAGES, SCALES, MASTER, REMAINDER)


class Master(enum.IntEnum):
    """What a 16-bit param has beside it: enum Master in csrc/adam/adam_tensor.h."""

    NONE = 0
    FP32 = 1  # a copy in float32, of which the param is the rounded copy
    REMAINDER_8 = 2  # the bits that it lacks of a master of 24 bits
    REMAINDER_16 = 3  # or of 32

    @property
    def key(self) -> str:
        """The name of that tensor in the state of a param."""
        return MASTER if self is Master.FP32 else REMAINDER

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of that tensor."""
        return {Master.FP32: torch.float32, Master.REMAINDER_8: torch.int8, Master.REMAINDER_16: torch.int16}[self]

    @classmethod
    def of_bits(cls, bits: int | None) -> Master:
        """That of `master_weight_bits`."""
        kinds = {None: cls.NONE, 24: cls.REMAINDER_8, 32: cls.REMAINDER_16}
        if bits not in kinds:
            raise ValueError(f"Invalid master_weight_bits: {bits}; expected None, 24 or 32")
        return kinds[bits]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of an optimizer's states and params; `state_dtype` None: of as many bits as each param."""

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

    def codes_states(self, param: Tensor) -> bool:
        """Whether the states of a param are 8-bit codes."""
        return self.state_dtype == EIGHT_BIT and param.numel() >= LEAST_CODED

    def master_of(self, param: Tensor) -> Master:
        """What a param has beside it; nothing if it is float32."""
        return Master.NONE if param.dtype == torch.float32 else self.master

    def float_state_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of states that are not codes."""
        if self.state_dtype is None:
            # Never float16, for the reason above.
            return torch.float32 if param.dtype == torch.float32 else torch.bfloat16
        return torch.float32 if isinstance(self.state_dtype, str) else self.state_dtype

    def state_dtypes(self, param: Tensor, amsgrad: bool) -> dict[str, torch.dtype]:
        """The tensors in the state of a param, by name, with their dtypes."""
        names = averages_of(amsgrad)
        if self.codes_states(param):
            dtypes = {name: CODES[name].dtype for name in names} | {SCALES: torch.bfloat16}
        else:
            dtypes = dict.fromkeys(names, self.float_state_dtype(param))
        master = self.master_of(param)
        return dtypes | {master.key: master.dtype} if master else dtypes


def averages_of(amsgrad: bool) -> tuple[str, ...]:
    """The names of the averages that a step keeps."""
    return AVERAGES if amsgrad else AVERAGES[:2]


def scales_shape(param: Tensor, amsgrad: bool) -> tuple[int, int]:
    """The shape of the scales of a param's states: a row for each block of elements, a column for each state."""
    return blocks_of(param.numel()), len(averages_of(amsgrad))

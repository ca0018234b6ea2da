"""Adam: a drop-in replacement for deepspeed.ops.adam."""

import functools

from ..._deepspeed_expected import expect_deepspeed
from ...optim.optimizer import defaults_watchers, group_watchers
from .accelerate import check_not_replaced
from .adam import AdamRule
from .cpu_adam import CPUAdam, DeepSpeedCPUAdam
from .fused_adam import FusedAdam

group_watchers.append(functools.partial(expect_deepspeed, AdamRule.states))
defaults_watchers.append(check_not_replaced)

__all__ = ["CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"]

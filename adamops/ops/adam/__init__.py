"""Adam: drop-in replacements for deepspeed.ops.adam, and for Adam and AdamW of torch.optim."""

import functools

from ..._deepspeed_expected import expect_deepspeed
from ...optim.optimizer import defaults_watchers, group_watchers
from .accelerate import check_not_replaced
from .adam import AdamRule
from .cpu_adam import CPUAdam, DeepSpeedCPUAdam
from .fused_adam import FusedAdam
from .torch_names import Adam, AdamW

group_watchers.append(functools.partial(expect_deepspeed, AdamRule.states))
defaults_watchers.append(check_not_replaced)

__all__ = ["Adam", "AdamW", "CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"]

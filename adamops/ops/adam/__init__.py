"""Adam: a drop-in replacement for deepspeed.ops.adam."""

from ..._deepspeed_expected import expect_deepspeed
from ...optim.optimizer import group_watchers
from .cpu_adam import CPUAdam, DeepSpeedCPUAdam
from .fused_adam import FusedAdam

group_watchers.append(expect_deepspeed)

__all__ = ["CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"]

"""Adam: a drop-in replacement for deepspeed.ops.adam."""

from .cpu_adam import CPUAdam, DeepSpeedCPUAdam
from .fused_adam import FusedAdam

__all__ = ["CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"]

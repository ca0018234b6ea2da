"""Adam: a drop-in for deepspeed.ops.adam."""

from .cpu_adam import CPUAdam, DeepSpeedCPUAdam

__all__ = ["CPUAdam", "DeepSpeedCPUAdam"]

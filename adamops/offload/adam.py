"""Adam, offloaded."""

from __future__ import annotations

from typing import Any

from ..ops.adam import DeepSpeedCPUAdam
from .optimizer import OffloadedOptimizer


class OffloadedAdam(OffloadedOptimizer):
    """DeepSpeedCPUAdam on the host, for params on an accelerator.

    ::

        optimizer = adamops.OffloadedAdam(
            model.parameters(), lr=1e-3, state_dtype="8bit", master_weight_bits=24
        )
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    See OffloadedOptimizer, whose arguments these are, beside those of DeepSpeedCPUAdam.
    """

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(DeepSpeedCPUAdam, params, lr=lr, **settings)

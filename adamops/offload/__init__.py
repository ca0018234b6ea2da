"""Training with params on an accelerator, and optimizer states and updates on the host.

``adamops.offload(Class, params, ...)`` offloads any optimizer of adamops; adamops.OffloadedAdam is DeepSpeedCPUAdam.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from .adam import OffloadedAdam
from .optimizer import OffloadedOptimizer

__all__ = ["OffloadedAdam", "OffloadedOptimizer"]


class _CallableModule(types.ModuleType):
    """This module is also the function adamops.offload()."""

    def __call__(self, optimizer: Any, params: Any, **settings: Any) -> OffloadedOptimizer:
        """Returns an OffloadedOptimizer of this class and these arguments."""
        return OffloadedOptimizer(optimizer, params, **settings)


sys.modules[__name__].__class__ = _CallableModule

"""Adam and AdamW for training on the CPU, compiled ahead of time.

    from adamops import DeepSpeedCPUAdam
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-3)

`python -m adamops.report` shows which ops are built and in use here, and why not; `python -m adamops.bench` times them.
Importing adamops does not import torch; the first access to an optimizer does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .in_backward import step_in_backward
    from .ops.adam import CPUAdam, DeepSpeedCPUAdam, FusedAdam
    from .ops.adam.saving import portable_state_dicts

__version__ = "0.1.0"
__all__ = ["CPUAdam", "DeepSpeedCPUAdam", "FusedAdam", "__version__", "portable_state_dicts", "step_in_backward"]

# In a checkout, op_builder and csrc are next to this folder, not inside it. With the checkout on the path, Python finds
# `adamops` here even without an editable install, and it should work then too.
_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "adamops" / "op_builder").is_dir() and (_checkout / "op_builder" / "builder.py").is_file():
    __path__.append(str(_checkout))


# Imported on first access.
_SUBMODULES = ("bench", "data_parallel", "deepspeed", "in_backward", "op_builder", "ops", "plugin_process", "report")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"):
        from .ops import adam

        return getattr(adam, name)
    if name == "step_in_backward":
        from .in_backward import step_in_backward

        return step_in_backward
    if name == "portable_state_dicts":
        from .ops.adam.saving import portable_state_dicts

        return portable_state_dicts
    raise AttributeError(f"module 'adamops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

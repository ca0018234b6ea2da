"""Adam and AdamW for PyTorch, compiled ahead of time.

    optimizer = adamops.AdamW(model.parameters(), lr=1e-3)  # the arguments of torch.optim.AdamW

`python -m adamops.report` shows which ops are built and in use here, and why not; `python -m adamops.bench` times them.
Importing adamops does not import torch; the first access to an optimizer does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offload import OffloadedAdam
    from .ops.adam import Adam, AdamW, CPUAdam, DeepSpeedCPUAdam, FusedAdam
    from .optim.backward import step_in_backward
    from .optim.checkpoint.saving import portable_state_dicts
    from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    "Adam",
    "AdamW",
    "CPUAdam",
    "DeepSpeedCPUAdam",
    "FusedAdam",
    "OffloadedAdam",
    "__version__",
    "get_num_threads",
    "portable_state_dicts",
    "set_num_threads",
    "step_in_backward",
]

# In a checkout, op_builder is next to this folder, not inside it. With the checkout on the path, Python finds `adamops`
# here even without an editable install, and it should work then too.
_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "adamops" / "op_builder").is_dir() and (_checkout / "op_builder" / "registry.py").is_file():

    class _OpBuilderOfCheckout(importlib.abc.MetaPathFinder):
        """Finds adamops.op_builder in the checkout, and nothing else there."""

        def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
            if fullname != f"{__name__}.op_builder":
                return None
            return importlib.machinery.PathFinder.find_spec(fullname, [str(_checkout)], target)

    sys.meta_path.append(_OpBuilderOfCheckout())


# Imported on first access.
_HOMES = {
    **dict.fromkeys(("Adam", "AdamW", "CPUAdam", "DeepSpeedCPUAdam", "FusedAdam"), "adamops.ops.adam"),
    "OffloadedAdam": "adamops.offload",
    "step_in_backward": "adamops.optim.backward",
    "portable_state_dicts": "adamops.optim.checkpoint.saving",
    **dict.fromkeys(("get_num_threads", "set_num_threads"), "adamops.threads"),
}
_SUBMODULES = (
    "bench",
    "deepspeed",
    "functional",
    "in_backward",
    "offload",
    "op_builder",
    "ops",
    "optim",
    "plugin_process",
    "report",
    "threads",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        try:
            module = importlib.import_module(_HOMES[name])
        except AttributeError as error:  # "from adamops import ..." would drop it, and say only that there is no name
            raise ImportError(f"{_HOMES[name]} cannot be imported: {error}") from error
        return getattr(module, name)
    raise AttributeError(f"module 'adamops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_SUBMODULES})

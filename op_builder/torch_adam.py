"""The builder of torch_adam, the last resort: the same update in pure PyTorch. There is nothing to compile."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .loading import OpBuilder
from .spec import Compatibility


class TorchAdamBuilder(OpBuilder):
    """Adam in pure PyTorch: slow, but it runs wherever torch does."""

    NAME = "torch_adam"
    MODULE = "adamops.optim.backends.torch"
    HELP = "Install torch."

    def sources(self) -> list[str]:
        return []

    def compatibility(self) -> Compatibility:
        if importlib.util.find_spec("torch") is None:
            return Compatibility(False, "torch is not installed")
        return Compatibility(True, "runs wherever torch does")

    def is_prebuilt(self) -> bool:
        return True

    def load_prebuilt(self) -> Any:
        return importlib.import_module(self.MODULE)

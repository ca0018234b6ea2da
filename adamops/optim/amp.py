"""How an optimizer works with loss scaling, which keeps float16 grads from underflowing."""

from __future__ import annotations

import sys
from typing import Any

_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


class StepSupportsAmpScaling:
    """The attribute that tells torch.amp.GradScaler to leave unscaling, and skipping steps, to step().

    Lightning reads it too, and takes True to mean that grads cannot be clipped, because they are scaled until the step.
    It then refuses to clip under every mixed precision, even bfloat16, where there is no scale. But step() takes both
    scaled and unscaled grads, so Lightning reads False. It unscales the grads if they are scaled, clips them, and
    leaves the step to the GradScaler, which knows that they are unscaled.

    With steps in the backward pass, scaled grads are used before the GradScaler can check them for infinities. Reading
    the attribute then raises a RuntimeError.
    """

    def __get__(self, optimizer: Any, owner: type | None = None) -> bool:
        if optimizer is not None:
            optimizer._refuse_in_backward("torch.amp.GradScaler")
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return asking.partition(".")[0] not in _LIGHTNING

"""What an optimizer answers to those who scale losses, so that float16 grads do not vanish."""

from __future__ import annotations

import sys
from typing import Any

_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


class UnscalesInStep:
    """What torch.amp.GradScaler asks of an optimizer: whether it leaves unscaling, and skipping steps, to step().

    Lightning asks too, and takes a yes to mean that grads cannot be clipped, as they are scaled until the step; it then
    refuses to clip under every mixed precision, bfloat16 as well, where there is no scale. But step() takes grads with
    the scale or without, so Lightning is told no: it unscales the grads where they are scaled, clips them, and leaves
    the step to the GradScaler, which knows that they are unscaled.

    Where steps are made in the backward pass, the scaled grads were used before the GradScaler could look at them for
    infinities: asking is a RuntimeError then.
    """

    def __get__(self, optimizer: Any, owner: type | None = None) -> bool:
        if optimizer is not None:
            optimizer._refuse_in_backward("torch.amp.GradScaler")
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return asking.partition(".")[0] not in _LIGHTNING

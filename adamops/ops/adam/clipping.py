"""The clip factor and the grads that it belongs to. Must not know of optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .memory import check_readable


class ClippedGrads:
    """Grads that steps are to multiply by a factor, as their norm was too large.

    They are not kept alive. A grad that was written since, by whatever operation, is another one.

    Attributes
    ----------
    factor
        A 0-dim float64 tensor, or a number.
    """

    def __init__(self, factor: float | Tensor, grads: Sequence[Tensor]) -> None:
        self.factor = factor
        self._entries = {id(grad): (weakref.ref(grad), _version(grad)) for grad in grads}

    def are(self, grads: Sequence[Tensor]) -> bool:
        """Whether all of these grads were clipped, and are as they were."""
        return all(map(self._has, grads))

    def settle(self, grads: Sequence[Tensor]) -> None:
        """Multiplies those of the grads that were clipped and are as they were by the factor; others are left alone."""
        with torch.no_grad():
            for grad in grads:
                if self._has(grad):
                    check_readable(grad, "a grad that clip_grad_norm_() has clipped")
                    grad.mul_(self.factor)

    def _has(self, grad: Tensor) -> bool:
        reference, version = self._entries.get(id(grad), (None, None))
        return reference is not None and reference() is grad and _version(grad) == version


def _version(tensor: Tensor) -> int | None:
    """How often the tensor has been written in place; None if torch does not count that."""
    try:
        return tensor._version
    except RuntimeError:  # a tensor of inference mode
        return None

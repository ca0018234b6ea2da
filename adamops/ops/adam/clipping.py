"""The clip factor and the grads that it belongs to. Must not know of optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .memory import check_writable, version_of


class ClippedGrads:
    """Grads that steps multiply by a factor because their norm was too large.

    They are not kept alive. A grad that has been written since, by any operation, no longer counts as clipped.

    Attributes
    ----------
    factor
        A 0-dim float64 tensor, or a number.
    """

    def __init__(self, factor: float | Tensor, grads: Sequence[Tensor]) -> None:
        self.factor = factor
        self._entries = {id(grad): (weakref.ref(grad), version_of(grad)) for grad in grads}

    def are(self, grads: Sequence[Tensor]) -> bool:
        """Whether all of these grads were clipped and are unchanged since."""
        return all(map(self._has, grads))

    def settle(self, grads: Sequence[Tensor]) -> None:
        """Multiplies the grads that were clipped and are unchanged since by the factor; leaves the others alone."""
        clipped = [grad for grad in grads if self._has(grad) and not grad._is_zerotensor()]
        for grad in clipped:
            check_writable(grad, "a grad that clip_grad_norm_() has clipped")
        with torch.no_grad():
            for grad in clipped:
                _without_repetition(grad).mul_(self.factor)

    def _has(self, grad: Tensor) -> bool:
        entry = self._entries.get(id(grad))
        return entry is not None and entry[0]() is grad and entry[1] == version_of(grad)


def _without_repetition(tensor: Tensor) -> Tensor:
    """A view with each element in memory once, even if the tensor is expanded."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor

"""The clip factor and the grads that it belongs to. Must not know of optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_compat import is_zero_tensor, version_of
from .float_environment import in_default_float_environment
from .memory import check_writable, count_writes, overlapping


class ClippedGrads:
    """Grads that steps multiply by a factor because their norm was too large.

    They are not kept alive. A grad that has been written since, by any operation, no longer counts as clipped. A write
    that torch does not count, as through ``grad.data``, shows in samples of the grads' elements, where there are any;
    the factor then belongs to none of them.

    Attributes
    ----------
    factor
        A 0-dim float64 tensor, or a number.
    norm
        Of all the grads as they were in memory, a 0-dim float64 tensor.
    """

    def __init__(
        self, factor: float | Tensor, norm: Tensor, grads: Sequence[Tensor], samples: Sequence[bytes | None]
    ) -> None:
        self.factor = factor
        self.norm = norm
        self._entries = {
            id(grad): (weakref.ref(grad), version_of(grad), sample) for grad, sample in zip(grads, samples, strict=True)
        }

    def are(self, grads: Sequence[Tensor]) -> bool:
        """Whether all of these grads were clipped, and torch has counted no write since."""
        return all(map(self._has, grads))

    def norm_of(self, grads: Sequence[Tensor]) -> Tensor | None:
        """The norm in memory that these grads, of which are() is true, had when clipped; None if there were others."""
        return self.norm if len(grads) == len(self._entries) else None

    def were_written_unseen(self, grads: Sequence[Tensor], samples: Sequence[bytes | None]) -> bool:
        """Whether a grad was written in a way that torch does not count."""
        return any(
            sample is not None and self._has(grad) and self._entries[id(grad)][2] not in (None, sample)
            for grad, sample in zip(grads, samples, strict=True)
        )

    @in_default_float_environment
    def settle(self, grads: Sequence[Tensor]) -> None:
        """Multiplies the grads that were clipped and are unchanged since by the factor; leaves the others alone."""
        distinct = {id(grad): grad for grad in grads}.values()
        clipped = [grad for grad in distinct if self._has(grad) and not is_zero_tensor(grad)]
        for grad in clipped:
            check_writable(grad, "a grad that clip_grad_norm_() has clipped")
        with torch.no_grad():
            # Not by version counters: views of one tensor share one, whether or not their elements overlap.
            for together in overlapping(clipped):
                _multiply(together, self.factor)

    def _has(self, grad: Tensor) -> bool:
        entry = self._entries.get(id(grad))
        return entry is not None and entry[0]() is grad and entry[1] == version_of(grad)


def _multiply(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiplies tensors whose memory overlaps; an element that several of them have is multiplied once."""
    first, *others = tensors
    if not others:
        _without_repetition(first).mul_(factor)
        return
    storage = first.untyped_storage()
    size = storage.nbytes() // first.element_size()
    places = torch.arange(size, device=first.device)
    # A tensor of another dtype, or of other storage at the same address, is taken to have no elements of its own.
    alike = [t for t in tensors if t.dtype == first.dtype and t.untyped_storage().data_ptr() == storage.data_ptr()]
    taken = torch.cat([places.as_strided(t.shape, t.stride(), t.storage_offset()).flatten() for t in alike]).unique()
    whole = first.new_empty(0).set_(storage, 0, (size,), (1,))
    whole[taken] = whole[taken].mul_(factor)
    count_writes(tensors)


def _without_repetition(tensor: Tensor) -> Tensor:
    """A view with each element in memory once, even if the tensor is expanded."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor

"""Clips all grads of an optimizer to a maximum norm without writing them: the next step applies the factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._torch_compat import COUNTS_WRITES
from . import dtensor
from .backends.base import Backend
from .clipping import ClippedGrads
from .grads import local_grads, with_grads
from .memory import check_readable
from .settings import to_number

_CPU = torch.device("cpu")


class Clippable(Protocol):
    """What clipping needs of an optimizer."""

    param_groups: list[dict[str, Any]]
    _backends: dict[torch.device, Backend]
    _clipped: Any  # ClippedGrads or None

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """The backend that updates the param. Raises ValueError if there is none."""

    def _to_number(self, value: Any, name: str, where: str = "") -> Any:
        """A hyper-parameter as a number; one on a GPU stays there."""


def clip_grad_norm(optimizer: Clippable, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Clips the optimizer's grads, and returns their norm: RuleOptimizer.clip_grad_norm_()."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    dtensor.check_norm_is_known(params)
    named = [
        (name, group["params"][index], param, grad)
        for i, group in enumerate(optimizer.param_groups)
        for index, name, param, grad in with_grads(group, f"param group {i}")
    ]
    if len({grad.device for *_, grad in named}) > 1:
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
    backend = optimizer._backend_of(named[0][2], named[0][0]) if named else optimizer._backends[_CPU]
    # From all params, not only those with a grad in this process: every process must add up the same parts.
    layouts = [dtensor.shard_layout(param) for param in params]
    parts: dict[dtensor.ShardLayout, list[Tensor]] = {layout: [] for layout in layouts} or {None: []}
    for _, owner, _, grad in named:
        parts[dtensor.shard_layout(owner)].append(grad)
    device = named[0][3].device if named else _CPU
    all_grads = [grad for *_, grad in named]
    factor = grad_factor(optimizer, all_grads)  # first: it may have to multiply some of them
    norms = {layout: _norm_of(backend, device, grads, norm_type) for layout, grads in parts.items()}
    norm = in_memory = dtensor.all_reduce_norm(norms, norm_type)
    before = None if optimizer._clipped is None else optimizer._clipped.norm_of(all_grads)
    if before is not None:
        factor = _factor_if_unchanged(factor, before, norm)
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        scale = to_number(scale, "grad_scale")
        norm = norm / torch.as_tensor(scale, dtype=torch.float64, device=norm.device).reshape(()).abs()
    norm = norm * factor
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} of the grads is {float(norm)}, so they cannot be clipped; "
            "to go on regardless, set error_if_nonfinite=False"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) * factor  # NaN stays
    optimizer._clipped = ClippedGrads(factor, in_memory, all_grads, backend.samples(all_grads))
    if not COUNTS_WRITES:  # nobody could tell at the step whether these are still the grads
        optimizer._clipped.settle(all_grads)
        optimizer._clipped = None
    return norm.float()


def grad_factor(optimizer: Clippable, grads: Sequence[Tensor] | None = None) -> float | Tensor:
    """What to multiply the grads by, as clip_grad_norm_() found; 1 if they are no longer the grads that it saw."""
    if optimizer._clipped is None:
        return 1.0
    if grads is None:
        groups = enumerate(optimizer.param_groups)
        grads = [grad for i, group in groups for grad in local_grads(group, f"param group {i}")]
    samples = optimizer._backends[_CPU].samples(grads)
    if optimizer._clipped.were_written_unseen(grads, samples):
        optimizer._clipped = None
        return 1.0
    if not optimizer._clipped.are(grads):
        optimizer._clipped.settle(grads)
        optimizer._clipped = None
        return 1.0
    return optimizer._to_number(optimizer._clipped.factor, "clip factor")


def _norm_of(backend: Backend, device: torch.device, grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all elements of grads on the device, as a float64 tensor there."""
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.full((), dtensor.norm_of_nothing(norm_type), dtype=torch.float64, device=device)
    norm = backend.grad_norm(grads, norm_type)
    if norm is not None:
        return torch.as_tensor(norm, dtype=torch.float64, device=device)
    for grad in grads:
        check_readable(grad, "a grad")
    norms = torch.stack([grad.float().norm(norm_type) for grad in grads])
    return torch.linalg.vector_norm(norms, norm_type).double()


def _factor_if_unchanged(factor: float | Tensor, before: Tensor, norm: Tensor) -> float | Tensor:
    """The clip factor of grads, or 1 if their norm in memory is not what it was: something wrote them unseen."""
    before = before.to(norm.device)
    is_unchanged = (norm == before) | (norm.isnan() & before.isnan())
    if isinstance(factor, Tensor):
        return torch.where(is_unchanged, factor, 1.0)
    return factor if is_unchanged else 1.0

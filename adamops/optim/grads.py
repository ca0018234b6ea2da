"""The grads of params, as steps, clipping and zeroing see them. Must not know of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_compat import is_zero_tensor
from . import dtensor
from .memory import PLAIN_TYPES, check_writable


def with_grads(group: dict[str, Any], where: str) -> list[tuple[int, str, Tensor, Tensor]]:
    """The index in the group, name, param and grad of each param that has a grad; for DTensors, the local tensors."""
    return [
        (i, name, dtensor.local(param), dtensor.local(dtensor.grad_like(param, param.grad, name)))
        for i, param in enumerate(group["params"])
        if param.grad is not None
        for name in [f"{where}, param {i}"]
    ]


def local_grads(group: dict[str, Any], where: str) -> list[Tensor]:
    """The grad of each param that has one; for DTensors, the local tensor."""
    params = group["params"]
    grads = [grad for param in params if (grad := param.grad) is not None]
    if {*map(type, params), *map(type, grads)}.issubset(PLAIN_TYPES):
        return grads
    return [grad for *_, grad in with_grads(group, where)]


def zeroable_grads(group: dict[str, Any], where: str) -> list[Tensor]:
    """The local grads of a group that have memory to zero."""
    return zeroable(local_grads(group, where), f"{where}: a grad")


def zeroable(grads: Sequence[Tensor], what: str) -> list[Tensor]:
    """Those grads that have memory to zero. Raises for one that torch cannot zero; `what` begins the message."""
    grads = [grad for grad in grads if not is_zero_tensor(grad)]
    for grad in grads:
        check_writable(grad, what)
        check_not_quantized(grad, what)
    return grads


def check_not_quantized(grad: Tensor, what: str) -> None:
    """Raises TypeError for a quantized tensor, which torch does not zero in place. `what` begins the message."""
    if grad.is_quantized:
        raise TypeError(f"{what} is quantized ({grad.dtype}), and torch cannot set it to zero; set it to None")


def sharded_grads(params: Sequence[Tensor]) -> list[Tensor]:
    """Those grads that are DTensors."""
    return [param.grad for param in params if param.grad is not None and dtensor.is_sharded(param.grad)]

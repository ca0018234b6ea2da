"""Params sharded over processes (DTensors): their local tensors and shard layouts, and the way back to DTensors.

Everything else in this package sees only local tensors. torch.distributed is not imported here: if there are DTensors,
it already is, and if there are none, it would add a second to each import of adamops.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch_compat
from .data_parallel import wrapper_of
from .memory import PLAIN_TYPES
from .state.precision import SCALES

# The mesh, and its dimensions, over which a param is sharded; None if each process that has it has all of it.
ShardLayout: TypeAlias = "tuple[Any, tuple[int, ...]] | None"


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, whatever its placements."""
    if type(tensor) in PLAIN_TYPES:
        return False
    found = _torch_compat.dtensor_class()
    return found is not None and isinstance(tensor, found)


def local(tensor: Any) -> Any:
    """The local tensor of a DTensor, sharing its memory; anything else is returned as it is."""
    if type(tensor) in PLAIN_TYPES:
        return tensor
    held = _torch_compat.local_tensor(tensor) if is_sharded(tensor) else tensor
    if type(held) not in PLAIN_TYPES and hasattr(held, "wait"):
        return held.wait()  # a collective is still filling it
    return held


def check_placed(param: Tensor, name: str) -> None:
    """Raises ValueError for a DTensor of which each process holds a summand (a partial placement)."""
    if is_sharded(param) and any(placement.is_partial() for placement in _placements(param)):
        raise ValueError(
            f"{name} is a DTensor placed as {_placements(param)}, of which each process holds a summand; "
            "only sharded and replicated params can be updated: redistribute it first"
        )


def grad_like(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """The grad with the placements of its param. Any other grad is redistributed once; the param keeps the result.

    Grads of replicated params are often partial, sums still to be reduced (tensor parallelism). Every process must then
    call this.

    Raises
    ------
    TypeError
        If one is a DTensor and the other is not.
    ValueError
        If they are on different meshes.
    """
    if type(param) in PLAIN_TYPES and type(grad) in PLAIN_TYPES:
        return grad
    if is_sharded(param) != is_sharded(grad):
        kinds = ["a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (param, grad)]
        raise TypeError(f"{name} is {kinds[0]} and its grad is {kinds[1]}; they must be of one kind")
    if not is_sharded(param) or _placed_alike(param, grad):
        return grad
    _check_mesh(param, grad, f"{name}: its grad")
    if grad.shape == param.shape:  # otherwise the check of shapes raises
        param.grad = grad.redistribute(placements=_placements(param))  # type: ignore[attr-defined]
    assert param.grad is not None
    return param.grad


def local_state(state: Mapping[str, Any], param: Tensor, name: str, needed: Collection[str]) -> Any:
    """The state of a param with local tensors: the same dict for a plain param, a new one for a DTensor.

    Raises TypeError or ValueError if a tensor in it that is `needed` does not have the param's placements; others stay
    as they are.
    """
    if not is_sharded(param):
        return state
    for key in needed:
        value = state.get(key)
        if key == SCALES or value is None:
            continue
        if not is_sharded(value):
            raise TypeError(
                f"{name} is a DTensor, and its state {key!r} a {type(value).__name__}; whole tensors are loaded by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict with full_state_dict=True"
            )
        _check_mesh(param, value, f"{name}: its state {key!r}")
        if not _placed_alike(param, value) or param.shape != value.shape:
            raise ValueError(
                f"{name} is a DTensor of shape {tuple(param.shape)} placed as {_placements(param)}, its state {key!r} "
                f"one of shape {tuple(value.shape)} placed as {_placements(value)}; "
                "torch.distributed.checkpoint loads what was cut otherwise"
            )
    return {key: local(value) if key in needed else value for key, value in state.items()}


def local_like(tensor: Tensor, param: Tensor, what: str) -> Tensor:
    """The local part of a tensor. Raises TypeError or ValueError if its placements differ from the param's."""
    if is_sharded(param) != is_sharded(tensor):
        kinds = ["a DTensor" if is_sharded(one) else "a plain tensor" for one in (tensor, param)]
        raise TypeError(f"{what} is {kinds[0]}, the param is {kinds[1]}; they must be of one kind")
    if is_sharded(param):
        _check_mesh(param, tensor, what)
        if not _placed_alike(param, tensor):
            raise ValueError(f"{what} is placed as {_placements(tensor)}, the param as {_placements(param)}")
    return local(tensor)


def owned_state(
    state: Mapping[str, Any], param: Tensor, names: Collection[str], held: Mapping[str, Any] | None = None
) -> Any:
    """The inverse of local_state(): tensors with these names, except scales, become DTensors placed like the param.

    A DTensor in `held` is reused if it has the same local tensor.
    """
    if not is_sharded(param):
        return state
    held = held or {}

    def is_same(owned: Any, value: Any) -> bool:
        return owned is value or local(owned) is value

    return {
        key: value
        if key not in names or key == SCALES
        else (held[key] if key in held and is_same(held[key], value) else like_param_placed(value, param))
        for key, value in state.items()
    }


def like_param_placed(tensor: Tensor, param: Tensor) -> Tensor:
    """A DTensor with the param's placements and this local tensor's memory; for a plain param, the tensor itself."""
    return _torch_compat.dtensor_like(tensor, param) if is_sharded(param) else tensor


# Norms over all processes -----------------------------------------------------------------------------------------


def shard_layout(param: Tensor) -> ShardLayout:
    """How the param is sharded."""
    if not is_sharded(param):
        return None
    cut = tuple(i for i, placement in enumerate(_placements(param)) if not placement.is_replicate())
    return (param.device_mesh, cut) if cut else None  # type: ignore[attr-defined]


def check_norm_is_known(params: Iterable[Tensor]) -> None:
    """Raises RuntimeError for shards of FullyShardedDataParallel, which do not say who holds the others."""
    params = list(params)
    is_shard = any(map(_torch_compat.is_marked_by_fsdp, params))
    if not is_shard and not _torch_compat.fsdp_marks_are_known():
        is_shard = wrapper_of((), params) == "FullyShardedDataParallel"  # slow, but never a wrong norm
    if is_shard:
        raise RuntimeError(
            "The params are shards of FullyShardedDataParallel, which do not say which ranks hold the others: call "
            "model.clip_grad_norm_() of the outermost FullyShardedDataParallel instead, or use fully_shard()"
        )


def all_reduce_norm(parts: Mapping[ShardLayout, Tensor], norm_type: float) -> Tensor:
    """The norm of all elements on all processes, in float64.

    `parts` has, for each shard layout, the norm of the grads' elements that this process holds. Every process must call
    this with the same layouts in the same order. All get bit-identical results.
    """
    if set(parts) == {None}:
        return parts[None]
    if norm_type == 0.0:
        raise ValueError("The norm of order 0 of DTensors is not supported; use one of another order")
    device = next(iter(parts.values())).device
    summands = {where: _summand(norm, norm_type) for where, norm in parts.items()}
    totals = [_over_processes(value, norm_type, where) if where else value for where, value in summands.items()]
    total = _joined(torch.stack([value.to(device) for value in totals]), norm_type)
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def norm_of_nothing(norm_type: float) -> float:
    """The norm of an empty set of elements."""
    return math.inf if norm_type < 0 else 0.0


def _summand(norm: Tensor, norm_type: float) -> Tensor:
    return norm if math.isinf(norm_type) else norm**norm_type


def _joined(values: Tensor, norm_type: float) -> Tensor:
    if not math.isinf(norm_type):
        return values.sum()
    return values.max() if norm_type > 0 else values.min()


def _over_processes(value: Tensor, norm_type: float, where: ShardLayout) -> Tensor:
    assert where is not None
    mesh, dims = where
    if mesh.get_coordinate() is None:  # this process is not in the mesh, and holds nothing
        return value
    distributed = sys.modules["torch.distributed"]
    op = distributed.ReduceOp.SUM
    if math.isinf(norm_type):
        op = distributed.ReduceOp.MAX
        value = value if norm_type > 0 else -value
    # A NaN must reach every process, but MAX loses it in some backends, so it is reduced as a number of its own.
    pair = torch.stack([value.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), value.isnan().double()])
    pair = pair.to(mesh.device_type)
    for dim in dims:
        distributed.all_reduce(pair, op, group=mesh.get_group(dim))
    value = torch.where(pair[1] > 0, math.nan, pair[0])
    return -value if math.isinf(norm_type) and norm_type < 0 else value


def _placements(tensor: Any) -> Any:
    return tensor.placements


def _placed_alike(param: Any, other: Any) -> bool:
    return param.placements == other.placements and param.device_mesh == other.device_mesh


def _check_mesh(param: Any, other: Any, what: str) -> None:
    if param.device_mesh != other.device_mesh:
        raise ValueError(f"{what} is on the mesh {other.device_mesh}, the param on {param.device_mesh}")

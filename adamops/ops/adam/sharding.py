"""Params that are cut over processes, DTensors: what this process holds of them, who holds the rest, and the way back.

Everything else in this package sees the local tensors only. torch.distributed is not imported here: where there are
DTensors, it has been, and where there are none, it would cost each import of adamops a second.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .memory import PLAIN_TYPES
from .precision import SCALES, STATE_TENSORS

# Over which dimensions of which mesh a param is cut; None if each process that has it has all of it.
ShardLayout: TypeAlias = "tuple[Any, tuple[int, ...]] | None"


def dtensor_class() -> Any:
    """torch's class DTensor, or None as long as nobody has imported it."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the latter up to torch 2.4
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found
    return None


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, however it is placed."""
    if type(tensor) in PLAIN_TYPES:
        return False
    found = dtensor_class()
    return found is not None and isinstance(tensor, found)


def local(tensor: Any) -> Any:
    """What this process holds of a DTensor, in the DTensor's own memory; anything else as it is."""
    # to_local() would make a view of a param, at each call
    held = tensor._local_tensor if is_sharded(tensor) else tensor
    if type(held) not in PLAIN_TYPES and hasattr(held, "wait"):
        return held.wait()  # what a collective is still bringing
    return held


def check_placed(param: Tensor, name: str) -> None:
    """Raises ValueError for a DTensor of which each process holds a summand."""
    if is_sharded(param) and any(placement.is_partial() for placement in _placements(param)):
        raise ValueError(
            f"{name} is a DTensor placed as {_placements(param)}, of which each process holds a summand; "
            "only sharded and replicated params can be updated: redistribute it first"
        )


def grad_like(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """The grad, placed as its param is. One placed otherwise is redistributed, once: the param keeps the new one.

    Grads of replicated params are often sums yet to be made (tensor parallelism). Each process must come here then.

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
    if grad.shape == param.shape:  # what is wrong otherwise is said where shapes are checked
        param.grad = grad.redistribute(placements=_placements(param))  # type: ignore[attr-defined]
    assert param.grad is not None
    return param.grad


def local_state(state: Mapping[str, Any], param: Tensor, name: str, needed: Container[str] = STATE_TENSORS) -> Any:
    """The state of a param with local tensors: the very same of a plain param, a new one of a DTensor.

    Raises TypeError or ValueError if a tensor in it that is `needed` is not placed as the param is; others stay as
    they are.
    """
    if not is_sharded(param):
        return state
    names = [key for key in STATE_TENSORS if key in needed]
    for key in names:
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
    return {key: local(value) if key in names else value for key, value in state.items()}


def local_like(tensor: Tensor, param: Tensor, what: str) -> Tensor:
    """What this process holds of a tensor. Raises TypeError or ValueError if it is not placed as the param is."""
    if is_sharded(param) != is_sharded(tensor):
        kinds = ["a DTensor" if is_sharded(one) else "a plain tensor" for one in (tensor, param)]
        raise TypeError(f"{what} is {kinds[0]}, the param is {kinds[1]}; they must be of one kind")
    if is_sharded(param):
        _check_mesh(param, tensor, what)
        if not _placed_alike(param, tensor):
            raise ValueError(f"{what} is placed as {_placements(tensor)}, the param as {_placements(param)}")
    return local(tensor)


def owned_state(state: Mapping[str, Any], param: Tensor, held: Mapping[str, Any] | None = None) -> Any:
    """The opposite of local_state(): tensors become DTensors placed like the param, but for scales.

    Of those in `held` that are of the same memory the DTensors are taken from there.
    """
    if not is_sharded(param):
        return state
    held = held or {}

    def is_same(owned: Any, value: Any) -> bool:
        return owned is value or local(owned) is value

    return {
        key: value
        if key not in STATE_TENSORS or key == SCALES
        else (held[key] if key in held and is_same(held[key], value) else like_param_placed(value, param))
        for key, value in state.items()
    }


def like_param_placed(tensor: Tensor, param: Tensor) -> Tensor:
    """A DTensor placed like the param, of the same memory as this local tensor; the tensor itself of a plain param."""
    if not is_sharded(param):
        return tensor
    # Not from_local(), which moves what is elsewhere than the mesh: CPUOffloadPolicy has shards on the CPU, cut
    # over a mesh of GPUs. fully_shard() makes its DTensors so too.
    spec = param._spec  # type: ignore[attr-defined]
    meta = spec.tensor_meta._replace(dtype=tensor.dtype)
    return dtensor_class()(tensor, dataclasses.replace(spec, tensor_meta=meta), requires_grad=False)


# Norms over all processes -----------------------------------------------------------------------------------------


def shard_layout(param: Tensor) -> ShardLayout:
    """How the param is cut."""
    if not is_sharded(param):
        return None
    cut = tuple(i for i, placement in enumerate(_placements(param)) if not placement.is_replicate())
    return (param.device_mesh, cut) if cut else None  # type: ignore[attr-defined]


def check_norm_is_known(params: Iterable[Tensor]) -> None:
    """Raises RuntimeError if a param is a shard that does not say so: FullyShardedDataParallel's."""
    if any(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) for p in params):
        raise RuntimeError(
            "The params are shards of FullyShardedDataParallel, which do not say who holds the rest: call "
            "model.clip_grad_norm_() of the outermost FullyShardedDataParallel instead, or use fully_shard()"
        )


def all_reduce_norm(parts: Mapping[ShardLayout, Tensor], norm_type: float) -> Tensor:
    """The norm of all elements of all processes, in float64.

    `parts` has the norm of what this process holds of the grads of each spread. Each process must come here with the
    same spreads, in the same order, and gets the same bits.
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
    """The norm of no elements."""
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
    if mesh.get_coordinate() is None:  # this process is not on the mesh, and holds nothing
        return value
    distributed = sys.modules["torch.distributed"]
    op = distributed.ReduceOp.SUM
    if math.isinf(norm_type):
        op = distributed.ReduceOp.MAX
        value = value if norm_type > 0 else -value
    # A NaN must arrive everywhere, and some backends' MAX loses it: it goes as a number beside.
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

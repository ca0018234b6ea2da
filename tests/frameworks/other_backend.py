"""DTensors on the CPU whose mesh is of another backend, as CPUOffloadPolicy makes them under NCCL; for ranks of tests.

There is no CUDA here, so the mesh's group has gloo, registered for "cuda" alone: it reduces no tensor on the CPU. What
is copied to the mesh's device stays on the CPU and is marked; only what is marked is reduced, by another group.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from adamops import DeepSpeedCPUAdam

SHAPE = (5, 7)  # of each rank's shards


class OnMesh(Tensor):
    """A tensor that stands for one on the mesh's device."""


def _to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
    if arguments and arguments[0] == "cuda":
        return _original_to(tensor).clone().as_subclass(OnMesh)
    return _original_to(tensor.as_subclass(Tensor), *arguments, **named)


_original_to, _original_all_reduce = Tensor.to, dist.all_reduce


def _all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **named: Any) -> Any:
    if not isinstance(tensor, OnMesh):
        return _original_all_reduce(tensor, op, group=group, **named)  # which raises, as with NCCL
    return _original_all_reduce(tensor.as_subclass(Tensor), op)


def _params(mesh: DeviceMesh, world_size: int) -> list[torch.nn.Parameter]:
    """Params with grads, of which each rank has shards."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = torch.Size((SHAPE[0] * world_size, SHAPE[1]))
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(shape, (SHAPE[1], 1), torch.float32))
    params = []
    for _ in range(3):
        shard, grad = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        params.append(torch.nn.Parameter(DTensor(shard, spec, requires_grad=False)))
        params[-1].grad = DTensor(grad, spec, requires_grad=False)
    return params


def clipped(rank: int, world_size: int) -> dict[str, Any]:
    """What torch's function and ours make of such params, and ours of the same params on a mesh of the CPU."""
    found: dict[str, Any] = {}
    other = DeviceMesh.from_group(dist.new_group(backend="cuda:gloo"), "cuda")
    meshes = {"other": other, "cpu": init_device_mesh("cpu", (world_size,))}
    try:
        torch.nn.utils.clip_grad_norm_(_params(other, world_size), 1.0)
    except RuntimeError as error:
        found["torch"] = str(error)
    for norm_type in (2.0, float("inf"), 3.0):
        for name, mesh in meshes.items():
            params = _params(mesh, world_size)
            optimizer = DeepSpeedCPUAdam(params, lr=0.1)
            with mock.patch.object(Tensor, "to", _to), mock.patch.object(dist, "all_reduce", _all_reduce):
                norm = optimizer.clip_grad_norm_(0.5, norm_type)
            optimizer.step()
            found[name, norm_type] = norm.clone(), [param.to_local().clone() for param in params]
    return found

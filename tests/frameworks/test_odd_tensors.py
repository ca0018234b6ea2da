"""Tensors whose elements are elsewhere than in their own memory: each is understood, or refused before it is read."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.optim import dtensor

pytestmark = pytest.mark.frameworks


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, *shape):
    param = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
    return param


def two(dtype=torch.float32):
    return TwoTensor(torch.ones(100, dtype=dtype), torch.ones(100, dtype=dtype))


def test_shards_in_host_memory_of_a_mesh_of_other_devices(mesh):
    """As under CPUOffloadPolicy with GPUs; what is moved to the mesh's device is lost here, where that is meta."""
    param = sharded(mesh, 8, 4)
    mesh._device_type = "meta"
    optimizer = DeepSpeedCPUAdam([param], lr=0.1)
    before = param._local_tensor.clone()
    for _ in range(2):
        optimizer.step()
    state = optimizer.state[param]
    assert state["step"] == 2 and not torch.equal(before, param._local_tensor)
    assert isinstance(state["exp_avg"], DTensor) and state["exp_avg"]._local_tensor.device.type == "cpu"


def test_other_tensors_in_a_state_stay_what_they_are(mesh):
    param = sharded(mesh, 8, 4)
    optimizer = FusedAdam([param])
    optimizer.state[param]["ema"] = ema = param.detach().clone()
    optimizer.step()
    assert optimizer.state[param]["ema"] is ema


def test_a_grad_that_a_collective_is_still_bringing(mesh):
    param, plain = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    param.grad, plain.grad = all_reduce(torch.full((100,), 0.5), "sum", dist.group.WORLD), torch.full((100,), 0.5)
    assert isinstance(param.grad, AsyncCollectiveTensor)
    for one in (param, plain):
        FusedAdam([one]).step()
    assert torch.equal(param, plain)


def test_a_subgroup_is_no_dtensor(mesh):
    param = sharded(mesh, 8, 4)
    with pytest.raises(TypeError, match="subgroup 0 .* is a DTensor, which has no memory of its own"):
        DeepSpeedCPUAdam([param]).step_subgroup(0)


def test_tensors_made_of_others_are_refused():
    param = torch.nn.Parameter(torch.ones(100))
    param.grad = two()
    optimizer = FusedAdam([param])
    with pytest.raises(TypeError, match="its grad is a TwoTensor, which has no memory of its own"):
        optimizer.step()
    param.grad = torch.ones(100)
    with pytest.raises(TypeError, match="its lowp_out is a TwoTensor"):
        optimizer.step(lowp_out=[two(torch.bfloat16)])
    assert torch.equal(param, torch.ones(100)) and not optimizer.state
    optimizer.step()
    optimizer.state[param]["exp_avg"] = two()
    with pytest.raises(TypeError, match="its state 'exp_avg' is a TwoTensor"):
        optimizer.step()
    with pytest.raises(TypeError, match="param group 0, param 0.* is a (TwoTensor|Parameter), which has no memory"):
        FusedAdam([torch.nn.Parameter(two())])


def test_norms_of_what_is_elsewhere_are_brought_together(mesh):
    """As of grads on a GPU, beside kinds of params of which this process holds nothing."""
    there, here = torch.zeros((), dtype=torch.float64, device="meta"), torch.zeros((), dtype=torch.float64)
    assert dtensor.all_reduce_norm({None: there, (mesh, (0,)): here}, 2.0).device.type == "meta"

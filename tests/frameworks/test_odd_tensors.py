"""Tensors whose elements are elsewhere than in their own memory: each is understood, or refused before it is read."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from adamops import DeepSpeedCPUAdam, FusedAdam, _torch_compat
from adamops.optim import dtensor

pytestmark = pytest.mark.frameworks


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


# Without torch's private names -------------------------------------------------------------------------------------


def stepped(mesh, Adam):  # noqa: N803
    torch.manual_seed(0)
    param = sharded(mesh, 80, 40)
    optimizer = Adam([param], lr=0.1)
    for _ in range(2):
        norm = optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    assert isinstance(optimizer.state[param]["exp_avg"], DTensor)
    return [param.to_local(), optimizer.state[param]["exp_avg_sq"].to_local(), norm, *optimizer.fp32_params()]


@pytest.mark.parametrize("Adam", [DeepSpeedCPUAdam, FusedAdam])
@pytest.mark.parametrize("name", ["_LOCAL_TENSOR", "_SPEC"])
def test_shards_without_a_private_name_of_torch(mesh, monkeypatch, Adam, name):  # noqa: N803
    expected = stepped(mesh, Adam)
    monkeypatch.setattr(_torch_compat, name, "_renamed")
    assert _torch_compat.dtensor_class_for_op() is None
    got = stepped(mesh, Adam)
    assert all(torch.equal(_plain(a), _plain(b)) for a, b in zip(got, expected, strict=True))


def _plain(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_norm_of_flattened_shards_is_refused_without_their_marks(mesh, monkeypatch, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = torch.nn.Linear(8, 4)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = DeepSpeedCPUAdam(wrapped.parameters())
    wrapped(torch.randn(2, 8)).sum().backward()
    assert _torch_compat.fsdp_marks_are_known()
    monkeypatch.setattr(_torch_compat, "_FSDP_MARKS", ("_is_flat_parameter", "_fsdp_is_flattened"))
    assert not _torch_compat.fsdp_marks_are_known()
    with pytest.raises(RuntimeError, match=r"call model\.clip_grad_norm_\(\) of the outermost"):
        optimizer.clip_grad_norm_(1.0)
    plain = torch.nn.Parameter(torch.randn(3))
    plain.grad = torch.randn(3)
    assert DeepSpeedCPUAdam([plain]).clip_grad_norm_(1.0).item() == pytest.approx(plain.grad.norm().item(), rel=1e-6)

"""Replicas of a param hold the same bits, whatever each rank has seeded torch with; and steps in the backward pass.

Over processes on this CPU, with gloo.
"""

import copy
import functools

import pytest
import torch
from frameworks.processes import Ranks
from torch import nn

from adamops import DeepSpeedCPUAdam, FusedAdam, _torch_compat, step_in_backward

pytestmark = pytest.mark.frameworks

CLASSES = [DeepSpeedCPUAdam, FusedAdam]
SETTINGS = {"lr": 1e-2, "stochastic_rounding": True}


def new_model(dtype=torch.bfloat16):
    return nn.Sequential(nn.Linear(32, 150), nn.Tanh(), nn.Linear(150, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cpu_mesh(*shape, names):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def local(tensor):
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def train(model, rank, optimizer=None, steps=10):
    """With data of this rank. Without an optimizer the backward pass steps."""
    torch.manual_seed(100 + rank)
    for _ in range(steps):
        model(torch.randn(8, 32, dtype=torch.bfloat16)).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return [local(param).clone() for param in model.parameters()]


def same(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


# Stochastic rounding


def _ddp(rank, world_size, make, extra):
    model = nn.parallel.DistributedDataParallel(new_model())
    torch.manual_seed(100 + rank)
    if rank == 0 and extra:
        make([nn.Parameter(torch.ones(3))], **SETTINGS)  # only one rank makes another optimizer
    optimizer = make(model.parameters(), **SETTINGS)
    return train(model, rank, optimizer)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("make", CLASSES)
def test_replicas_of_ddp_stay_equal(ranks, make, extra):
    first, second = ranks.run(_ddp, 2, make, extra)
    assert same(first, second)


def _hsdp(rank, world_size, make, in_backward):
    from torch.distributed.fsdp import fully_shard

    mesh = cpu_mesh(2, 2, names=("replicate", "shard"))
    model = new_model()
    for layer in (*model[::2], model):
        fully_shard(layer, mesh=mesh)
    torch.manual_seed(100 + rank)
    optimizer = make(model.parameters(), **SETTINGS)
    if in_backward:
        step_in_backward(model, optimizer)
    return train(model, rank, None if in_backward else optimizer)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("make", CLASSES)
def test_replicas_of_shards_stay_equal(ranks, make, in_backward):
    a, b, c, d = ranks.run(_hsdp, 4, make, in_backward)
    assert same(a, c) and same(b, d) and not torch.equal(a[0], b[0])


def _tensor_parallel(rank, world_size, make):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = cpu_mesh(2, names=("tp",))
    sharded, replicated = torch.randn(40, 30).bfloat16(), torch.randn(500).bfloat16()
    grads = torch.randn(40, 30).bfloat16(), torch.randn(500).bfloat16()
    placements = [Shard(0)], [Replicate()]
    params = [
        nn.Parameter(distribute_tensor(whole, mesh, where))
        for whole, where in zip((sharded, replicated), placements, strict=True)
    ]
    plain = nn.Parameter(torch.ones(500).bfloat16())  # a replica that is no DTensor
    torch.manual_seed(100 + rank)
    optimizer = make([*params, plain], **SETTINGS)
    for _ in range(5):
        for param, grad, where in zip(params, grads, placements, strict=True):
            param.grad = distribute_tensor(grad, mesh, where)
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    return [local(params[1]), plain.detach()]


@pytest.mark.parametrize("make", CLASSES)
def test_params_replicated_beside_sharded_ones_stay_equal(ranks, make):
    first, second = ranks.run(_tensor_parallel, 2, make)
    assert same(first, second)


# Steps in the backward pass


def _refused_with_ddp(rank, world_size, where):
    torch.manual_seed(0)
    model = new_model(torch.float32)
    optimizer = DeepSpeedCPUAdam(model.parameters())
    before = copy.deepcopy(model)

    def check(call):
        with pytest.raises(
            RuntimeError, match=r"cannot be used with DistributedDataParallel, which averages grads .* ful"
        ):
            call()

    if where == "later":
        handle = step_in_backward(model, optimizer)
        check(lambda: nn.parallel.DistributedDataParallel(model))
        check(lambda: nn.parallel.DistributedDataParallel(nn.Sequential(model)))
        check(lambda: nn.parallel.DistributedDataParallel(model[2]))
        handle.remove()
        nn.parallel.DistributedDataParallel(model)
    elif where == "later, of other params":
        step_in_backward(model[0], optimizer)
        wrapped = nn.parallel.DistributedDataParallel(model[2])
        model[0](torch.randn(2, 32)).sum().backward()
        assert model[0].weight.grad is None and wrapped.module.weight.grad is None
        return True
    elif where == "composable":
        from torch.distributed._composable.replicate import replicate

        step_in_backward(model, optimizer)
        replicate(model)
        check(lambda: model(torch.randn(2, 32)))
    else:
        wrapped = nn.parallel.DistributedDataParallel(model[2] if where == "a part" else model)
        given = {"itself": wrapped, "in a module": nn.Sequential(wrapped), "its module": model, "a part": model}[where]
        check(lambda: step_in_backward(given, optimizer))
    model.zero_grad()
    return same(list(model.parameters()), list(before.parameters()))


@pytest.mark.parametrize(
    "where", ["itself", "in a module", "its module", "a part", "later", "later, of other params", "composable"]
)
def test_distributed_data_parallel_is_refused(ranks, where):
    assert all(ranks.run(_refused_with_ddp, 2, where))


def _refused_with_fsdp1(rank, world_size, use_orig_params, later):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = new_model(torch.float32)

    def wrap():
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    if later:
        step_in_backward(model, DeepSpeedCPUAdam(model.parameters()))
        with pytest.raises(RuntimeError, match="cannot be used with FullyShardedDataParallel, which averages"):
            wrap()
        return
    wrapped = wrap()
    optimizer = DeepSpeedCPUAdam(wrapped.parameters())
    for given in (wrapped, nn.Sequential(wrapped), wrapped.module):
        with pytest.raises(RuntimeError, match="cannot be used with FullyShardedDataParallel, which averages"):
            step_in_backward(given, optimizer)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fully_sharded_data_parallel_is_refused(ranks, use_orig_params, later):
    ranks.run(_refused_with_fsdp1, 2, use_orig_params, later)


def _shard_reused(rank, world_size, checkpointed):
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    def forward(model, x):
        for _ in range(3):
            layer = model[0]
            x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return model[2](x.tanh())

    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    models = [model, copy.deepcopy(model)]
    optimizers = []
    for one in models:
        for layer in one[::2]:
            fully_shard(layer)
        fully_shard(one)
        one.forward = functools.partial(forward, one)
        optimizers.append(DeepSpeedCPUAdam(one.parameters(), lr=1e-2))
    step_in_backward(models[0], optimizers[0])
    for _ in range(3):
        x = torch.randn(4, 32)
        for one in models:
            one(x).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert all(param.grad is None for param in models[0].parameters())
        assert same(*([local(param) for param in one.parameters()] for one in models))


@pytest.mark.parametrize("checkpointed", [False, True])  # fully_shard() itself is wrong with reentrant checkpoints
def test_a_shard_used_several_times_is_updated_with_its_whole_grad(ranks, checkpointed):
    ranks.run(_shard_reused, 2, checkpointed)


def _hooks_with_shards(rank, world_size):
    from torch.distributed.fsdp import fully_shard

    model = new_model(torch.float32)
    for layer in (*model[::2], model):
        fully_shard(layer)
    model[2].requires_grad_(False)
    optimizer = DeepSpeedCPUAdam(model.parameters())
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(len(optimizer.state)))
    handle = step_in_backward(model, optimizer)
    for thawed in (False, True):
        model[2].requires_grad_(thawed)
        model(torch.randn(4, 32)).square().mean().backward()
    with handle.accumulate():
        model(torch.randn(4, 32)).square().mean().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert called == [4, 6]


def test_shards_are_thawed_and_hooks_run_once_a_pass(ranks):
    ranks.run(_hooks_with_shards, 2)


def _refused_without_hooks_of_shards(rank, world_size):
    from torch.distributed.fsdp import fully_shard

    model = new_model()
    fully_shard(model)
    _torch_compat._torch_version = lambda: (2, 4)
    try:
        with pytest.raises(RuntimeError, match=r"with fully_shard\(\) needs torch 2.5 or later"):
            step_in_backward(model, DeepSpeedCPUAdam(model.parameters()))
        plain = new_model()
        step_in_backward(plain, DeepSpeedCPUAdam(plain.parameters()))
    finally:
        del _torch_compat._torch_version


def test_a_torch_that_runs_no_hooks_of_shards_is_refused():
    with Ranks(1) as started:
        started.run(_refused_without_hooks_of_shards, 1)

"""ZeroRedundancyOptimizer shards the states of our optimizers over processes, by whole params."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from frameworks.processes import Ranks
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from adamops import DeepSpeedCPUAdam, FusedAdam

pytestmark = pytest.mark.frameworks

CLASSES = {"DeepSpeedCPUAdam": DeepSpeedCPUAdam, "FusedAdam": FusedAdam}
LR, STEPS = 1e-2, 5


@pytest.fixture(scope="module")
def ranks():
    """Two processes for all tests of this file."""
    with Ranks(2) as processes:
        yield processes


def new_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def inputs(seed, step, rank):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed + 1000 * step + rank))


def train(model, optimizer, seed, steps, rank, schedule=None):
    for step in steps:
        optimizer.zero_grad()
        model(inputs(seed, step, rank)).square().mean().backward()
        optimizer.step()
        if schedule:
            schedule.step()


def values_of(model):
    return [param.detach().clone() for param in model.parameters()]


def train_sharded_and_whole(rank, world_size, name, seed, as_bucket_view, settings):
    """The params after training with sharded states, and with DDP and all states on each rank."""
    cls, results, counts = CLASSES[name], [], None
    for sharded in (True, False):
        model = new_model(seed)
        ddp = DistributedDataParallel(model)
        if sharded:
            optimizer = ZeroRedundancyOptimizer(
                ddp.parameters(), optimizer_class=cls, parameters_as_bucket_view=as_bucket_view, lr=LR, **settings
            )
        else:
            optimizer = cls(ddp.parameters(), lr=LR, **settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
        train(ddp, optimizer, seed, range(STEPS - 1), rank, schedule)
        if sharded:
            counts = len(optimizer.optim.state), len(list(model.parameters()))
        results.append(values_of(model))
    return results, counts


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("as_bucket_view", [False, True])
def test_sharded_states_have_the_bits_of_whole_ones(ranks, seed, name, as_bucket_view):
    settings = {"weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.99)}  # OneCycleLR wants to see betas
    results = ranks.run(train_sharded_and_whole, 2, name, seed, as_bucket_view, settings)
    for (sharded, whole), _ in results:
        for a, b, first in zip(sharded, whole, results[0][0][0], strict=True):
            assert torch.equal(a, b) and torch.equal(a, first)
    assert sum(held for _, (held, _) in results) == results[0][1][1]  # each param's state is on one rank
    assert all(0 < held < of for _, (held, of) in results)


def save_and_go_on(rank, world_size, name, seed, settings):
    """The params of training without a break, and of two that go on from its checkpoint: sharded, and whole."""
    cls = CLASSES[name]
    model = new_model(seed)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=cls, lr=LR, **settings)
    train(ddp, optimizer, seed, range(STEPS), rank)
    optimizer.consolidate_state_dict(to=0)
    message = None
    if rank == 0:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        message = file.getvalue()
    box = [message]
    dist.broadcast_object_list(box)
    results = []
    for sharded in (True, False):
        saved = torch.load(io.BytesIO(box[0]), weights_only=True)
        other = new_model(seed + 1)
        other_ddp = DistributedDataParallel(other)
        other.load_state_dict(saved["model"])
        if sharded:
            resumed = ZeroRedundancyOptimizer(other_ddp.parameters(), optimizer_class=cls, lr=0.5, **settings)
        else:
            resumed = cls(other_ddp.parameters(), lr=0.5, **settings)
        resumed.load_state_dict(copy.deepcopy(saved["optimizer"]))
        train(other_ddp, resumed, seed, range(STEPS, 2 * STEPS), rank)
        results.append(values_of(other))
    train(ddp, optimizer, seed, range(STEPS, 2 * STEPS), rank)
    return [values_of(model), *results]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DeepSpeedCPUAdam", {}),
        ("FusedAdam", {"weight_decay": 0.1}),
        ("DeepSpeedCPUAdam", {"state_dtype": torch.bfloat16}),
    ],
)
def test_goes_on_from_a_consolidated_checkpoint(ranks, seed, name, settings):
    for uninterrupted, sharded, whole in ranks.run(save_and_go_on, 2, name, seed, settings):
        for a, b, c in zip(uninterrupted, sharded, whole, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def overlap_with_ddp(rank, world_size):
    model = new_model(0)
    try:
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=DeepSpeedCPUAdam, overlap_with_ddp=True, lr=LR)
    except ValueError as error:
        return str(error)
    return None


def test_overlap_with_ddp_is_refused_by_torch(ranks):
    """It needs a "functional" twin of the optimizer, of which torch has a fixed list."""
    for message in ranks.run(overlap_with_ddp, 2):
        assert message is not None and "DeepSpeedCPUAdam" in message and "functional" in message

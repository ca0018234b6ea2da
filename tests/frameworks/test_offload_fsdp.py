"""Offloading the shards of fully_shard(), over processes on this CPU: bit-identical to the plain optimizer."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from frameworks.processes import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from adamops import DeepSpeedCPUAdam, OffloadedAdam
from adamops.offload.host_stand_in import HostStandIn

pytestmark = pytest.mark.frameworks

KINDS = {
    "fp32": (torch.float32, {}),
    "8-bit, 24-bit masters": (torch.bfloat16, {"state_dtype": "8bit", "master_weight_bits": 24}),
    "bf16, stochastic": (torch.bfloat16, {"state_dtype": torch.bfloat16, "stochastic_rounding": True}),
}
MODES = {"as it is": {}, "in backward": {"update_in_backward": True}, "small chunks": {"chunk_mb": 1e-6}}


def twin_shards(dtype):
    """Two models with the same shards; a process may hold none of the last layer."""
    model = nn.Sequential(nn.Linear(96, 200), nn.Tanh(), nn.Linear(200, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    models = model, copy.deepcopy(model)
    for each in models:
        for layer in each:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(each)
    return models


def offloaded_and_plain(models, seed, settings, **own):
    device = HostStandIn.with_random_delays(seed)
    return [
        OffloadedAdam(models[0].parameters(), device=device, lr=0.01, **settings, **own),
        DeepSpeedCPUAdam(models[1].parameters(), lr=0.01, **settings),
    ]


def train(models, optimizers, dtype, clips, steps=3):
    for _ in range(steps):
        x = torch.randn(8, 96).to(dtype)
        norms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).float().square().mean().backward()
            if clips:
                norms.append(optimizer.clip_grad_norm_(0.05))
            optimizer.step()
            optimizer.zero_grad()
        assert not clips or torch.equal(*norms)
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local())


def _train(rank, world_size, kind, mode):
    dtype, settings = KINDS[kind]
    models = twin_shards(dtype)
    optimizers = offloaded_and_plain(models, rank, settings, **MODES[mode])
    train(models, optimizers, dtype, clips=mode != "in backward")
    assert not optimizers[0]._pipeline.device.faults


def _save_and_load(rank, world_size, folder):
    """Each of both loads what the other has saved, and trains on."""
    dtype, settings = KINDS["8-bit, 24-bit masters"]
    models = twin_shards(dtype)
    optimizers = offloaded_and_plain(models, rank, settings)
    train(models, optimizers, dtype, clips=True)
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        params, states = get_state_dict(model, optimizer)
        dcp.save({"model": params, "optimizer": states}, checkpoint_id=f"{folder}/{i}")
    others = twin_shards(dtype)
    loading = offloaded_and_plain(others, rank + 10, settings)
    for i, (model, optimizer) in enumerate(zip(others, loading, strict=True)):
        params, states = get_state_dict(model, optimizer)
        saved = {"model": params, "optimizer": states}
        dcp.load(saved, checkpoint_id=f"{folder}/{1 - i}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    torch.manual_seed(1)
    train(others, loading, dtype, clips=True)
    torch.manual_seed(1)
    train(models, optimizers, dtype, clips=True)
    for ours, theirs in zip(models[1].parameters(), others[0].parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as started:
        yield started


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_shards_on_two_processes(ranks, kind, mode):
    ranks.run(_train, 2, kind, mode)


def test_distributed_checkpoints_go_both_ways(ranks, tmp_path):
    ranks.run(_save_and_load, 2, str(tmp_path))

"""torch.distributed.checkpoint: saved on some ranks, loaded on others, by this optimizer and by torch.optim.AdamW."""

import copy
import itertools

import pytest
import torch
from frameworks.processes import Ranks
from torch import nn

from adamops import DeepSpeedCPUAdam, FusedAdam, portable_state_dicts

pytestmark = pytest.mark.frameworks

STATE_KINDS = {
    "fp32": (torch.float32, {}),
    "bf16 states": (torch.float32, {"state_dtype": torch.bfloat16}),
    "8bit": (torch.float32, {"state_dtype": "8bit"}),
    "24-bit masters": (torch.bfloat16, {"master_weight_bits": 24}),
    "32-bit masters": (torch.bfloat16, {"master_weight_bits": 32}),
    "8bit, 24-bit masters": (torch.bfloat16, {"state_dtype": "8bit", "master_weight_bits": 24}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "fp32 masters": (torch.bfloat16, {"master_weights": True}),
}
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


def new_model(dtype=torch.float32, wrapper="fully_shard"):
    """Of random weights; those of 3 rows are cut unevenly."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 3)).to(dtype)
    if wrapper == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2]):
            fully_shard(layer)
        return fully_shard(model)
    if wrapper == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if wrapper == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    return model


def new_optimizer(model, settings):
    make = FusedAdam if "master_weights" in settings else DeepSpeedCPUAdam
    return make(model.parameters(), **SETTINGS, **settings)


def steps(model, optimizer, start, stop):
    """Steps on data that depend on the number of the step only; returns the losses."""
    losses = []
    for i in range(start, stop):
        data = torch.randn(8, 64, generator=torch.Generator().manual_seed(i)).to(next(model.parameters()).dtype)
        loss = model(data).float().square().mean() + model(data).float().sum().abs() / 100
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_params(model):
    return [whole(param.detach()).clone() for param in model.parameters()]


def whole_states(model, optimizer):
    """The states as a checkpoint has them, in whole: {name: {"step", "exp_avg", ...}}."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = get_optimizer_state_dict(model, optimizer)["state"]
    return {name: {key: whole(value).clone() for key, value in entry.items()} for name, entry in states.items()}


def checkpoint_of(model, optimizer, **options):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    params, states = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    return {"model": params, "optimizer": states}


def save(path, model, optimizer, **options):
    import torch.distributed.checkpoint as dcp

    dcp.save(checkpoint_of(model, optimizer, **options), checkpoint_id=path)


def load(path, model, optimizer, partly=False, **options):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    checkpoint = checkpoint_of(model, optimizer, **options)
    dcp.load(checkpoint, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=partly))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
        options=StateDictOptions(**options),
    )


# From ranks to ranks ----------------------------------------------------------------------------------------------


def _save(rank, world_size, path, kinds, options):
    saved = {}
    for kind in kinds:
        dtype, settings = STATE_KINDS[kind]
        model = new_model(dtype)
        optimizer = new_optimizer(model, settings)
        steps(model, optimizer, 0, 3)
        save(f"{path}/{kind}", model, optimizer, **options)
        states = whole_states(model, optimizer)
        steps(model, optimizer, 3, 5)
        saved[kind] = states, whole_params(model)
    return saved


def _load(rank, world_size, path, kinds, options):
    loaded = {}
    for kind in kinds:
        dtype, settings = STATE_KINDS[kind]
        model = new_model(dtype)
        optimizer = new_optimizer(model, settings)
        load(f"{path}/{kind}", model, optimizer, **options)
        states = whole_states(model, optimizer)
        steps(model, optimizer, 3, 5)
        loaded[kind] = states, whole_params(model)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=["nested", "flattened"])
@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_training_continues_on_as_many_or_fewer_ranks(ranks, tmp_path, world_size, options):
    kinds = list(STATE_KINDS)
    saved = ranks.run(_save, 4, str(tmp_path), kinds, options)[0]
    for loaded in ranks.run(_load, world_size, str(tmp_path), kinds, options):
        for kind in kinds:
            (states, params), (own_states, own_params) = saved[kind], loaded[kind]
            assert states.keys() == own_states.keys()
            recut = kind.startswith("8bit") and world_size != 4
            for name, key in ((n, k) for n, entry in states.items() for k in entry):
                if recut and key.startswith("exp_avg"):  # rounded anew, in other blocks
                    largest = float(states[name][key].abs().max())
                    torch.testing.assert_close(own_states[name][key], states[name][key], rtol=0.1, atol=0.01 * largest)
                else:
                    assert torch.equal(own_states[name][key], states[name][key]), (kind, name, key)
            for ours, other in zip(own_params, params, strict=True):
                if recut:
                    torch.testing.assert_close(ours, other, rtol=0.02, atol=0.005)
                else:
                    assert torch.equal(ours, other), kind


def _save_and_load_in_whole(rank, world_size, options):
    """A checkpoint of whole tensors, as rank 0 gets it, goes back into shards."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    for kind in STATE_KINDS:
        dtype, settings = STATE_KINDS[kind]
        model = new_model(dtype)
        optimizer = new_optimizer(model, settings)
        steps(model, optimizer, 0, 3)
        only_rank_0 = bool(options)  # torch gives it to all ranks otherwise
        checkpoint = copy.deepcopy(checkpoint_of(model, optimizer, full_state_dict=True, cpu_offload=only_rank_0))
        assert bool(checkpoint["optimizer"]) == (rank == 0 or not only_rank_0)
        steps(model, optimizer, 3, 5)
        other = new_model(dtype)
        other_optimizer = new_optimizer(other, settings)
        # By two calls: set_state_dict() takes the empty dicts of other ranks for a load of the optimizer alone.
        whole_in = StateDictOptions(full_state_dict=True, **options)
        set_model_state_dict(other, checkpoint["model"], options=whole_in)
        set_optimizer_state_dict(other, other_optimizer, checkpoint["optimizer"], options=whole_in)
        steps(other, other_optimizer, 3, 5)
        assert all(map(torch.equal, whole_params(other), whole_params(model))), kind


@pytest.mark.parametrize("options", [{}, {"broadcast_from_rank0": True}], ids=["from each rank", "from rank 0"])
def test_whole_checkpoints_go_into_shards(ranks, options):
    ranks.run(_save_and_load_in_whole, 2, options)


def _save_by_rank(rank, world_size, path):
    """torch.save() of each rank's own state dict."""
    for kind in STATE_KINDS:
        dtype, settings = STATE_KINDS[kind]
        model = new_model(dtype)
        optimizer = new_optimizer(model, settings)
        steps(model, optimizer, 0, 3)
        file = f"{path}/{kind} {rank}.pt"
        torch.save(optimizer.state_dict(), file)
        held = [param._local_tensor.clone() for param in model.parameters()]
        steps(model, optimizer, 3, 5)
        after = whole_params(model)
        for param, value in zip(model.parameters(), held, strict=True):
            param._local_tensor.copy_(value)
        other = new_optimizer(model, settings)
        other.load_state_dict(torch.load(file, weights_only=False))
        steps(model, other, 3, 5)
        assert all(map(torch.equal, whole_params(model), after)), kind


def test_the_state_dict_of_each_rank_goes_back_to_the_same_bits(ranks, tmp_path):
    ranks.run(_save_by_rank, 2, str(tmp_path))


# With torch.optim.AdamW -------------------------------------------------------------------------------------------


def torch_adamw(model):
    return torch.optim.AdamW(model.parameters(), **SETTINGS)


def eight_bit(model):
    return DeepSpeedCPUAdam(model.parameters(), **SETTINGS, state_dtype="8bit")


def ours(model):
    return DeepSpeedCPUAdam(model.parameters(), **SETTINGS)


def portable(model):
    optimizer = ours(model)
    portable_state_dicts(optimizer)
    return optimizer


def portable_eight_bit(model):
    optimizer = eight_bit(model)
    portable_state_dicts(optimizer)
    return optimizer


def _first_half(rank, world_size, path, make, wrapper):
    model = new_model(wrapper=wrapper)
    optimizer = make(model)
    losses = steps(model, optimizer, 0, 10)
    save(path, model, optimizer)
    return losses + steps(model, optimizer, 10, 20)


def _second_half(rank, world_size, path, make, wrapper):
    model = new_model(wrapper=wrapper)
    optimizer = make(model)
    load(path, model, optimizer, partly=True)
    return steps(model, optimizer, 10, 20)


@pytest.mark.parametrize(
    ("before", "after"),
    [p for p in itertools.permutations([torch_adamw, ours, eight_bit], 2) if torch_adamw in p],
    ids=lambda make: make.__name__,
)
def test_losses_go_on_from_torch_adamw_and_to_it(ranks, tmp_path, before, after):
    all_losses = ranks.run(_first_half, 4, str(tmp_path), before, "fully_shard")[0]
    losses = ranks.run(_second_half, 2, str(tmp_path), after, "fully_shard")[0]
    torch.testing.assert_close(losses, all_losses[10:], rtol=1e-4 if eight_bit not in (before, after) else 0.03, atol=0)


@pytest.mark.parametrize("make", [portable, portable_eight_bit, torch_adamw], ids=lambda make: make.__name__)
@pytest.mark.parametrize("wrappers", [("fully_shard", "plain"), ("DistributedDataParallel", "fully_shard")], ids=str)
def test_losses_go_on_in_plain_params_and_from_them(ranks, tmp_path, make, wrappers):
    before, after = wrappers
    all_losses = ranks.run(_first_half, 2, str(tmp_path), make, before)[0]
    losses = ranks.run(_second_half, 1, str(tmp_path), make, after)[0]
    torch.testing.assert_close(losses, all_losses[10:], rtol=1e-4 if make is not portable_eight_bit else 0.03, atol=0)


@pytest.mark.parametrize(
    ("before", "after"),
    [(ours, ours), (torch_adamw, portable), (portable, torch_adamw), (portable_eight_bit, portable_eight_bit)],
    ids=lambda make: make.__name__,
)
def test_fully_sharded_data_parallel_checkpoints(ranks, tmp_path, before, after):
    all_losses = ranks.run(_first_half, 2, str(tmp_path), before, "FullyShardedDataParallel")[0]
    losses = ranks.run(_second_half, 2, str(tmp_path), after, "FullyShardedDataParallel")[0]
    torch.testing.assert_close(losses, all_losses[10:], rtol=1e-4 if before is not portable_eight_bit else 0.03, atol=0)

"""Offloading, on a stand-in whose copies come late: bit-identical to the plain optimizer, whatever the schedule."""

import contextlib
import copy
import functools
import gc
import multiprocessing
import os
import random
import re
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from offload_twins import (
    DEVICES,
    assert_same_params,
    assert_same_state,
    backward,
    capture,
    give,
    grads_for,
    loss_of,
    new_device,
    offloaded,
    place_of,
    small_model,
)
from torch import nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import adamops
from adamops import DeepSpeedCPUAdam, FusedAdam, OffloadedAdam
from adamops.offload import OffloadedOptimizer
from adamops.offload.blocks import params_by_block
from adamops.offload.host_stand_in import HostStandIn

PRECISIONS = [
    ({}, torch.float32),
    ({}, torch.bfloat16),
    ({"state_dtype": "8bit"}, torch.float32),
    ({"state_dtype": "8bit", "master_weight_bits": 24}, torch.bfloat16),
    ({"master_weight_bits": 32, "amsgrad": True}, torch.float16),
    ({"state_dtype": torch.bfloat16, "stochastic_rounding": True}, torch.bfloat16),
]


class Model(nn.Module):
    """Layers of random sizes, one of which is used twice, and of which each call leaves some out."""

    def __init__(self, draw, dtype):
        super().__init__()
        self.sizes = [draw.choice([1, 3, 40, 100]) for _ in range(draw.randrange(2, 6))]
        width = 8
        self.down = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.up = nn.ModuleList(nn.Linear(size, width) for size in self.sizes)
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.to(dtype)

    def forward(self, x, used):
        for down, up, uses in zip(self.down, self.up, used, strict=True):
            for _ in range(uses):
                x = x + up(down(x).tanh())
        return (x * self.frozen).float().square().mean()


SCHEDULES = int(os.environ.get("ADAMOPS_TEST_SCHEDULES", "50"))


@pytest.mark.skipif(not hasattr(nn.Parameter(torch.ones(1)), "grad_dtype"), reason="the reference needs torch 2.10")
@pytest.mark.parametrize("kind", ["stand-in"] * SCHEDULES + DEVICES[1:] * 10)
def test_any_schedule_gives_the_bits_of_the_plain_optimizer(kind, seed):
    draw = random.Random(seed)
    device = new_device(kind, seed)
    place = place_of(device)
    settings, dtype = draw.choice(PRECISIONS)
    settings = {**settings, "lr": 0.01, "weight_decay": draw.choice([0.0, 0.1])}
    twin = Model(draw, dtype)
    model = copy.deepcopy(twin).to(place)
    accumulate, in_backward = draw.choice([1, 1, 2, 3]), draw.random() < 0.3
    by_block = draw.random() < 0.5
    own = {
        "model": model if by_block else None,
        "accumulate": accumulate,
        "update_in_backward": in_backward,
        "chunk_mb": draw.choice([1e-6, 1e-3, 32]),
    }
    ours = offloaded(model.parameters(), device, **settings, **own)
    theirs = DeepSpeedCPUAdam(twin.parameters(), **settings)
    sums = capture(model, twin, accumulate)
    schedules = [LambdaLR(optimizer, lambda step: 0.9**step) for optimizer in (ours, theirs)]
    for _step in range(draw.randrange(2, 8)):
        for _micro in range(accumulate):
            used = [draw.choice([0, 1, 1, 2]) for _ in model.sizes]
            x = torch.randn(4, 8).to(dtype)
            loss = model(x.to(place), used)
            assert place == "cuda" or torch.equal(loss, twin(x, used))  # made of the params of the last step
            loss.backward() if any(used) else None
            assert all(param.grad is None for param in model.parameters())
        give(sums)
        if not in_backward and draw.random() < 0.5:
            norms = [optimizer.clip_grad_norm_(0.05) for optimizer in (ours, theirs)]
            assert torch.equal(*norms)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        if by_block and draw.random() < 0.7:
            ours.zero_grad()
            theirs.zero_grad()
            continue
        ours.wait()
        assert_same_params(model, twin)
        to_none = draw.random() < 0.8
        ours.zero_grad(set_to_none=to_none)
        theirs.zero_grad(set_to_none=True)
        if not to_none:
            ours.zero_grad()
        if draw.random() < 0.2:
            assert_same_state(ours.state_dict(), theirs.state_dict())
            saved = copy.deepcopy(draw.choice([ours, theirs]).state_dict())  # loading shares its tensors
            ours.load_state_dict(saved)
            theirs.load_state_dict(copy.deepcopy(saved))
        if draw.random() < 0.2:
            for each in (model, twin):
                each.frozen.requires_grad_(True)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert not getattr(device, "faults", [])


SCALERS = {
    "torch.amp": torch.amp.GradScaler,
    "sharded": ShardedGradScaler,
    "a subclass": type("Own", (GradScaler,), {}),
}


@pytest.mark.parametrize("loss_is_finite", [True, False])
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("kind", list(SCALERS))
def test_grad_scaler(device, loss_is_finite, unscales, kind, mesh, seed):
    model, twin = small_model(device, torch.float32)
    ours, theirs = offloaded(model.parameters(), device), FusedAdam(twin.parameters())
    scalers = [SCALERS[kind](device=place, init_scale=1024.0) for place in (place_of(device), "cpu")]
    sums = capture(model, twin)
    for step in range(3):
        loss = loss_of(model) * (1.0 if loss_is_finite or step != 1 else float("inf"))
        scalers[0].scale(loss).backward()
        scalers[1].scale(loss.detach().cpu())  # as it makes its scale then
        give(sums)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            if unscales:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert_same_params(model, twin)
    assert scalers[0].get_scale() == scalers[1].get_scale() == (1024.0 if loss_is_finite else 512.0)


def test_grads_that_the_caller_sets(device, seed):
    model, twin = small_model(device)
    ours, theirs = offloaded(model.parameters(), device), DeepSpeedCPUAdam(twin.parameters())
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        param.grad = torch.randn_like(param)
        other.grad = param.grad.cpu().clone()
    ours.step()
    theirs.step()
    assert_same_params(model, twin)
    assert all(param.grad is None for param in model.parameters())


def test_groups_that_are_added_and_their_own_settings(device, seed):
    model, twin = small_model(device)
    pairs = []
    for each, make in ((model, functools.partial(offloaded, device=device)), (twin, DeepSpeedCPUAdam)):
        optimizer = make([{"params": each[0].parameters(), "lr": 0.1}], lr=0.01, weight_decay=0.1)
        optimizer.add_param_group({"params": each[2].weight, "weight_decay": 0.5})
        optimizer.add_param_group({"params": [each[2].bias], "state_dtype": torch.bfloat16})
        pairs.append(optimizer)
    ours, theirs = pairs
    assert [group["lr"] for group in ours.param_groups] == [0.1, 0.01, 0.01]
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.5, 0.1]
    sums = capture(model, twin)
    for _ in range(3):
        backward(model)
        give(sums)
        for optimizer in pairs:
            optimizer.param_groups[1]["lr"] *= 0.5
            optimizer.step()
        assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_a_checkpoint_of_torch_goes_both_ways(device, seed):
    model, twin = small_model(device, torch.float32)
    ours, theirs = offloaded(model.parameters(), device, weight_decay=0.01), torch.optim.AdamW(twin.parameters())
    grads_for(model, twin)
    theirs.step()
    ours.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[model[0].weight]["step"] == 1 and ours.state[model[0].weight]["exp_avg"].device.type == "cpu"
    theirs.load_state_dict(ours.state_dict())
    assert float(theirs.state[twin[0].weight]["step"]) == 1


def test_hooks_and_schedulers_see_one_step(device, seed):
    model, _ = small_model(device)
    optimizer = OffloadedAdam(model.parameters(), device=device, chunk_mb=1e-6)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(model)
    optimizer.step()
    assert calls == ["before", "after"]


class Fails(Exception):
    pass


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_error_in_an_update_is_raised_and_the_next_step_does_what_is_left(device, in_backward, monkeypatch, seed):
    model, twin = small_model(device)
    ours = offloaded(model.parameters(), device, chunk_mb=1e-6, update_in_backward=in_backward)
    theirs = DeepSpeedCPUAdam(twin.parameters())
    update, failing = DeepSpeedCPUAdam._step_params, [True]

    def fails_once(self, group_index, begin, *others, **named):
        if begin == 1 and failing.pop() if failing else False:
            raise Fails("no memory")
        update(self, group_index, begin, *others, **named)

    monkeypatch.setattr(DeepSpeedCPUAdam, "_step_params", fails_once)
    grads_for(model, twin)
    if failing == [True] and not in_backward:
        with pytest.raises(Fails, match="no memory"):
            ours.step()
    theirs.step()
    with contextlib.suppress(Fails):
        ours.step()
    ours.step()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_wrong_settings_raise_before_anything_is_written(device, seed):
    model, twin = small_model(device)
    optimizer = offloaded([{"params": model[0].parameters()}, {"params": model[2].parameters()}], device)
    backward(model)
    optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(TypeError, match="Invalid lr: 'fast'"):
        optimizer.step()
    assert_same_params(model, twin)
    assert len(optimizer.state) == 0
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert not torch.equal(model[0].weight, twin[0].weight)


REFUSED = {
    "a closure": (lambda o, m: o.step(lambda: 1.0), TypeError, "takes no closure"),
    "a copy": (lambda o, m: copy.deepcopy(o), TypeError, "cannot be copied or pickled; save its state_dict"),
    "a state set": (lambda o, m: setattr(o, "state", {1: 2}), AttributeError, "use load_state_dict"),
    "a sparse grad": (
        lambda o, m: [setattr(m[0].weight, "grad", torch.ones_like(m[0].weight).to_sparse()), o.step()],
        TypeError,
        "has a grad of shape .* torch.sparse_coo; expected a dense one",
    ),
    "another device": (
        lambda o, m: o.add_param_group({"params": [nn.Parameter(torch.ones(3, device="meta"))]}),
        ValueError,
        r"The params are on (cpu|cuda:\d+), meta; expected one device",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused(device, name):
    call, error, message = REFUSED[name]
    model, _ = small_model(device)
    with pytest.raises(error, match=message):
        call(offloaded(model.parameters(), device), model)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"accumulate": 0}, ValueError, "Invalid accumulate: 0; expected an int of 1 or more"),
        ({"threads": 1.5}, ValueError, "Invalid threads: 1.5"),
        ({"chunk_mb": 0}, ValueError, "Invalid chunk_mb: 0; expected a number of more than 0"),
        ({"device": None}, ValueError, "The params are on cpu; offloading is for those on CUDA devices"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"momentum": 1}, TypeError, "momentum"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        OffloadedAdam([nn.Parameter(torch.ones(3))], **{"device": HostStandIn(), **arguments})


def test_in_backward_refuses_what_needs_all_grads(device, seed):
    model, _ = small_model(device, torch.float32)
    optimizer = offloaded(model.parameters(), device, update_in_backward=True)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) cannot be used with update_in_backward=True"):
        optimizer.clip_grad_norm_(1.0)
    scaler = torch.amp.GradScaler(place_of(device))
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with update_in_backward=True"):
        scaler.step(optimizer)


def test_in_backward_refuses_a_grad_of_what_is_updated(device, seed):
    model, _ = small_model(device)
    optimizer = offloaded(model.parameters(), device, update_in_backward=True)
    backward(model)
    with pytest.raises(
        RuntimeError, match="already updated: with update_in_backward=True, call step|modified by an inplace"
    ):
        backward(model)
    optimizer.step()


def step_in_child(optimizer, model, queue):
    try:
        optimizer.step()
    except RuntimeError as error:
        queue.put(str(error))


def test_a_forked_process_is_told(device, seed):
    model, _ = small_model(device)
    optimizer = offloaded(model.parameters(), device)
    backward(model)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=step_in_child, args=(optimizer, model, queue))
    child.start()
    assert "cannot be used in a forked process" in queue.get()
    child.join(30)
    optimizer.step()


def test_nothing_stays_once_it_is_dropped(seed):
    threads = set(threading.enumerate())
    model, _ = small_model()
    optimizer = offloaded(model.parameters(), HostStandIn())
    backward(model)
    optimizer.step()
    left = weakref.ref(optimizer), weakref.ref(optimizer._inner), weakref.ref(optimizer._chunks[0].entries[0].host)
    del optimizer
    gc.collect()
    assert [ref() for ref in left] == [None] * 3
    deadline = time.monotonic() + 30
    while (left_over := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left_over
    backward(model)  # the hooks do nothing
    assert model[0].weight.grad is not None


class Blocks(nn.Module):
    """Two lists of blocks, one in another block, a layer outside, and a weight that two blocks share."""

    def __init__(self):
        super().__init__()
        self.outside = nn.Linear(2, 2)
        self.first = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())])
        self.nested = nn.ModuleDict({"last": nn.Linear(2, 2)})
        self.nested.last.weight = self.first[0].weight


def test_blocks_of_a_model():
    model = Blocks()
    blocks = params_by_block(model)
    assert list(blocks) == [*model.first, model.nested.last]
    assert [[id(p) for p in params] for params in blocks.values()] == [
        [id(model.first[0].bias)],
        [id(param) for param in model.first[1].parameters()],
        [id(model.nested.last.bias)],
    ]
    assert list(params_by_block(nn.Sequential(nn.Linear(1, 1)))) and not params_by_block(nn.Linear(1, 1))


@pytest.mark.parametrize("write", ["load_state_dict", "data"])
def test_params_that_others_write_are_read_again(device, write, seed):
    model, twin = small_model(device)
    settings = {"master_weight_bits": 24, "lr": 0.1}
    ours, theirs = offloaded(model.parameters(), device, **settings), DeepSpeedCPUAdam(twin.parameters(), **settings)
    for step in range(4):
        if step == 2:
            others = small_model(device)[0].state_dict()
            for each in (model, twin):
                if write == "load_state_dict":
                    each.load_state_dict(others)
                else:
                    for name, param in each.named_parameters():
                        param.data = others[name].to(param.device, copy=True)
        grads_for(model, twin)
        ours.step()
        theirs.step()
        assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_a_models_state_dict_waits(seed):
    """As does the forward pass of a module within a block; what is outside of blocks is there after step()."""
    model, twin = (nn.ModuleDict({"blocks": nn.ModuleList([each])}) for each in small_model())
    slow = HostStandIn(delay=lambda: 0.05)
    ours, theirs = offloaded(model.parameters(), slow, model=model), DeepSpeedCPUAdam(twin.parameters())
    grads_for(model.blocks[0], twin.blocks[0])
    ours.step()
    theirs.step()
    x = torch.ones(8).bfloat16()
    assert torch.equal(model.blocks[0][0](x), twin.blocks[0][0](x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


def test_a_model_of_shards_is_refused(mesh):
    model, _ = small_model()
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="model= cannot be given for DTensors"):
        offloaded(model.parameters(), HostStandIn(), model=model)


def test_any_rule_can_be_offloaded(device, seed):
    model, twin = small_model(device)
    ours, theirs = (
        adamops.offload(FusedAdam, model.parameters(), device=device, lr=0.1),
        FusedAdam(twin.parameters(), 0.1),
    )
    assert isinstance(ours, OffloadedOptimizer)
    grads_for(model, twin)
    ours.step()
    theirs.step()
    assert_same_params(model, twin)


def test_no_growth(seed):
    """Neither in pinned memory nor in objects."""
    device = HostStandIn()
    model, _ = small_model()
    optimizer = offloaded(model.parameters(), device, accumulate=2, state_dtype="8bit")
    counts = []
    for step in range(60):
        backward(model)
        backward(model)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        device.trace.clear()
        if step % 20 == 19:
            gc.collect()
            counts.append((len(gc.get_objects()), device.pinned_bytes))
    assert counts[1][1] == counts[2][1] and abs(counts[2][0] - counts[1][0]) < 50, counts


def test_shards_of_fully_shard(mesh, seed):
    model, twin = small_model(dtype=torch.float32)
    for each in (model, twin):
        fully_shard(each[0], mesh=mesh)
        fully_shard(each, mesh=mesh)
    settings = {"lr": 0.01, "state_dtype": torch.bfloat16}
    ours = OffloadedAdam(model.parameters(), device=HostStandIn.with_random_delays(seed), **settings)
    theirs = DeepSpeedCPUAdam(twin.parameters(), **settings)
    for _ in range(3):
        x = torch.randn(6, 8)
        for each, optimizer in ((model, ours), (twin, theirs)):
            each(x).square().mean().backward()
            norm = optimizer.clip_grad_norm_(0.01)
            optimizer.step()
            optimizer.zero_grad()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param.to_local(), other.to_local())
    assert norm > 0.01
    weight = ours.state[model[0].weight]["exp_avg"]
    assert isinstance(weight, DTensor) and weight.placements == model[0].weight.placements
    saved = get_optimizer_state_dict(model, ours, options=StateDictOptions(full_state_dict=True))
    theirs_saved = get_optimizer_state_dict(twin, theirs, options=StateDictOptions(full_state_dict=True))
    assert_same_state(saved, theirs_saved)


def test_the_pages_script_learns(capsys):
    page = (Path(__file__).resolve().parent.parent / "docs" / "offload.md").read_text()
    exec(compile(re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1], "offload.md", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.05

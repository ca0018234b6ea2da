"""What may go wrong around offloading: settings and params that others write, errors, other owners, ends."""

import contextlib
import copy
import gc
import io
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from offload_twins import (
    InOrder,
    assert_same_params,
    assert_same_state,
    backward,
    capture,
    give,
    grads_for,
    loss_of,
    new_device,
    offloaded,
    small_model,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import adamops
from adamops import DeepSpeedCPUAdam, OffloadedAdam, step_in_backward
from adamops.offload.device import CudaDevice
from adamops.offload.host_stand_in import HostStandIn
from adamops.offload.pinned import _parts
from adamops.offload.task import Task


@pytest.fixture
def slow():
    """A stand-in whose copies take 20 ms, so that updates and copies are under way after step()."""
    device = HostStandIn(delay=lambda: 0.02)
    yield device
    assert not device.faults


def twins(device, **settings):
    model, twin = small_model(device)
    own = {"model": model, "chunk_mb": 1e-6, **settings}
    theirs = copy.deepcopy({key: settings[key] for key in settings.keys() - {"update_in_backward", "model"}})
    return model, twin, offloaded(model.parameters(), device, **own), DeepSpeedCPUAdam(twin.parameters(), **theirs)


# Settings ---------------------------------------------------------------------------------------------------------


def test_a_step_has_the_settings_of_its_call(device, seed):
    """Not those at the time when a chunk is updated."""
    model, twin, ours, theirs = twins(device, lr=torch.tensor(0.1))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (ours, theirs)]
    for _ in range(3):
        grads_for(model, twin)
        for optimizer, lr in zip((ours, theirs), rates, strict=True):
            optimizer.step()
            lr.mul_(0.5)
    ours.wait()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_settings_that_change_between_updates_of_one_step_are_refused(device, seed):
    model, _, ours, _ = twins(device, lr=0.1, update_in_backward=True, model=None)

    def change(_):
        ours.param_groups[0]["lr"] = 0.2

    loss = loss_of(model)
    model[0].weight.register_hook(change)
    loss.backward()
    with pytest.raises(RuntimeError, match="Settings have changed after some params were updated"):
        ours.step()
    ours.param_groups[0]["lr"] = 0.1
    ours.step()


def test_a_wrong_setting_is_an_error_of_the_backward_pass(device, seed):
    model, twin, ours, _ = twins(device, update_in_backward=True)
    ours.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="Invalid lr: 'fast'"):
        backward(model)
    assert_same_params(model, twin)


# Params that others write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loaded_model_is_what_it_loaded(slow, in_backward, seed):
    model, twin, ours, theirs = twins(slow, lr=0.1, update_in_backward=in_backward)
    others = small_model()[0].state_dict()
    for _ in range(2):
        grads_for(model, twin)
        ours.step()
        theirs.step()
        model.load_state_dict(others)
        twin.load_state_dict(others)
        assert_same_params(model, twin)
    ours.wait()
    assert_same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("write", ["load_state_dict", "in place", "local"])
@pytest.mark.parametrize("kind", ["stand-in", "in order"])
def test_writes_to_shards_are_seen(kind, mesh, write, seed):
    device = new_device(kind, seed)
    model, twin = (fully_shard(each, mesh=mesh) for each in small_model())
    ours = offloaded(model.parameters(), device, lr=0.1, master_weight_bits=24)
    theirs = DeepSpeedCPUAdam(twin.parameters(), lr=0.1, master_weight_bits=24)
    for _ in range(3):
        x = torch.randn(6, 8).bfloat16()
        for each, optimizer in ((model, ours), (twin, theirs)):
            each(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if write == "load_state_dict":
                each.load_state_dict({name: value * 0.5 for name, value in each.state_dict().items()})
            elif write == "in place":
                with torch.no_grad():
                    each[0].weight.mul_(0.5)
            else:
                each[0].weight.to_local().detach().mul_(0.5)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param.to_local(), other.to_local())


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("write", ["in place", "data"])
def test_writes_while_an_update_is_on_its_way_are_an_error(slow, in_backward, write, seed):
    model, twin, ours, theirs = twins(slow, lr=0.1, update_in_backward=in_backward)
    grads_for(model, twin)
    if not in_backward:
        ours.step()
    with torch.no_grad():
        if write == "data":
            model[0].weight.data = torch.ones_like(model[0].weight)
        else:
            model[0].weight.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"written while their update .* shapes \(40, 8\)\. Call wait\(\)"):
        if in_backward:
            ours.step()
        ours.wait()
    ours.wait()
    theirs.step()
    for each in (model, twin):
        with torch.no_grad():
            each[0].weight.fill_(2.0)
    grads_for(model, twin)
    ours.step()
    theirs.step()
    ours.wait()
    assert_same_params(model, twin)


@pytest.mark.parametrize("change", ["half", "shape"])
def test_params_that_are_no_longer_alike_are_an_error(device, change, seed):
    model, _, ours, _ = twins(device)
    if change == "half":
        model.half()
    else:
        model[0].weight.data = torch.ones_like(model[0].weight)[:, :3]
        model[0].in_features = 3
    with pytest.raises(ValueError, match="was given to the optimizer, and is now of shape .* make the optimizer after"):
        model(torch.ones(2, model[0].weight.shape[1]).to(model[0].weight)).sum().backward()
    with pytest.raises(ValueError, match="was given to the optimizer, and is now of shape"):
        ours.step()


def test_memory_that_has_the_address_of_the_former(device, seed):
    """An allocator gives freed memory again, so param.data may have other values at the same place."""
    model, twin, ours, theirs = twins(device, lr=0.1, model=None)
    for _ in range(20):
        for each in (model, twin):
            for param in each.parameters():
                param.data = param.data * 0.5
                param.data = param.data * 0.5
        grads_for(model, twin)
        ours.step()
        theirs.step()
        assert_same_params(model, twin)


# Grads ------------------------------------------------------------------------------------------------------------


def test_a_grad_that_is_set_replaces_what_was_sent(device, seed):
    model, twin, ours, theirs = twins(device)
    grads_for(model, twin)
    for each in (model, twin):
        each[0].bias.grad = torch.ones_like(each[0].bias)
    ours.step()
    theirs.step()
    ours.wait()
    assert_same_params(model, twin)


def test_a_grad_that_is_set_for_an_updated_param_is_an_error(device, seed):
    model, _, ours, _ = twins(device, update_in_backward=True)
    backward(model)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    with pytest.raises(RuntimeError, match="already updated"):
        ours.step()
    model[0].bias.grad = None
    ours.step()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_before_another_pass_of_some_params(device, accumulate, seed):
    """Those that got no grad since keep their factor."""
    model, twin = small_model(device, torch.float32)
    ours, theirs = offloaded(model.parameters(), device, accumulate=accumulate), DeepSpeedCPUAdam(twin.parameters())
    sums = capture(model, twin)
    backward(model)
    kept = dict(sums)
    give(sums)
    for optimizer in (ours, theirs):
        optimizer.clip_grad_norm_(1e-3)
    x = torch.randn(3, 40).to(model[2].weight)
    model[2](x).sum().backward()
    for param, grad in sums.items():
        kept[param] += grad  # in place, as autograd accumulates
    for optimizer in (ours, theirs):
        optimizer.step()
    for index in (0, 1):
        state, other = (o.state_dict()["state"][index]["exp_avg"] for o in (ours, theirs))
        assert torch.equal(state, other)


def test_a_distributed_checkpoint_keeps_grads_for_the_first_step(device, seed):
    model, twin, ours, theirs = twins(device)
    grads_for(model, twin)
    for each, optimizer in ((model, ours), (twin, theirs)):
        assert not get_optimizer_state_dict(each, optimizer)["state"]
        optimizer.step()
    ours.wait()
    assert_same_params(model, twin)


# Params ------------------------------------------------------------------------------------------------------------


def test_frozen_params_take_no_memory_until_they_get_grads(device, seed):
    sizes = []
    pinned = device.pinned

    def counted(size):
        sizes.append(size)
        return pinned(size)

    device.pinned = counted
    model, twin = small_model(device)
    model[0].requires_grad_(False)
    ours, theirs = offloaded(model.parameters(), device), DeepSpeedCPUAdam(twin.parameters())
    assert sum(sizes) == 2 * (2 * 160 + 64)  # (4, 40) and (4,) of bfloat16, up and down, whole cache lines
    grads_for(model, twin)
    for _ in range(2):
        ours.step()
        theirs.step()
        assert_same_params(model, twin)
        model[0].requires_grad_(True)
        theirs.zero_grad()
        grads_for(model, twin)
    assert len(sizes) > 2
    assert_same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("layout", ["channels last", "transposed", "scalar", "empty"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_layouts_of_params(device, layout, accumulate, seed):
    """Bit-identical, also where rounding takes its random bits in the order of memory."""
    values = {
        "channels last": lambda: torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(7, 30).t(),
        "scalar": lambda: torch.randn(()),
        "empty": lambda: torch.randn(0, 3),
    }
    value = values[layout]().bfloat16()
    twin = nn.ParameterList([nn.Parameter(value)])
    model = copy.deepcopy(twin).to("cuda" if isinstance(device, CudaDevice) else "cpu")
    assert model[0].stride() == value.stride()
    settings = {"stochastic_rounding": True, "lr": 0.1}
    ours = offloaded(model.parameters(), device, accumulate=accumulate, **settings)
    theirs = DeepSpeedCPUAdam(twin.parameters(), **settings)
    sums = capture(model, twin, accumulate)
    for _ in range(3):
        for _ in range(accumulate):
            (model[0].float() * torch.randn(value.shape).to(model[0].device)).sum().backward()
        give(sums)
        ours.step()
        theirs.step()
        assert_same_params(model, twin)
        theirs.zero_grad()


def test_names_of_params(device, seed):
    model, twin = small_model(device)
    ours, theirs = offloaded(model.named_parameters(), device), DeepSpeedCPUAdam(twin.named_parameters())
    ours.add_param_group({"params": [("more", nn.Parameter(torch.ones_like(model[0].bias)))]})
    assert ours.param_groups[1]["param_names"] == ["more"]
    assert ours.state_dict()["param_groups"][0] == theirs.state_dict()["param_groups"][0]


def test_torchs_names_can_be_offloaded(device, seed):
    model, twin = small_model(device, torch.float32)
    ours, theirs = offloaded(model.parameters(), device, adamops.AdamW, lr=0.1), adamops.AdamW(twin.parameters(), 0.1)
    grads_for(model, twin)
    ours.step()
    theirs.step()
    assert_same_params(model, twin)


def test_grads_that_have_a_graph(device, seed):
    model, twin, ours, theirs = twins(device)
    sums = capture(model, twin)
    loss_of(model).backward(create_graph=True)
    give(sums)
    ours.step()
    theirs.step()
    ours.wait()
    assert_same_params(model, twin)


P = nn.Parameter
GROUPS = {
    "a list": (lambda p: [p], TypeError, "param group 1 is a list without params; expected a dict with 'params'"),
    "no params": (lambda p: {"lr": 1.0}, TypeError, "param group 1 is a dict without params"),
    "a set": (lambda p: {"params": {p}}, TypeError, "param group 1 has a set as its params"),
    "a string": (lambda p: {"params": "ab"}, TypeError, "param group 1, param 0 is a str; expected a tensor"),
    "twice": (lambda p: {"params": [p, p]}, ValueError, "param group 1, param 1 is in the optimizer already"),
    "a known one": (lambda p: {"params": [p.known]}, ValueError, "param group 1, param 0 is in the optimizer already"),
    "whole numbers": (
        lambda p: {"params": [torch.ones(3, dtype=torch.int32), P(torch.ones(3, dtype=torch.complex64))]},
        TypeError,
        "param group 1, param 1 .* dtype is not supported",
    ),
    "a slice of a known one": (lambda p: {"params": [P(p.known.data[:1])]}, ValueError, "share memory"),
    "gaps": (lambda p: {"params": [P(torch.ones(3, 4)[:, :2])]}, ValueError, "which overlap or leave gaps"),
    "a lazy one": (lambda p: {"params": [nn.LazyLinear(3).weight]}, ValueError, "no shape yet"),
    "a wrong setting": (lambda p: {"params": [p], "lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "an unknown precision": (lambda p: {"params": [p], "state_dtype": "4bit"}, (TypeError, ValueError), "4bit"),
}


@pytest.mark.parametrize("name", list(GROUPS))
def test_a_group_that_cannot_be_added_leaves_nothing(name, seed):
    make, error, message = GROUPS[name]
    device = InOrder()
    model, twin, ours, theirs = twins(device)
    new, other = (P(torch.ones(5).bfloat16()) for _ in range(2))
    new.known = model[0].weight
    with pytest.raises(error, match=message):
        ours.add_param_group(make(new))
    assert len(ours.param_groups) == len(ours._inner.param_groups) == 1 and len(ours._entries) == 4
    for optimizer, param in ((ours, new), (theirs, other)):
        optimizer.add_param_group({"params": param, "lr": 0.5})
        param.grad = torch.ones_like(param)
    grads_for(model, twin)
    ours.step()
    theirs.step()
    ours.wait()
    assert torch.equal(new, other)
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


ARGUMENTS = {
    "no optimizer of adamops": (lambda m: adamops.offload(torch.optim.AdamW, m.parameters()), TypeError, "got AdamW"),
    "an object": (lambda m: adamops.offload(m, m.parameters()), TypeError, "got Sequential"),
    "a module": (lambda m: OffloadedAdam(m), TypeError, "params is a Sequential; expected an iterable"),
    "a string": (lambda m: OffloadedAdam("ab"), TypeError, "params is a str"),
    "nothing": (lambda m: OffloadedAdam([]), ValueError, "empty parameter list"),
    "modules": (lambda m: OffloadedAdam(list(m)), TypeError, "param group 0, param 0 is a Linear; expected a tensor"),
    "a generator as the model": (
        lambda m: OffloadedAdam(m.parameters(), model=m.parameters()),
        TypeError,
        "model is a generator; expected the nn.Module",
    ),
    "all memory": (lambda m: OffloadedAdam(m.parameters(), chunk_mb=float("inf")), ValueError, "Invalid chunk_mb: inf"),
    "a size in words": (lambda m: OffloadedAdam(m.parameters(), chunk_mb="32"), ValueError, "Invalid chunk_mb: '32'"),
    "a flag": (lambda m: OffloadedAdam(m.parameters(), accumulate=True), ValueError, "Invalid accumulate: True"),
    "a flag as a size": (lambda m: OffloadedAdam(m.parameters(), chunk_mb=True), ValueError, "Invalid chunk_mb: True"),
    "a word as a flag": (
        lambda m: OffloadedAdam(m.parameters(), update_in_backward="no"),
        TypeError,
        "Invalid update_in_backward: 'no'; expected True or False",
    ),
    "a device of torch": (
        lambda m: OffloadedAdam(m.parameters(), device="cuda"),
        TypeError,
        "device is 'cuda'; expected an object with the methods of adamops.offload.device.Device",
    ),
    "a class as the device": (lambda m: OffloadedAdam(m.parameters(), device=HostStandIn), TypeError, "HostStandIn'>"),
    "another model": (
        lambda m: OffloadedAdam(m.parameters(), device=HostStandIn(), model=small_model()[0]),
        ValueError,
        "model has none of the params",
    ),
}


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_arguments_that_are_refused(name):
    make, error, message = ARGUMENTS[name]
    model, _ = small_model()
    with pytest.raises(error, match=message):
        make(model)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_params_that_are_exchanged_in_a_group_are_an_error(device, seed):
    model, _, ours, _ = twins(device)
    backward(model)
    ours.param_groups[0]["params"][0] = P(torch.ones_like(model[0].weight))
    with pytest.raises(ValueError, match="no longer those that the optimizer was given"):
        ours.step()


def test_params_that_share_memory_are_found_when_they_are_unfrozen(device, seed):
    weight = P(torch.ones(4, 3, device="cuda" if isinstance(device, CudaDevice) else "cpu"))
    part = P(weight.data[:2], requires_grad=False)
    ours = offloaded([weight, part], device)
    part.requires_grad_(True)
    (weight.sum() + part.sum()).backward()
    with pytest.raises(ValueError, match="share memory"):
        ours.step()


def test_another_default_device(device, seed):
    model, twin = small_model(device)
    torch.set_default_device("meta")
    try:
        ours = offloaded(model.parameters(), device, accumulate=2, state_dtype="8bit", model=model)
    finally:
        torch.set_default_device(None)
    theirs = DeepSpeedCPUAdam(twin.parameters(), state_dtype="8bit")
    sums = capture(model, twin, 2)
    backward(model)
    backward(model)
    give(sums)
    ours.step()
    theirs.step()
    ours.wait()
    assert_same_params(model, twin)


def test_an_optimizer_made_in_inference_mode(device, seed):
    model, twin = small_model(device)
    with torch.inference_mode():
        ours = offloaded(model.parameters(), device)
    theirs = DeepSpeedCPUAdam(twin.parameters())
    grads_for(model, twin)
    ours.step()
    theirs.step()
    assert_same_params(model, twin)


# Other owners of the params ---------------------------------------------------------------------------------------


def test_a_second_optimizer_of_the_same_params(device, seed):
    model, _ = small_model(device)
    first = offloaded(model.parameters(), device)
    with pytest.raises(ValueError, match="param group 0, param 0 is a param of another offloaded optimizer"):
        offloaded(model.parameters(), device)
    LambdaLR(first, lambda step: 1.0)  # makes a cycle
    del first
    before = model[0].weight.detach().clone()
    second = offloaded(model.parameters(), device)
    backward(model)
    second.step()
    assert not torch.equal(model[0].weight, before)


def test_wrappers_that_average_grads_are_refused(mesh, seed):
    model, _ = small_model(dtype=torch.float32)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel averages grads .* Use fully_shard\(\)"):
        OffloadedAdam(model.parameters(), device=HostStandIn())
    del wrapped
    gc.collect()
    optimizer = OffloadedAdam(model.parameters(), device=HostStandIn())
    with pytest.raises(RuntimeError, match="DistributedDataParallel averages grads"):
        DistributedDataParallel(model)
    del optimizer
    gc.collect()
    DistributedDataParallel(model)


def test_an_optimizer_that_is_dropped_before_its_updates_are_done(slow, seed):
    """Blocks wait for them all the same, and so does the next optimizer of the params."""
    model, twin, ours, theirs = twins(slow, lr=0.1)
    for _ in range(3):
        grads_for(model, twin)
        ours.step()
        theirs.step()
        ours = theirs = None
        gc.collect()
        x = torch.ones(1, 8).bfloat16()
        assert torch.equal(model(x), twin(x))
        ours = offloaded(model.parameters(), slow, lr=0.1, model=model, chunk_mb=1e-6)
        theirs = DeepSpeedCPUAdam(twin.parameters(), lr=0.1)
    ours.wait()
    assert_same_params(model, twin)


# Errors in between ------------------------------------------------------------------------------------------------


class Fails(Exception):
    pass


def test_a_retried_step_is_the_one_that_failed(device, monkeypatch, seed):
    """With its clip factor and learning rate, whatever was called since."""
    model, twin, ours, theirs = twins(device, lr=0.1)
    update, failing = DeepSpeedCPUAdam._step_params, [True]

    def fails_once(self, group_index, begin, *others, **named):
        if begin == 0 and failing:
            failing.clear()
            raise Fails("no memory")
        update(self, group_index, begin, *others, **named)

    monkeypatch.setattr(DeepSpeedCPUAdam, "_step_params", fails_once)
    grads_for(model, twin)
    for optimizer in (ours, theirs):
        optimizer.clip_grad_norm_(1e-3)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(Fails):
        loss_of(model)
    ours.step()
    ours.wait()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_an_error_is_raised_though_the_optimizer_was_dropped(device, monkeypatch, seed):
    model, _, ours, _ = twins(device)

    def fails(*_, **__):
        raise Fails("no memory")

    monkeypatch.setattr(DeepSpeedCPUAdam, "_step_params", fails)
    backward(model)
    ours.step()
    left = weakref.ref(ours)
    del ours
    with pytest.raises(Fails):
        for _ in range(4):  # blocks; each raises its own
            loss_of(model)
    for _ in range(4):
        with contextlib.suppress(Fails):
            loss_of(model)
    assert left() is None  # and no cycle keeps it


@pytest.mark.parametrize("lines", range(1, 16))
def test_a_wait_within_a_wait_takes_nothing_from_it(lines):
    """As of a signal handler, after some lines of the wait that it interrupts: both end."""
    gate, ended = threading.Event(), []

    def wait():
        task = Task(executor, gate.wait)
        seen = 0

        def after_each_line(frame, event, _):
            nonlocal seen
            seen += event == "line"
            if seen == lines:
                sys.settrace(None)
                gate.set()
                assert task.exception() is None
            return after_each_line

        sys.settrace(after_each_line)
        try:
            ended.append(task.exception())
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(1) as executor:
        threading.Timer(0.2, gate.set).start()  # where the wait has fewer lines
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(30)
    assert ended == [None]


@pytest.mark.parametrize("times", range(5))
def test_a_signal_handler_may_save(times, seed):
    """As at preemption, while step() waits."""
    device = HostStandIn(delay=lambda: 0.002)
    model, twin, ours, theirs = twins(device, model=None)
    saved = []
    before = signal.signal(signal.SIGALRM, lambda *_: saved.append(ours.state_dict()))
    try:
        for step in range(10):
            grads_for(model, twin)
            signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + step + 10 * times))
            ours.step()
            theirs.step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_same_params(model, twin)


@pytest.mark.parametrize("call", ["wait", "state", "state_dict"])
def test_waiting_between_updates_and_step_changes_nothing(device, call, seed):
    model, twin, ours, theirs = twins(device, update_in_backward=True)
    grads_for(model, twin)
    ours.state if call == "state" else getattr(ours, call)()
    with pytest.raises(RuntimeError, match="already updated: with update_in_backward=True, call step"):
        backward(model)
    ours.zero_grad()
    ours.step()
    theirs.step()
    ours.wait()
    assert_same_params(model, twin)


def test_after_an_error_in_a_backward_pass_zero_grad_begins_anew(device, seed):
    model, twin, ours, theirs = twins(device, update_in_backward=True)
    loss = loss_of(model)
    handle = model[0].weight.register_hook(lambda _: (_ for _ in ()).throw(Fails("no memory")))
    with pytest.raises(Fails):
        loss.backward()
    handle.remove()
    ours.zero_grad()
    ours.wait()
    assert torch.equal(model[0].weight.cpu(), twin[0].weight)
    before = model[2].weight.detach().clone()
    backward(model)
    ours.step()
    ours.wait()
    assert not torch.equal(model[0].weight.cpu(), twin[0].weight) and not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_grad_that_could_not_be_added(device, failing, monkeypatch, seed):
    """Its sum is not used, however often one asks, until the grads are dropped."""
    model, twin = small_model(device)
    ours = offloaded(model.parameters(), device, accumulate=2)
    add, calls = ours._add, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise Fails("no memory")
        add(*arguments)

    ours._add = fails
    for _ in range(2):
        with contextlib.suppress(Fails):
            backward(model)
    for _ in range(3):
        with pytest.raises(Fails):
            ours.step()
    ours.zero_grad()
    theirs = DeepSpeedCPUAdam(twin.parameters())
    with torch.no_grad():
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            param.copy_(other)
    sums = capture(model, twin, 2)
    for _ in range(2):
        backward(model)
    give(sums)
    ours.step()
    theirs.step()
    states = ours.state_dict()["state"]
    for index, state in theirs.state_dict()["state"].items():
        if int(states[index]["step"]) == 1:  # others were updated before
            assert torch.equal(states[index]["exp_avg"], state["exp_avg"])


def test_an_upload_that_fails_is_tried_again(seed):
    """And what was updated on the host is not updated once more."""
    device = InOrder()
    model, twin, ours, theirs = twins(device, model=None)
    upload, failing = device.upload, [True]

    def fails_once(*arguments):
        if failing:
            failing.clear()
            raise Fails("no memory on the device")
        upload(*arguments)

    device.upload = fails_once
    grads_for(model, twin)
    with pytest.raises(Fails):
        ours.step()
    theirs.step()
    with pytest.raises(RuntimeError, match="could not be copied to the device: call step"):
        backward(model)
    for param in model.parameters():
        param.grad = None
    ours.step()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_states_cannot_be_set(device, seed):
    model, _ = small_model(device)
    optimizer = offloaded(model.parameters(), device)
    for value in ({}, {1: 2}):
        with pytest.raises(AttributeError, match="use load_state_dict"):
            optimizer.state = value


def test_a_printed_optimizer_shows_its_settings(device, seed):
    model, _ = small_model(device)
    optimizer = offloaded(model.parameters(), device)
    optimizer.param_groups[0]["lr"] = 0.5
    assert "lr: 0.5\n" in repr(optimizer) and "MB of pinned memory" in repr(optimizer)


# Hooks, copies and ends -------------------------------------------------------------------------------------------


def test_state_dict_hooks(device, seed):
    model, _ = small_model(device)
    optimizer = offloaded(model.parameters(), device)
    calls = []

    def saved(seen, state):
        calls.append(("saved", seen))
        return {**state, "more": 1}

    def loads(seen, state):
        calls.append(("loads", seen))
        assert state.pop("more") == 1

    optimizer.register_state_dict_pre_hook(lambda seen: calls.append(("saves", seen)))
    optimizer.register_state_dict_post_hook(saved)
    handle = optimizer.register_load_state_dict_pre_hook(loads)
    optimizer.register_load_state_dict_post_hook(lambda seen: calls.append(("loaded", seen)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [(name, optimizer) for name in ("saves", "saved", "loads", "loaded")]
    handle.remove()
    optimizer.load_state_dict({key: value for key, value in optimizer.state_dict().items() if key != "more"})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_copies_of_the_model_have_no_optimizer(device, copied, seed):
    model, _, ours, _ = twins(device)
    backward(model)
    ours.step()
    ours.wait()
    if copied == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(model)
    before = model[0].weight.detach().clone()
    backward(other)
    assert other[0].weight.grad is not None
    ours.step()
    ours.wait()
    assert torch.equal(model[0].weight, before)
    offloaded(other.parameters(), device)


def test_what_a_model_keeps_of_a_dropped_optimizer(device, seed):
    model, _, ours, _ = twins(device)
    backward(model)
    ours.step()
    ours.wait()
    left = weakref.ref(ours), weakref.ref(ours._pipeline), weakref.ref(ours._chunks[0].entries[0].host)
    del ours
    gc.collect()
    assert [ref() for ref in left] == [None] * 3
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in model.modules())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_uploads_to_params_that_are_dropped(slow, seed):
    model, _, ours, _ = twins(slow)
    backward(model)
    ours.step()
    del model, ours
    gc.collect()
    time.sleep(0.3)  # the fixture looks for faults


def test_params_that_are_saved_themselves_can_be_loaded(device, seed):
    model, _, ours, _ = twins(device)
    plain = small_model(device)[0]
    step_in_backward(plain, DeepSpeedCPUAdam(plain.parameters()))
    for each in (model, plain):
        torch.save(each.state_dict(keep_vars=True), file := io.BytesIO())
        file.seek(0)
        assert torch.load(file, weights_only=True).keys() == each.state_dict().keys()


@pytest.mark.parametrize("is_compiled_before", [False, True])
def test_a_compiled_model(device, is_compiled_before, seed):
    model, twin = small_model(device)
    compiled = torch.compile(model, backend="eager")
    if is_compiled_before:
        with torch.no_grad():
            compiled(torch.ones(1, 8).to(model[0].weight))
    ours = offloaded(model.parameters(), device, model=model, chunk_mb=1e-6)
    theirs = DeepSpeedCPUAdam(twin.parameters())
    sums = capture(model, twin)
    for _ in range(3):
        loss_of(compiled).backward()
        give(sums)
        ours.step()
        theirs.step()
        with torch.no_grad():
            x = torch.ones(1, 8).bfloat16()
            ours_now, theirs_now = compiled(x.to(model[0].weight)).cpu(), twin(x)
        assert isinstance(device, CudaDevice) or torch.equal(ours_now, theirs_now)
    ours.wait()
    assert_same_params(model, twin)


CALLS = {
    "the model": lambda o, m: m(torch.ones(1, 8).bfloat16()),
    "wait": lambda o, m: o.wait(),
    "zero_grad": lambda o, m: o.zero_grad(),
    "clip_grad_norm_": lambda o, m: o.clip_grad_norm_(1.0),
    "state_dict": lambda o, m: o.state_dict(),
    "a backward pass": lambda o, m: m[2](torch.ones(1, 40).bfloat16()).sum().backward(),
}


def call_in_child(call, optimizer, model, queue):
    torch.set_num_threads(1)
    try:
        call(optimizer, model)
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


@pytest.mark.parametrize("name", list(CALLS))
def test_a_forked_process_with_updates_in_flight_is_told(name, seed):
    device = HostStandIn(delay=lambda: 0.3)
    model, _, ours, _ = twins(device)
    backward(model)
    ours.step()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=call_in_child, args=(CALLS[name], ours, model, queue))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert "cannot be used in a forked process" in queue.get()
    ours.wait()


END = """
import torch
from adamops import OffloadedAdam
from adamops.offload.host_stand_in import HostStandIn

model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(20)))
device = HostStandIn(delay=lambda: 0.01)
optimizer = OffloadedAdam(model.parameters(), device=device, model=model, chunk_mb=0.01, {settings})
model(torch.ones(2, 100)).sum().backward()
{step}
"""


@pytest.mark.parametrize("settings", ["update_in_backward=False", "update_in_backward=True", "accumulate=2"])
@pytest.mark.parametrize("step", ["optimizer.step()", "", "optimizer.step(); raise SystemExit(0)"])
def test_a_program_may_end_at_any_time(settings, step):
    script = END.format(settings=settings, step=step)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not re.search("Traceback|Error|terminate", ended.stderr), ended.stderr


def test_pinned_memory_comes_in_pieces_just_below_powers_of_two(seed):
    sizes = [int(2.0 ** float(power)) for power in torch.empty(300).uniform_(6, 27)]
    parts = list(_parts(sizes))
    assert [size for part in parts for size in part] == sizes
    rounded = sum(1 << (sum(part) - 1).bit_length() for part in parts)
    assert rounded <= 1.25 * sum(sizes) and sum(1 << (size - 1).bit_length() for size in sizes) > rounded
    assert list(_parts([])) == [] and list(_parts([0, 0])) == [[0, 0]]

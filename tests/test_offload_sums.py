"""Grads of an accumulation that the update's pass adds up: the bits of adding them before."""

import contextlib
import copy
import functools
import random
import signal
import threading
import time

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
    offloaded,
    place_of,
    small_model,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from adamops import DeepSpeedCPUAdam, FusedAdam, op_builder
from adamops.optim.backends.cpu import NativeBackend
from adamops.optim.backends.torch import TorchBackend

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(nn.Parameter(torch.ones(1)), "grad_dtype"), reason="16-bit params with grads in fp32: torch 2.10"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = [
    {},
    {"state_dtype": "8bit", "master_weight_bits": 24},
    {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    {"master_weight_bits": 32, "amsgrad": True},
]


def params_with_sums(sizes, dtype):
    params = [nn.Parameter((torch.randn(size) * 3).to(dtype)) for size in sizes]
    for param in params:
        if dtype != torch.float32:
            param.grad_dtype = torch.float32
        param.grad = torch.randn(param.shape)
    return params


# The op ---------------------------------------------------------------------------------------------------------------


@needs_grad_dtype
@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", op_builder.get("cpu_adam").load().supported_targets())
def test_a_step_that_adds_up(cpu_adam, target, precision, dtype, cls, seed):
    """With sizes around its pieces, some params without a grad to add, on one thread and on several."""
    if dtype == torch.float32:
        precision = {key: value for key, value in precision.items() if key in ("amsgrad",)}
    if cls is FusedAdam:
        precision = {key: value for key, value in precision.items() if key in ("amsgrad", "state_dtype")}
    cpu_adam.use_target(target)
    draw = random.Random(seed)
    sizes = [1, 255, 256, 257, 4096, draw.randrange(1, 50_000), 3]
    params, added_dtype = params_with_sums(sizes, dtype), draw.choice(DTYPES)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    ours, theirs = cls(params, lr=0.1, **precision), cls(twins, lr=0.1, **precision)
    for _ in range(3):
        to_add = {i: torch.randn(size).to(added_dtype) for i, size in enumerate(sizes) if draw.random() < 0.8}
        to_add = to_add or {0: torch.randn(1)}
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            param.grad.normal_()
            if dtype != torch.float32:
                twin.grad_dtype = torch.float32
            twin.grad = param.grad + to_add[i].float() if i in to_add else param.grad.clone()
        before = [param.grad.clone() for param in params]
        given = {i: grad.clone() for i, grad in to_add.items()}

        def add(step, to_add=to_add):
            assert step.adds_to_grads([params[i].grad for i in to_add], list(to_add.values()))

        ours._step_params(0, 0, len(params), before=add)
        theirs.step()
        assert all(map(torch.equal, params, twins))
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))
        assert all(torch.equal(to_add[i], given[i]) for i in to_add)
    ours.step()  # nothing is left that would be added
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.clone()
    theirs.step()
    assert all(map(torch.equal, params, twins))


def table_of(params):
    optimizer = DeepSpeedCPUAdam(params)
    held = []
    optimizer._step_params(0, 0, len(params), before=held.append)
    for param in params:
        param.grad = torch.ones_like(param)
    taken = []

    def take(step):
        taken.append(step.updates[0][1].table)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        optimizer._step_params(0, 0, len(params), before=take)
    return optimizer, taken[0]


def test_what_the_op_refuses_to_add(seed):
    params = [nn.Parameter(torch.randn(10)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer, table = table_of(params)
    address, other = params[0].grad.data_ptr(), torch.ones(10)
    assert not table.add_to_grads([other.data_ptr()], [other.data_ptr()], [0])
    with pytest.raises(ValueError, match="added_dtypes is 99, which is no dtype"):
        table.add_to_grads([address], [other.data_ptr()], [99])
    assert table.add_to_grads([address], [other.data_ptr()], [0])
    module = optimizer._backends[torch.device("cpu")].module
    settings = optimizer._step_settings(optimizer.param_groups[0], "param group 0", zero_grads=True)
    call = optimizer._backends[torch.device("cpu")]._call(table, settings)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="a step cannot zero grads that it adds up"):
        module.steps([call])
    assert all(map(torch.equal, params, before))


def test_a_grad_in_16_bits_is_no_sum(seed):
    param = nn.Parameter(torch.randn(10).bfloat16())
    param.grad = torch.ones_like(param)
    _, table = table_of([param])
    assert not table.add_to_grads([param.grad.data_ptr()], [param.grad.data_ptr()], [1])


def test_a_backend_without_it_says_no(seed):
    assert TorchBackend.adds_in_step(None, None, [], []) is False


# The pipeline ---------------------------------------------------------------------------------------------------------


def accumulated(device, accumulate=3, **settings):
    """A model and an offloaded optimizer that updates in its backward passes; and their twins."""
    model, twin = small_model(device)
    settings = {"lr": 0.1, "state_dtype": "8bit", "master_weight_bits": 24} | settings
    ours = offloaded(model.parameters(), device, accumulate=accumulate, update_in_backward=True, **settings)
    settings.pop("chunk_mb", None)
    return model, twin, ours, DeepSpeedCPUAdam(twin.parameters(), **settings), capture(model, twin, accumulate)


@pytest.fixture
def sums_apart(monkeypatch):
    """The grads that were added in passes of their own."""
    added, add_grad = [], NativeBackend.add_grad

    def recorded(self, total, grad, is_first, threads):
        added.append(is_first)
        add_grad(self, total, grad, is_first, threads)

    monkeypatch.setattr(NativeBackend, "add_grad", recorded)
    return added


@needs_grad_dtype
@pytest.mark.parametrize("chunk_mb", [1e-6, 32])
def test_the_last_grads_are_added_by_the_update(device, chunk_mb, sums_apart, seed):
    model, twin, ours, theirs, sums = accumulated(device, chunk_mb=chunk_mb)
    for _ in range(3):
        for _ in range(3):
            backward(model)
        ours.step()
        give(sums)
        theirs.step()
        assert_same_params(model, twin)
        assert sorted(sums_apart) == [False] * 4 + [True] * 4  # of four params, the first and second of three grads
        sums_apart.clear()
        ours.zero_grad()
    assert_same_state(ours.state_dict(), theirs.state_dict())


@needs_grad_dtype
@pytest.mark.parametrize("op_adds", [True, False])
def test_a_failed_update_adds_up_once(device, op_adds, sums_apart, monkeypatch, seed):
    """Also where the sums are formed before the update, as the op cannot."""
    model, twin, ours, theirs, sums = accumulated(device, 2, chunk_mb=1e-6)
    update, failing = DeepSpeedCPUAdam._step_params, [True, True]

    def fails_twice(self, group_index, begin, end, settings, before):
        def fails_after(step):
            before(step)
            if failing:
                failing.pop()
                raise MemoryError("no memory")

        update(self, group_index, begin, end, settings, before=fails_after)

    monkeypatch.setattr(DeepSpeedCPUAdam, "_step_params", fails_twice)
    if not op_adds:
        monkeypatch.setattr(NativeBackend, "adds_in_step", lambda *_: False)
    for _ in range(2):
        backward(model)
    with pytest.raises(MemoryError):
        ours.step()
    ours.step()
    give(sums)
    theirs.step()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert sorted(sums_apart) == ([] if op_adds else [False] * 4) + [True] * 4


@needs_grad_dtype
def test_a_grad_after_the_one_that_was_left_to_the_update(device, seed):
    """A layer that is used in more passes than `accumulate` says, before the others have their grads."""
    model, twin, ours, theirs, sums = accumulated(device, 2)
    for _ in range(2):
        for _ in range(3):
            model[0](torch.randn(6, 8).to(model[0].weight)).float().square().mean().backward()
        ours.step()
        give(sums)
        theirs.step()
        theirs.zero_grad()
    assert_same_params(model, twin)
    assert_same_state(ours.state_dict(), theirs.state_dict())


@needs_grad_dtype
@pytest.mark.parametrize("to_none", [True, False])
def test_zeroed_grads_are_not_added(device, to_none, seed):
    model, twin, ours, theirs, sums = accumulated(device, 2)
    for _ in range(2):
        model[0](torch.randn(6, 8).to(model[0].weight)).float().square().mean().backward()
    ours.zero_grad(set_to_none=to_none)
    sums.clear()
    for _ in range(2):
        backward(model)
    ours.step()
    give(sums)
    theirs.step()
    assert_same_params(model, twin)


# Passes of a step that is open ----------------------------------------------------------------------------------------


@needs_grad_dtype
def test_a_layer_that_is_frozen_between_passes_is_updated_in_step(device, seed):
    """It has a grad, so its update writes it: not while a checkpoint of the backward pass may read it again."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)])
    twin = copy.deepcopy(model)
    model.to(place_of(device))
    settings = {"lr": 0.1, "weight_decay": 0.5}
    ours = offloaded(
        [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[1].parameters()]}],
        device,
        accumulate=2,
        update_in_backward=True,
        **settings,
    )
    theirs = DeepSpeedCPUAdam(
        [{"params": twin[0].parameters()}, {"params": [*twin[2].parameters(), *twin[1].parameters()]}], **settings
    )
    x = torch.randn(5, 8)
    for param in model[2].parameters():
        param.register_post_accumulate_grad_hook(lambda _: time.sleep(0.02))  # time for an update
    for each in (model, twin):
        for _ in range(2):
            h = each[0](x.to(each[0].weight))
            h = checkpoint(lambda h, layer=each[1]: layer(h.tanh()), h, use_reentrant=False)
            each[2](h.sin()).square().mean().backward()
            each[1].requires_grad_(False)
    ours.step()
    theirs.step()
    assert_same_params(model, twin)


def test_a_group_that_is_added_between_passes(device, seed):
    models = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))]
    models.append(copy.deepcopy(models[0]))
    models[0].to(place_of(device))
    makers = functools.partial(offloaded, device=device, update_in_backward=True), DeepSpeedCPUAdam
    for model, make in zip(models, makers, strict=True):
        optimizer = make(model[0].parameters(), lr=0.1)
        x = torch.ones(2, 3).to(model[0].weight)
        model[0](x).sum().backward()
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.01})
        model[1](x).sum().backward()
        optimizer.step()
    assert_same_params(*models)


@pytest.mark.parametrize("call", range(1, 9))
def test_ctrl_c_in_a_step_leaves_it_closed_or_open(call, seed):
    """With update_in_backward, as the rest is submitted: the next backward pass works if all is on its way."""
    device = Interrupts()
    model, twin = small_model(device)
    ours = offloaded(model.parameters(), device, chunk_mb=1e-6, update_in_backward=True)
    theirs = DeepSpeedCPUAdam(twin.parameters())
    sums = capture(model, twin)
    model[0](torch.randn(6, 8).to(model[0].weight)).sum().backward()
    give(sums)
    for each in (model, twin):
        each[2].weight.grad = torch.ones_like(each[2].weight)
    device.left = call
    with contextlib.suppress(KeyboardInterrupt):
        ours.step()
    device.left = 0
    ours.wait()
    theirs.step()
    if not torch.equal(model[2].weight, twin[2].weight):  # it came before
        ours.step()
    assert_same_params(model, twin)
    grads_for(model, twin)
    ours.step()
    theirs.step()
    assert_same_params(model, twin)


class Interrupts(InOrder):
    """A device whose `left`th event is recorded while Ctrl-C arrives."""

    left = 0

    def record(self, stream):
        self.left -= 1
        if self.left == 0 and threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        return stream

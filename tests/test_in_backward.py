"""Params updated inside the backward pass, and copies of params written by the step."""

import copy
import functools
import gc
import io
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import adamops
from adamops import DeepSpeedCPUAdam
from adamops.optim import backward, data_parallel


def new_model():
    return nn.Sequential(nn.Linear(20, 300), nn.GELU(), nn.Linear(300, 5))


def model_and_twin(dtype=torch.float32, make=new_model):
    model = make().to(dtype)
    return model, copy.deepcopy(model)


def loss_of(model, x):
    return model(x).float().square().mean()


def assert_equal(model, twin):
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


KINDS = [{}, {"state_dtype": "8bit", "stochastic_rounding": True}, {"state_dtype": "8bit", "master_weight_bits": 24}]


@pytest.mark.parametrize("arguments", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_backward_have_the_bits_of_steps_after_it(Adam, arguments, dtype):
    model, twin = model_and_twin(dtype)
    optimizers = []
    for one in (model, twin):
        groups = [{"params": one[0].parameters(), "lr": 1e-2}, {"params": one[2].parameters()}]
        optimizers.append(Adam(groups, **arguments))
    handle = adamops.step_in_backward(model, optimizers[0])
    for _ in range(4):
        x = torch.randn(8, 20, dtype=dtype)
        loss_of(model, x).backward()
        assert all(param.grad is None for param in model.parameters())
        optimizers[0].step()  # has nothing to do
        loss_of(twin, x).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert_equal(model, twin)
    handle.remove()
    loss_of(model, x).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_grads_add_up_where_it_is_asked_for(Adam):
    """Also that of a layer which the last pass does not use."""

    def make():
        return nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    model, twin = model_and_twin(make=make)
    ours, theirs = Adam(model.parameters()), Adam(twin.parameters())
    handle = adamops.step_in_backward(model, ours)
    batches = torch.randn(3, 4, 8)
    with handle.accumulate():
        for x in batches[:2]:
            model[1](model[0](x)).square().mean().backward()
    assert not ours.state
    model[0](batches[2]).square().mean().backward()
    for x in batches[:2]:
        twin[1](twin[0](x)).square().mean().backward()
    twin[0](batches[2]).square().mean().backward()
    theirs.step()
    assert_equal(model, twin)
    assert all(param.grad is None for param in model.parameters())


def test_most_grads_never_exist_at_once():
    model = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(10)))
    handle = adamops.step_in_backward(model, DeepSpeedCPUAdam(model.parameters()))
    most = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(torch.randn(4, 200)).square().mean().backward()
    assert len(most) == 10 and max(most) <= 1
    handle.remove()


# Params that get their grads in several parts


class SharedLayers(nn.Module):
    """`a` runs twice, and its weight is that of `b` too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(8, 8) for _ in range(3))
        self.b.weight = self.a.weight


def plainly(model, x):
    return model.head(model.b(model.a(model.a(x).tanh()).tanh()))


def checkpointed(model, x, use_reentrant):
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    x = x.clone().requires_grad_()
    for _ in range(2):
        x = run(lambda t: model.a(t).tanh(), x)
    return model.head(run(model.b, x))


def checkpointed_twice(model, x):
    """Checkpoints in checkpoints, so that graph tasks lie in each other three deep."""
    run = functools.partial(checkpoint, use_reentrant=True)

    def inner(t):
        return model.a(t).tanh()

    def outer(t):
        return run(inner, model.b(run(inner, t)))

    x = x.clone().requires_grad_()
    return model.head(run(outer, run(outer, x)))


FORWARDS = {
    "tied": plainly,
    "checkpoint": functools.partial(checkpointed, use_reentrant=False),
    "reentrant checkpoint": functools.partial(checkpointed, use_reentrant=True),
    "reentrant checkpoints in each other": checkpointed_twice,
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_param_used_several_times_is_updated_once_with_its_whole_grad(Adam, forward):
    model, twin = model_and_twin(make=SharedLayers)
    ours, theirs = Adam(model.parameters(), lr=1e-2), Adam(twin.parameters(), lr=1e-2)
    passes = []
    ours.register_step_post_hook(lambda *_: passes.append(1))
    adamops.step_in_backward(model, ours)
    for i in range(3):
        x = torch.randn(4, 8)
        for one in (model, twin):
            FORWARDS[forward](one, x).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        assert_equal(model, twin)
        assert len(passes) == i + 1
        assert all(param.grad is None for param in model.parameters())


def test_a_second_grad_after_the_update_is_an_error(Adam):
    """The weight gets a part of its grad from the pass itself, and another from one nested in it."""
    model = SharedLayers()
    adamops.step_in_backward(model, Adam(model.parameters()))
    x = checkpoint(lambda t: model.a(t).tanh(), torch.randn(4, 8, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"The param 'a.weight' got a second grad in one backward pass.*use_reentr"):
        model.b(x).square().mean().backward()


# What belongs to a step


@pytest.mark.parametrize("stepping", ["no step()", "step()", "step(closure)"])
@pytest.mark.parametrize("globally", [False, True])
def test_post_hooks_run_once_a_pass_when_all_params_are_updated(Adam, globally, stepping):
    model, _ = model_and_twin()
    optimizer = Adam(model.parameters())
    register = register_optimizer_step_post_hook if globally else optimizer.register_step_post_hook
    called = []

    def hook(caller, args, kwargs):
        assert caller is optimizer
        called.append([optimizer.state[param]["step"] for param in model.parameters()])

    hook_handle = register(hook)
    try:
        adamops.step_in_backward(model, optimizer)

        def closure():
            loss = loss_of(model, torch.randn(8, 20))
            loss.backward()
            return loss

        for i in range(1, 4):
            if stepping == "step(closure)":
                assert optimizer.step(closure).isfinite()
            else:
                closure()
            if stepping == "step()":
                optimizer.step()
            assert len(called) == i and all(float(step) == i for step in called[-1])
    finally:
        hook_handle.remove()


def test_post_hooks_of_a_step_that_has_work_to_do_run():
    model, _ = model_and_twin()
    other = nn.Parameter(torch.ones(3))
    optimizer = DeepSpeedCPUAdam([*model.parameters(), other])
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    handle = adamops.step_in_backward(model, optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    other.grad = torch.ones(3)
    optimizer.step()
    assert called == [1, 1] and optimizer.state[other]["step"] == 1
    with handle.accumulate():
        loss_of(model, torch.randn(8, 20)).backward()
    optimizer.step()
    assert len(called) == 3 and optimizer.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("globally", [False, True])
def test_pre_hooks_are_refused_before_anything_is_written(Adam, globally):
    model, twin = model_and_twin()
    optimizer = Adam(model.parameters())
    handle = adamops.step_in_backward(model, optimizer)
    register = register_optimizer_step_pre_hook if globally else optimizer.register_step_pre_hook
    hook = register(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="cannot be used with step pre-hooks"):
            loss_of(model, torch.randn(8, 20)).backward()
        assert_equal(model, twin)
        handle.remove()
        with pytest.raises(RuntimeError, match="cannot be used with step pre-hooks"):
            adamops.step_in_backward(model, optimizer)
    finally:
        hook.remove()
    adamops.step_in_backward(model, optimizer)  # what was refused has left nothing


def test_schedulers_do_not_miss_step(Adam):
    model, twin = model_and_twin()
    ours, theirs = Adam(model.parameters(), lr=1e-2), Adam(twin.parameters(), lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, theirs)]
    adamops.step_in_backward(model, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            x = torch.randn(8, 20)
            loss_of(model, x).backward()
            loss_of(twin, x).backward()
            theirs.step()
            theirs.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    assert_equal(model, twin)


def test_what_needs_all_grads_is_refused_in_words(Adam):
    model, twin = model_and_twin()
    optimizer = Adam(model.parameters())
    handle = adamops.step_in_backward(model, optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) cannot be used while adamops.step_in_backward\(\) up"):
        optimizer.clip_grad_norm_(1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(
        RuntimeError, match=r"torch.amp.GradScaler cannot be used while adamops.step_in_backward\(\) up"
    ):
        scaler.step(optimizer)
    before = copy.deepcopy(model)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="cannot be used with a scaled loss"):
        loss_of(model, torch.randn(8, 20)).backward()
    assert_equal(model, before)
    handle.remove()
    with pytest.raises(RuntimeError, match="cannot be used with a scaled loss"):
        adamops.step_in_backward(model, optimizer)
    del optimizer.grad_scale
    model.zero_grad()
    loss_of(model, torch.randn(8, 20)).backward()
    assert optimizer.clip_grad_norm_(1.0).isfinite()
    scaler.step(optimizer)


def test_other_methods_of_the_optimizer_change_nothing(Adam):
    model, twin = model_and_twin()
    ours, theirs = Adam(model.parameters()), Adam(twin.parameters())
    adamops.step_in_backward(model, ours)
    for _ in range(3):
        x = torch.randn(8, 20)
        loss_of(model, x).backward()
        ours.step_async().wait()
        ours.zero_grad()
        ours.load_state_dict(ours.state_dict())
        loss_of(twin, x).backward()
        theirs.step()
        theirs.zero_grad()
    assert_equal(model, twin)
    assert all(float(state["step"]) == 3 for state in ours.state.values())


# Params that come later


def test_thawed_layers_are_updated(Adam):
    """Layers frozen at first, then those alone that were frozen."""
    model, twin = model_and_twin()
    ours, theirs = Adam(model.parameters()), Adam(twin.parameters())
    for one in (model, twin):
        one[0].requires_grad_(False)
    adamops.step_in_backward(model, ours)
    assert not model[0].weight.requires_grad
    for thawed in (False, True):
        for one in (model, twin):
            one[0].requires_grad_(thawed)
            one[2].requires_grad_(not thawed)
        x = torch.randn(8, 20)
        loss_of(model, x).backward()
        loss_of(twin, x).backward()
        theirs.step()
        theirs.zero_grad()
        assert_equal(model, twin)
        assert (model[0].weight in ours.state) == thawed


def test_a_thawed_layer_has_to_be_in_the_optimizer(Adam):
    model, twin = model_and_twin()
    model[0].requires_grad_(False)
    optimizer = Adam(model[2].parameters())
    adamops.step_in_backward(model, optimizer)
    model[0].requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"does not have the param '0\.(weight|bias)' .* requires grads now; add it by add_p"
    ):
        loss_of(model, torch.randn(8, 20)).backward()
    model.zero_grad()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    loss_of(model, torch.randn(8, 20)).backward()
    assert not torch.equal(model[0].weight, twin[0].weight) and model[0].weight.grad is None


def test_layers_added_to_model_and_optimizer_are_updated(Adam):
    model, _ = model_and_twin()
    optimizer = Adam(model.parameters())
    adamops.step_in_backward(model, optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    model.append(nn.Linear(5, 2))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    for _ in range(2):
        loss_of(model, torch.randn(8, 20)).backward()
    assert float(optimizer.state[model[3].weight]["step"]) == 2 and float(optimizer.state[model[0].weight]["step"]) == 3
    assert all(param.grad is None for param in model.parameters())


def test_frozen_params_that_cannot_have_grads_are_left_alone():
    model = nn.Linear(4, 4)
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with torch.inference_mode():
        model.register_parameter("made_in_inference", nn.Parameter(torch.zeros(4), requires_grad=False))
    trained = [model.weight, model.bias]
    adamops.step_in_backward(model, DeepSpeedCPUAdam(trained))
    model(torch.randn(2, 4)).sum().backward()
    assert all(param.grad is None for param in trained)


# Errors, and the end


def test_an_error_names_the_param_and_leaves_it_as_it_was(Adam):
    model, twin = model_and_twin()
    ours, theirs = Adam(model.parameters()), Adam(twin.parameters())
    adamops.step_in_backward(model, ours)
    x = torch.randn(8, 20)
    for one, optimizer in ((model, ours), (twin, theirs)):
        loss_of(one, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = ours.state[model[0].weight]["exp_avg"]
    ours.state[model[0].weight]["exp_avg"] = torch.zeros(3)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="param group 0, param 0 .*exp_avg"):
        loss_of(model, x).backward()
    assert torch.equal(model[0].weight, before[0].weight)
    ours.state[model[0].weight]["exp_avg"] = kept
    ours.state[model[2].weight]["exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match="param group 0, param 2 .*exp_avg_sq"):
        loss_of(model, x).backward()


@pytest.mark.smoke
def test_training_goes_on_after_an_error():
    model, twin = model_and_twin()
    ours, theirs = DeepSpeedCPUAdam(model.parameters()), DeepSpeedCPUAdam(twin.parameters())
    adamops.step_in_backward(model, ours)
    ours.param_groups[0]["betas"] = (2.0, 0.9)
    with pytest.raises(ValueError, match="Invalid beta parameter"):
        loss_of(model, torch.randn(8, 20)).backward()
    assert_equal(model, twin)
    ours.param_groups[0]["betas"] = (0.9, 0.999)
    ours.zero_grad()
    x = torch.randn(8, 20)
    loss_of(model, x).backward()
    loss_of(twin, x).backward()
    theirs.step()
    assert_equal(model, twin)


def test_what_cannot_step_in_backward_is_refused():
    model, _ = model_and_twin()
    with pytest.raises(TypeError, match="takes an optimizer of adamops, not SGD"):
        adamops.step_in_backward(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="does not have the param '2.weight' of the model"):
        adamops.step_in_backward(model, DeepSpeedCPUAdam(model[0].parameters()))


@pytest.mark.parametrize(("module", "name"), data_parallel._WRAPPERS[1:])
def test_other_wrappers_that_average_grads_are_refused(monkeypatch, module, name):
    """Stand-ins of their names; the real ones are wrapped around models in tests/frameworks."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: Wrapper}))
    model, _ = model_and_twin()
    optimizer = DeepSpeedCPUAdam(model.parameters())
    with pytest.raises(RuntimeError, match="cannot be used with Wrapper, which averages grads over processes"):
        adamops.step_in_backward(Wrapper(model), optimizer)
    handle = adamops.step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="cannot be used with Wrapper, which averages grads over processes"):
        Wrapper(model)
    handle.remove()
    Wrapper(model)


def test_a_failed_call_leaves_no_hooks(monkeypatch):
    model, _ = model_and_twin()
    optimizer = DeepSpeedCPUAdam(model.parameters())

    def fail(hook):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model[2].weight, "register_post_accumulate_grad_hook", fail, raising=False)
    with pytest.raises(RuntimeError, match="no hooks here"):
        adamops.step_in_backward(model, optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    assert all(param.grad is not None for param in model.parameters())
    assert optimizer.clip_grad_norm_(1.0).isfinite()
    monkeypatch.undo()
    adamops.step_in_backward(model, optimizer)


def test_hooks_are_put_on_params_once():
    model, _ = model_and_twin()
    optimizer = DeepSpeedCPUAdam(model.parameters())
    handle = adamops.step_in_backward(model, optimizer)
    for part in (model, model[2]):
        with pytest.raises(ValueError, match=r"was called for the param '(0\.)?weight' before; call remove\(\)"):
            adamops.step_in_backward(part, optimizer)
    handle.remove()
    handle.remove()
    adamops.step_in_backward(model[0], optimizer)
    adamops.step_in_backward(model[2], optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    assert all(state["step"] == 1 for state in optimizer.state.values()) and len(optimizer.state) == 4


def test_memory_is_freed_with_model_optimizer_and_handle(Adam):
    model, _ = model_and_twin()
    optimizer = Adam(model.parameters())
    handle = adamops.step_in_backward(model, optimizer)
    loss_of(model, torch.randn(8, 20)).backward()
    alive = [weakref.ref(thing) for thing in (model[0].weight, optimizer, handle)]
    del model, optimizer, handle
    gc.collect()
    assert [thing() for thing in alive] == [None] * 3


def test_hooks_stay_while_only_a_part_of_the_model_is_kept():
    layer = nn.Linear(4, 4)
    adamops.step_in_backward(nn.Sequential(layer), DeepSpeedCPUAdam(layer.parameters()))
    gc.collect()
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is None and not torch.equal(layer.weight, before)


def test_copies_of_a_model_have_no_hooks():
    model, _ = model_and_twin()
    adamops.step_in_backward(model, DeepSpeedCPUAdam(model.parameters()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_equal(other, model)
        loss_of(other, torch.randn(8, 20)).backward()
        assert all(param.grad is not None for param in other.parameters())
        adamops.step_in_backward(other, DeepSpeedCPUAdam(other.parameters()))


def test_a_grad_that_is_still_being_copied_to_the_host_is_waited_for(Adam, monkeypatch):
    """As CPUOffloadPolicy of torch before 2.13 leaves it to the hook."""
    param = nn.Parameter(torch.ones(5))
    param.device_mesh = SimpleNamespace(device_type="cuda")
    monkeypatch.setattr(backward, "dtensor", SimpleNamespace(is_sharded=lambda tensor: tensor is param))
    stream = SimpleNamespace(synchronize=lambda: param.grad.fill_(1.0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    twin = nn.Parameter(torch.ones(5))
    adamops.step_in_backward(nn.ParameterList([param]), Adam([param]))
    (param * torch.full((5,), torch.nan)).sum().backward()  # what is in the memory before the copy
    twin.grad = torch.ones(5)
    Adam([twin]).step()
    assert torch.equal(param, twin)


# Copies of params


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [{}, {"state_dtype": "8bit"}, {"amsgrad": True}])
def test_copies_in_16_bits_are_those_of_the_new_params(out_dtype, arguments, seed):
    params = [nn.Parameter(torch.randn(*shape)) for shape in ((5000,), (3,), (0,), (40, 30), (7,))]
    params.append(nn.Parameter(torch.randn(30, 40).t()))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    outs = [torch.full_like(p, 7.0, dtype=out_dtype) for p in params]
    outs[1] = None
    ours, theirs = DeepSpeedCPUAdam(params, **arguments), DeepSpeedCPUAdam(twins, **arguments)
    for _ in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param) if len(param) != 7 else None  # one has no grad
            twin.grad = None if param.grad is None else param.grad.clone()
        ours.step(lowp_out=outs, zero_grads=True)
        theirs.step()
        for param, twin, out in zip(params, twins, outs, strict=True):
            assert torch.equal(param, twin)
            assert out is None or torch.equal(out, param.detach().to(out_dtype))


def test_wrong_copies_are_refused_before_anything_is_written(seed):
    param = nn.Parameter(torch.randn(40, 30))
    param.grad = torch.randn(40, 30)
    optimizer, before = DeepSpeedCPUAdam([param]), param.detach().clone()
    with pytest.raises(ValueError, match="lowp_out has 2 entries, expected 1, one for each param"):
        optimizer.step(lowp_out=[None, None])
    with pytest.raises(TypeError, match=r"param group 0, param 0 .* has a lowp_out of torch.float32; use a tensor of"):
        optimizer.step(lowp_out=[torch.zeros(40, 30)])
    with pytest.raises(ValueError, match=r"has a lowp_out of shape \(3,\) on cpu; both must be the param's"):
        optimizer.step(lowp_out=[torch.zeros(3, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match=r"has strides \(30, 1\), its lowp_out \(1, 40\); they must be equal"):
        optimizer.step(lowp_out=[torch.zeros(30, 40, dtype=torch.bfloat16).t()])
    half = nn.Parameter(torch.randn(50).bfloat16())
    half.grad = torch.randn(50).bfloat16()
    with pytest.raises(ValueError, match="share memory"):
        DeepSpeedCPUAdam([half]).step(lowp_out=[half.detach()])
    assert torch.equal(param, before) and not optimizer.state


def test_layers_exchanged_for_as_many_others_are_updated():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=0.1)
    adamops.step_in_backward(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    model[1] = nn.Linear(3, 2)
    optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())
    before = model[1].weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    assert not torch.equal(model[1].weight, before)
    assert all(param.grad is None for param in model.parameters())


def test_a_hook_that_starts_another_backward_pass_is_an_error():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([a, b])
    optimizer = DeepSpeedCPUAdam(model.parameters())
    adamops.step_in_backward(model, optimizer)
    x = torch.randn(3, 4)
    hidden, other = a(x), b(x).square().mean()
    hidden.register_hook(lambda grad: other.backward() and None)
    with pytest.raises(RuntimeError, match="a hook that starts another backward pass"):
        b(hidden).square().mean().backward()


def test_layers_that_were_replaced_are_released():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = DeepSpeedCPUAdam(model.parameters())
    handle, alive = adamops.step_in_backward(model, optimizer), []
    for _ in range(3):
        model(torch.randn(3, 4)).sum().backward()
        alive += map(weakref.ref, model[1].parameters())
        for param in model[1].parameters():
            optimizer.state.pop(param, None)
        model[1] = nn.Linear(4, 4)
        optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())
    model(torch.randn(3, 4)).sum().backward()
    del param
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    handle.remove()

"""torch.amp.GradScaler leaves unscaling, and skipping a step after an overflow, to both optimizers."""

import pytest
import torch

from adamops import DeepSpeedCPUAdam, FusedAdam


def new_model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))


def loss_of(model, seed):
    x = torch.randn(16, 7, generator=torch.Generator().manual_seed(seed))
    return (model(x) ** 2).sum()


def snapshot(model, optimizer):
    tensors = [param.detach().clone() for param in model.parameters()]
    for state in optimizer.state.values():
        tensors += [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    return tensors, [state["step"] for state in optimizer.state.values()]


def assert_same(ours, theirs):
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(Adam, unscale_first, maximize):
    scaled_model, plain_model = new_model(), new_model()
    scaled = Adam(scaled_model.parameters(), maximize=maximize)
    plain = Adam(plain_model.parameters(), maximize=maximize)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        scaled.zero_grad()
        scaler.scale(loss_of(scaled_model, step)).backward()
        if unscale_first:
            scaler.unscale_(scaled)
        grads = [param.grad.clone() for param in scaled_model.parameters()]
        scaler.step(scaled)
        scaler.update()
        assert all(torch.equal(p.grad, g) for p, g in zip(scaled_model.parameters(), grads, strict=True)), "written to"
        plain.zero_grad()
        loss_of(plain_model, step).backward()
        plain.step()
    assert scaler.get_scale() == 2.0**12
    assert_same(snapshot(scaled_model, scaled), snapshot(plain_model, plain))
    assert not hasattr(scaled, "grad_scale") and not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("new_optimizer", [DeepSpeedCPUAdam, FusedAdam])  # test_cuda_backend.py has the GPU's way
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("first_step", [True, False])
def test_a_step_after_an_overflow_is_skipped(new_optimizer, value, first_step):
    model = new_model()
    optimizer = new_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if not first_step:
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    model[0].weight.grad[1, 2] = value
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 2)).backward()
    scaler.step(optimizer)
    assert all(state["step"] == (1 if first_step else 2) for state in optimizer.state.values())


@pytest.mark.parametrize("scale", [0.0, -0.0, torch.inf])
def test_a_scale_that_has_vanished_or_overflown_divides_as_ieee_has_it(Adam, scale):
    """As on a GPU; torch.amp.GradScaler may halve its scale until nothing is left."""
    param, twin = (torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])) for _ in range(2))
    optimizer, plain = Adam([param]), Adam([twin])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor([0.0])
    param.grad = torch.tensor([1.0, -1.0, 0.0])
    twin.grad = param.grad / torch.tensor(scale)
    optimizer.step()
    plain.step()
    assert torch.equal(param.isnan(), twin.isnan()) and torch.equal(param.nan_to_num(), twin.nan_to_num())


def test_any_scale_multiplies_the_grads_by_its_inverse_rounded_once(Adam):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    values, grad, scale = (torch.randn(1000, generator=generator) for _ in range(3))
    param, twin = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    optimizer, plain = Adam([param]), Adam([twin])
    optimizer.grad_scale, optimizer.found_inf = scale[0].abs() + 0.1, torch.tensor([0.0])
    inverse = (1.0 / optimizer.grad_scale.double()).float()
    param.grad, twin.grad = grad, grad * inverse
    optimizer.step()
    plain.step()
    assert torch.equal(param, twin)

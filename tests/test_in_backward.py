"""Params updated inside the backward pass, and copies of params written by the step."""

import pytest
import torch
from torch import nn

import adamops
from adamops import DeepSpeedCPUAdam


def model_and_twin(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(20, 300), nn.GELU(), nn.Linear(300, 5)).to(dtype)
    twin = nn.Sequential(nn.Linear(20, 300), nn.GELU(), nn.Linear(300, 5)).to(dtype)
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.parametrize("arguments", [{}, {"state_dtype": "8bit", "stochastic_rounding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_backward_have_the_bits_of_steps_after_it(arguments, dtype, seed):
    model, twin = model_and_twin(dtype)
    optimizers = []
    for one in (model, twin):
        torch.manual_seed(3)
        groups = [{"params": one[0].parameters(), "lr": 1e-2}, {"params": one[2].parameters()}]
        optimizers.append(DeepSpeedCPUAdam(groups, **arguments))
    handle = adamops.step_in_backward(model, optimizers[0])
    for _ in range(4):
        x = torch.randn(8, 20, dtype=dtype)
        model(x).float().square().mean().backward()
        assert all(param.grad is None for param in model.parameters())
        optimizers[0].step()  # has nothing to do
        twin(x).float().square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
    handle.remove()
    model(x).float().square().mean().backward()
    assert all(param.grad is not None for param in model.parameters())


def test_grads_add_up_where_it_is_asked_for(seed):
    model, twin = model_and_twin()
    ours, theirs = DeepSpeedCPUAdam(model.parameters()), DeepSpeedCPUAdam(twin.parameters())
    handle = adamops.step_in_backward(model, ours)
    batches = torch.randn(3, 8, 20)
    with handle.accumulate():
        for x in batches[:2]:
            model(x).square().mean().backward()
    model(batches[2]).square().mean().backward()
    for x in batches:
        twin(x).square().mean().backward()
    theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_most_grads_never_exist_at_once(seed):
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


def test_what_cannot_step_in_backward_is_refused(seed):
    model, _ = model_and_twin()
    with pytest.raises(TypeError, match="takes DeepSpeedCPUAdam or FusedAdam, not SGD"):
        adamops.step_in_backward(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="does not have the param '2.weight' of the model"):
        adamops.step_in_backward(model, DeepSpeedCPUAdam(model[0].parameters()))


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

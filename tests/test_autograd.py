"""No call hides a write from autograd, which counts the versions of the tensors it has saved."""

import pytest
import torch
from optimizers import EmulatedFusedAdam, state_tensors
from torch.nn import Parameter

import adamops

N = 4096  # the fewest elements that get 8-bit states

LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
}
STEPS = {
    "step": lambda optimizer: optimizer.step(),
    "zero_grads": lambda optimizer: optimizer.step(zero_grads=True),
    "async": lambda optimizer: optimizer.step_async().wait(),
    "async, zero_grads": lambda optimizer: optimizer.step_async(zero_grads=True).wait(),
}


def versions(optimizer, param):
    return [param._version, *(value._version for value in state_tensors(optimizer, param).values())]


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_all_that_a_step_writes_is_counted(PathAdam, states, step, layout):
    settings, dtype = states
    param = Parameter(LAYOUTS[layout](torch.randn(64, N // 64).to(dtype)))
    optimizer = PathAdam([param], **settings)
    before = param._version
    param.grad = torch.randn_like(param)
    STEPS[step](optimizer)  # a first one, which also makes the states
    assert param._version > before
    param.grad = torch.randn_like(param)
    of_step, of_grad = versions(optimizer, param), param.grad._version
    STEPS[step](optimizer)
    assert all(after > before for before, after in zip(of_step, versions(optimizer, param), strict=True))
    assert (param.grad._version > of_grad) == ("zero_grads" in step)


def test_what_a_step_does_not_write_is_not_counted(PathAdam):
    trained, idle = Parameter(torch.randn(8)), Parameter(torch.randn(8))
    optimizer = PathAdam([trained, idle])
    for param in (trained, idle):
        param.grad = torch.randn(8)
    optimizer.step()
    idle.grad = None
    before = versions(optimizer, idle)
    optimizer.step()
    optimizer.clip_grad_norm_(1e-3)
    assert versions(optimizer, idle) == before and trained.grad._version == 0


@pytest.mark.parametrize("step", list(STEPS))
def test_grads_laid_out_otherwise_are_counted_when_they_are_zeroed(PathAdam, step):
    param = Parameter(torch.randn(30, 20))
    optimizer = PathAdam([param])
    param.grad = torch.randn(20, 30).t()
    STEPS[step](optimizer)
    assert (param.grad._version > 0) == ("zero_grads" in step) == (not param.grad.any())


@pytest.mark.parametrize("step", list(STEPS))
def test_copies_in_16_bits_are_counted(PathAdam, step):
    param, out = Parameter(torch.randn(8)), torch.zeros(8, dtype=torch.bfloat16)
    optimizer = PathAdam([param])
    param.grad = torch.randn(8)
    before = out._version
    if "async" in step:
        optimizer.step_async(lowp_out=[out]).wait()
    else:
        optimizer.step(lowp_out=[out])
    assert out._version > before and torch.equal(out, param.bfloat16())


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_backward_pass_through_weights_that_a_step_changed_raises(PathAdam, step, layout):
    weight = Parameter(LAYOUTS[layout](torch.randn(6, 5)))
    optimizer = PathAdam([weight], lr=0.5)
    inputs = torch.randn(5, requires_grad=True)
    loss = (weight @ inputs).sum()
    loss.backward(retain_graph=True)
    STEPS[step](optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_steps_in_the_backward_pass_are_counted(PathAdam, layout):
    layer = torch.nn.Linear(5, 6)
    layer.weight.data = LAYOUTS[layout](layer.weight.data)
    optimizer = PathAdam(layer.parameters(), lr=0.5)
    adamops.step_in_backward(layer, optimizer)
    inputs = torch.randn(2, 5, requires_grad=True)
    loss = layer(inputs).sum()
    before = layer.weight._version
    loss.backward(retain_graph=True)
    assert layer.weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_have_no_version_and_are_updated(PathAdam):
    with torch.inference_mode():
        param = Parameter(torch.ones(8))
        optimizer = PathAdam([param], lr=0.1)
        param.grad = torch.ones(8)
        for step in STEPS.values():
            step(optimizer)
    assert (param < 1).all()


def test_step_counts_on_the_device_are_written_in_place_too(cuda_op):
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = EmulatedFusedAdam([param], capturable=True)
    for k in range(3):
        param.grad = torch.ones(5)
        before = optimizer.state[param]["step"]._version if k else 0
        optimizer.step()
        assert optimizer.state[param]["step"]._version > before

"""States of bfloat16 train as float32's do, where to the nearest they would forget; float16 is not used for states."""

import pytest
import torch
from optimizers import EmulatedFusedAdam

from adamops import DeepSpeedCPUAdam, FusedAdam

BFLOAT16 = {"state_dtype": torch.bfloat16}


def stepped(make, start, grads, **arguments):
    """A param after a step under each of the grads, and its state."""
    param = torch.nn.Parameter(start.detach().clone())
    optimizer = make([param], **arguments)
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    return param.detach(), optimizer.state[param]


def falling_grads(steps, size):
    return [torch.randn(size) * (1.0 if step < 20 else 1e-3) for step in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
def test_squares_of_large_grads_are_forgotten(cls, dtype):
    """beta2 = 0.999 moves exp_avg_sq by a thousandth, a sixth of what bfloat16 values are apart on average."""
    start, grads = torch.randn(300).to(dtype), falling_grads(1500, 300)
    _, expected = stepped(cls, start, grads, lr=1e-4)
    _, state = stepped(cls, start, grads, lr=1e-4, **BFLOAT16)
    assert state["exp_avg_sq"].dtype == torch.bfloat16
    ratio = state["exp_avg_sq"].float() / expected["exp_avg_sq"]
    assert (ratio - 1).abs().max() < 0.1 and abs(ratio.mean() - 1) < 0.01
    assert (state["exp_avg"].float() - expected["exp_avg"]).norm() < 0.01 * expected["exp_avg"].norm()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
def test_averages_of_equal_grads_are_right_on_average(cls, amsgrad):
    """The nearest bfloat16 stays below the average at a distance that grows with 1 / (1 - beta)."""
    start, grad = torch.zeros(5000), torch.linspace(0.5, 2.0, 5000) ** 3
    signs = torch.where(torch.rand(5000) < 0.5, -1.0, 1.0)
    _, state = stepped(cls, start, [grad * signs] * 3000, lr=1e-4, amsgrad=amsgrad, **BFLOAT16)
    assert ((state["exp_avg"].float() / (grad * signs)).mean() - 1).abs() < 0.01
    squares = state["exp_avg_sq"].float() / (grad**2 * (1 - 0.999**3000))
    assert (squares.mean() - 1).abs() < 0.01 and (squares - 1).abs().max() < 0.03
    if amsgrad:  # a maximum over errors of either sign is a little more, and does not grow on
        largest = state["max_exp_avg_sq"].float() / (grad**2 * (1 - 0.999**3000))
        assert (largest - 1).abs().max() < 0.03


def test_pieces_of_a_param_have_the_bits_of_the_whole(Adam):
    """The noise depends on the step only, so shards, views and groups may cut the elements as they like."""
    start, grads = torch.randn(10_000), torch.randn(5, 10_000)
    whole, state = stepped(Adam, start, grads, amsgrad=True, **BFLOAT16)
    for begin, end in ((0, 1), (1, 37), (37, 4096), (4096, 10_000)):
        piece, its_state = stepped(Adam, start[begin:end], grads[:, begin:end], amsgrad=True, **BFLOAT16)
        assert torch.equal(piece, whole[begin:end])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(its_state[key].view(torch.int16), state[key][begin:end].view(torch.int16))


@pytest.mark.parametrize("grad_size", [1e-3, 1e-5])
def test_16_bit_states_of_float16_params_are_bfloat16(grad_size):
    """In float16 the squares of these grads become zero, and the params run away."""
    start, grads = torch.zeros(5000).half(), [torch.randn(5000) * grad_size for _ in range(10)]
    expected, _ = stepped(DeepSpeedCPUAdam, start, grads)
    param, state = stepped(DeepSpeedCPUAdam, start, grads, fp32_optimizer_states=False)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    torch.testing.assert_close(param, expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16])
def test_float16_states_are_converted_when_they_are_loaded(cls, param_dtype):
    """Those of DeepSpeed, or of an adamops that kept them, rounded to the nearest."""
    param = torch.nn.Parameter(torch.randn(5000).to(param_dtype))
    averages = {key: torch.rand(5000).half() for key in ("exp_avg", "exp_avg_sq")}
    optimizer = cls([param], **BFLOAT16)
    saved = {**optimizer.state_dict(), "state": {0: {"step": 7, **averages}}}
    optimizer.load_state_dict(saved)
    for key, average in averages.items():
        assert torch.equal(optimizer.state[param][key], average.bfloat16())
    other = cls([param])
    other.load_state_dict(saved)
    assert all(torch.equal(other.state[param][key], average.float()) for key, average in averages.items())


@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam, EmulatedFusedAdam])
def test_float16_states_are_refused(cls):
    message = r"Invalid state_dtype: torch.float16, .* params run away; use torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        cls([torch.nn.Parameter(torch.zeros(3))], state_dtype=torch.float16)

"""float32 params with grads of 16 bits, as engines hand over to save a copy: the bits of the widened grads."""

import pytest
import torch

from adamops import DeepSpeedCPUAdam
from adamops.optim import optimizer as optimizer_module
from adamops.optim.backends.torch import TorchBackend

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [0, 1, 33, 5000]


def params_of(sizes):
    return [torch.nn.Parameter(torch.randn(size)) for size in sizes]


def set_grads(params, twins, dtype):
    for param, twin in zip(params, twins, strict=True):
        grad = (torch.randn(param.shape) * 10.0 ** float(torch.randint(-3, 3, ()))).to(dtype)
        if not hasattr(param, "grad_dtype"):
            pytest.skip("before torch 2.10 a float32 param takes no such grad")
        param.grad_dtype = dtype
        param.grad, twin.grad = grad, grad.float()


def assert_same_bits(ours, theirs):
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(param.detach().view(torch.int32), twin.detach().view(torch.int32))
        for name, value in ours.state[param].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs.state[twin][name])), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_grads_of_16_bits_have_the_bits_of_widened_ones(PathAdam, dtype, state_dtype, amsgrad, adamw_mode, seed):
    params = params_of(SIZES)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    options = {"lr": 0.01, "weight_decay": 0.1, "adamw_mode": adamw_mode, "state_dtype": state_dtype}
    ours, theirs = (PathAdam(of, amsgrad=amsgrad, **options) for of in (params, twins))
    for step in range(4):
        set_grads(params, twins, dtype)
        assert torch.equal(ours.clip_grad_norm_(1.0), theirs.clip_grad_norm_(1.0))
        ours.step(zero_grads=step % 2 == 1)
        theirs.step(zero_grads=step % 2 == 1)
    assert_same_bits(ours, theirs)
    assert all(not param.grad.any() and param.grad.dtype == dtype for param in params)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slow_path_takes_them_too(dtype, seed):
    params = [torch.nn.Parameter(torch.randn(70, 90).t())]  # dense, in another order
    twins = [torch.nn.Parameter(params[0].detach().clone())]
    ours, theirs = DeepSpeedCPUAdam(params), DeepSpeedCPUAdam(twins)
    for _ in range(3):
        set_grads(params, twins, dtype)
        ours.step()
        theirs.step()
    assert_same_bits(ours, theirs)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_calls_take_them_too(dtype, monkeypatch, seed):
    monkeypatch.setattr(optimizer_module, "load_backend", lambda rule, device: TorchBackend())
    params = params_of(SIZES)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours, theirs = DeepSpeedCPUAdam(params), DeepSpeedCPUAdam(twins)
    for _ in range(3):
        set_grads(params, twins, dtype)
        ours.step()
        theirs.step()
    assert_same_bits(ours, theirs)


@pytest.mark.smoke
def test_other_dtypes_are_refused_in_words():
    param = torch.nn.Parameter(torch.randn(8))
    if not hasattr(param, "grad_dtype"):
        pytest.skip("before torch 2.10 a float32 param takes no such grad")
    param.grad_dtype = torch.float64
    param.grad = torch.randn(8, dtype=torch.float64)
    with pytest.raises(TypeError, match="param 0 .* has a grad of torch.float64; use torch.float32, torch.bfloat16"):
        DeepSpeedCPUAdam([param]).step()

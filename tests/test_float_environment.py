"""Results do not depend on the calling thread's floating-point environment: flushing of subnormals, rounding mode."""

import contextlib
import copy
import ctypes
import ctypes.util
import platform
import random

import pytest
import torch
from kernel_check import table_of

from adamops import DeepSpeedCPUAdam, op_builder
from adamops.ops.adam.adam import adam_settings
from adamops.optim.backends.cpu import StepCall

MODULE = op_builder.get("cpu_adam").load()
ROUNDING = {
    "x86_64": {"up": 0x800, "down": 0x400, "toward zero": 0xC00},
    "aarch64": {"up": 0x400000, "down": 0x800000, "toward zero": 0xC00000},
}[platform.machine()]  # of C's fenv.h
ENVIRONMENTS = ["flush subnormals", *ROUNDING]


@contextlib.contextmanager
def environment(name):
    """Sets the calling thread's floating-point environment."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    if name == "default":
        yield
    elif name in ROUNDING:
        assert libm.fesetround(ROUNDING[name]) == 0
        try:
            yield
            assert libm.fegetround() == ROUNDING[name]  # as the caller had it
        finally:
            libm.fesetround(0)
    else:
        assert torch.set_flush_denormal(True)
        try:
            yield
            assert (torch.tensor([2.0**-126]) * 0.5).item() == 0.0
        finally:
            torch.set_flush_denormal(False)


def bits(value):
    """A tensor's bits, or of each tensor in a nest of dicts and lists."""
    if isinstance(value, dict):
        return {str(key): bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    return value.detach().flatten().view(torch.uint8).tolist() if isinstance(value, torch.Tensor) else value


def inputs(dtype):
    param = torch.randn(1500).to(dtype)
    grads = [(torch.randn(1500) * 10.0 ** random.randint(-3, 1)).to(dtype) for _ in range(4)]
    for grad in grads:
        grad[:10] = 0.0
        grad[10:20] *= 1e-30
    return param, grads


def test_the_environments_differ():
    """The tests below mean something: each environment changes what pure PyTorch computes."""
    values = torch.tensor([2.0**-126, 1.0, -1.0])
    results = set()
    for name in ["default", *ENVIRONMENTS]:
        with environment(name):
            results.add(str(bits(values * 0.5 + values / 3)))
    assert len(results) == 1 + len(ENVIRONMENTS)


PRECISIONS = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "8bit"}),
    (torch.bfloat16, {"master_weight_bits": 24, "state_dtype": "8bit"}),
    (torch.bfloat16, {"master_weight_bits": 32}),
    (torch.bfloat16, {"stochastic_rounding": True}),
    (torch.float16, {"state_dtype": torch.float32}),
]


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
def test_steps_have_the_same_bits(Adam, name, dtype, precision, seed):  # noqa: N803
    param, grads = inputs(dtype)
    adamw = random.random() < 0.5
    settings = {"lr": 0.0012, "betas": (0.85, 0.983), "eps": 1e-40, "weight_decay": 0.013, "adamw_mode": adamw}

    def train(name):
        torch.manual_seed(seed)
        own = torch.nn.Parameter(param.clone())
        optimizer = Adam([own], amsgrad=True, **settings, **precision)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        with environment(name):
            for grad in grads:
                own.grad = grad
                optimizer.step()
        return bits([own, list(optimizer.state[own].values())])

    assert train(name) == train("default")


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1.0])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norms_and_clipped_steps_have_the_same_bits(Adam, name, scale, norm_type):  # noqa: N803
    param, grad = torch.randn(40_000), torch.randn(40_000) * scale

    def train(name):
        own = torch.nn.Parameter(param.clone())
        own.grad = grad
        optimizer = Adam([own], lr=0.01)
        with environment(name):
            norm = optimizer.clip_grad_norm_(0.37 * scale, norm_type)
            optimizer.step()
        return bits([norm, own])

    assert train(name) == train("default")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_asynchronous_steps_have_the_same_bits(name):
    param, grads = inputs(torch.float32)

    def train(name):
        own = torch.nn.Parameter(param.clone())
        optimizer = DeepSpeedCPUAdam([own], lr=0.0012, eps=1e-40)
        with environment(name):
            for grad in grads:
                own.grad = grad
                optimizer.step_async().wait()
        return bits(own)

    assert train(name) == train("default")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_saving_and_loading_quantized_states_gives_the_same_bits(name):
    """Small enough for torch to do it in the calling thread."""
    param, grads = inputs(torch.bfloat16)
    own = torch.nn.Parameter(param)
    optimizer = DeepSpeedCPUAdam([own], state_dtype="8bit", master_weight_bits=24, eps=1e-40)
    for grad in grads:
        own.grad = grad * 1e-18
        optimizer.step()

    def save_and_load(name):
        other = torch.nn.Parameter(param.detach().clone())
        loaded = DeepSpeedCPUAdam([other], state_dtype="8bit", master_weight_bits=24)
        with environment(name):
            saved = optimizer.state_dict(dequantize=True)
            masters = optimizer.fp32_params()
            loaded.load_state_dict(copy.deepcopy(saved))
            loaded.load_fp32_params([master * 1.0 for master in masters] if name == "default" else masters)
        return bits([saved["state"], masters, list(loaded.state[other].values()), other])

    assert save_and_load(name) == save_and_load("default")


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_the_op_computes_the_scalars_that_python_computes(bias_correction, adamw_mode, maximize):
    """StepSettings.scalars(), which the fallback and rollback use, against csrc/rules/adam.h, by a step each."""
    for _ in range(100):
        settings = adam_settings(
            lr=10 ** random.uniform(-6, 0),
            beta1=random.choice([0.0, 0.9, random.random()]),
            beta2=random.choice([0.0, 0.999, random.random()]),
            eps=10 ** random.uniform(-44, -1),
            weight_decay=random.choice([0.0, 0.1, random.random()]),
            bias_correction=bias_correction,
            adamw_mode=adamw_mode,
            maximize=maximize,
            loss_scale=random.choice([1.0, 65536.0, 0.0, -3.0, random.random()]),
            grad_factor=random.choice([1.0, random.random()]),
        )
        step = random.choice([1, 2, random.randrange(1, 10**4), random.randrange(1, 2**53)])
        start = [torch.randn(64), torch.randn(64), torch.randn(64), torch.rand(64)]
        results = []
        for from_rows in (False, True):
            columns = [tensor.clone() for tensor in start]
            table = table_of(MODULE, [[tensor.data_ptr()] for tensor in columns], [64], (0, 0, 0), [step])
            if from_rows:
                mode = int(not adamw_mode and settings.hyper[4] != 0)  # L2
                MODULE.step_with_scalars(table, [settings.scalars(step)], mode, 1)
            else:
                factors = settings.loss_scale, settings.grad_factor, maximize
                MODULE.steps([StepCall(table, settings.numbers(), *factors, False, False, 1)])
            results.append([torch.where(tensor.isnan(), torch.inf, tensor) for tensor in columns])
        assert bits(results[0]) == bits(results[1]), (settings.hyper, step)

"""torchao's CPUOffloadOptimizer with our classes: params on a GPU, one optimizer on the CPU for each of them.

It insists on a GPU. Where there is none, its Python runs here with host memory for the memory of the GPU, and streams
that do nothing, as all is done at once.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from twins import assert_equal, assert_trained_alike, twin_models

from adamops import DeepSpeedCPUAdam, FusedAdam

cpu_offload = pytest.importorskip("torchao.optim.cpu_offload")

pytestmark = pytest.mark.frameworks

LR, STEPS = 1e-2, 5
CLASSES = [DeepSpeedCPUAdam, FusedAdam]


class Stream:
    """A stream, and an event of it, of a device that does each thing when it is told."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


class TorchWithGPU:
    """torch with a stand-in for torch.cuda, and memory that is not pinned, as that takes a driver."""

    class cuda:  # noqa: N801
        Stream = Stream
        current_stream = Stream

        @staticmethod
        def stream(_):
            return contextlib.nullcontext()

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty_like(tensor, pin_memory=False, **kwargs):
        return torch.empty_like(tensor, **kwargs)


@pytest.fixture
def offload(monkeypatch):
    """The class, on the stand-in."""
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(cpu_offload, "torch", TorchWithGPU())
    return cpu_offload.CPUOffloadOptimizer


def new_model():
    return nn.Sequential(nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 90), nn.Tanh(), nn.Linear(90, 1))


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("minimal_size", [0, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_has_the_bits_of_the_optimizer_alone(offload, cls, minimal_size, dtype):
    offloaded, plain = twin_models(lambda: new_model().to(dtype))
    a = offload(offloaded.parameters(), cls, lr=LR, weight_decay=0.1, minimal_size=minimal_size)
    b = cls(plain.parameters(), lr=LR, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (a, b)]
    for _ in range(STEPS):
        x = torch.randn(8, 6, dtype=dtype)
        train(offloaded, a, x)
        train(plain, b, x)
        for schedule in schedules:
            schedule.step()
    assert_equal(offloaded.parameters(), plain.parameters())
    offloaded_params = [param for param in offloaded.parameters() if param.numel() >= minimal_size]
    assert len(a.optim_dict) == len(offloaded_params) and all(type(each) is cls for each in a.optim_dict.values())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
def test_goes_on_from_its_state_dict(offload, cls, settings):
    model = new_model()
    optimizer = offload(model.parameters(), cls, lr=LR, **settings)
    for _ in range(STEPS):
        train(model, optimizer, torch.randn(8, 6))
    other = copy.deepcopy(model)
    for param in other.parameters():
        param.grad = None
    resumed = offload(other.parameters(), cls, lr=0.5, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(STEPS):
        x = torch.randn(8, 6)
        train(model, optimizer, x)
        train(other, resumed, x)
    assert_equal(model.parameters(), other.parameters())


def test_trains_as_with_its_default(offload):
    """By default it takes torch.optim.AdamW(fused=True)."""
    ours, theirs = twin_models(new_model)
    a = offload(ours.parameters(), DeepSpeedCPUAdam, lr=LR, weight_decay=0.01, minimal_size=0)
    b = offload(theirs.parameters(), lr=LR, minimal_size=0)
    for _ in range(STEPS):
        x = torch.randn(8, 6)
        train(ours, a, x)
        train(theirs, b, x)
    assert_trained_alike(ours, theirs, LR)


def test_small_params_stay_on_the_gpu_which_only_fused_adam_takes(offload):
    """Shown with params that have no memory at all: DeepSpeedCPUAdam says what to do."""
    model = nn.Linear(4, 3, device="meta")
    optimizer = offload(model.parameters(), DeepSpeedCPUAdam)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=r"param group 0, param 0 .* is not on the CPU; move the params to the CPU"):
        optimizer.step()


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU")
def test_without_a_gpu_torchao_says_so():
    with pytest.raises(AssertionError, match="CPU Offload currently only supports CUDA & XPU"):
        cpu_offload.CPUOffloadOptimizer(new_model().parameters(), DeepSpeedCPUAdam)

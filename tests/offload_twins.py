"""Models with an offloaded optimizer, twins on the host with a plain one, and devices to offload from."""

import copy
import functools

import pytest
import torch
from torch import nn

from adamops import DeepSpeedCPUAdam
from adamops.offload import OffloadedOptimizer
from adamops.offload.device import CudaDevice
from adamops.offload.host_stand_in import HostStandIn


class InOrder:
    """A device on the host whose copies are torch's own, and done when they are enqueued."""

    pinned_bytes = 0

    def new_stream(self, name):
        return name

    def current_stream(self):
        return "current"

    def record(self, stream):
        return stream

    def wait(self, stream, event):
        pass

    def synchronize(self, event):
        pass

    def download(self, host, device, stream, label):
        host.copy_(device, non_blocking=True)

    def upload(self, device, host, stream, label):
        device.copy_(host, non_blocking=True)

    def keep(self, device, stream):
        pass

    def pinned(self, size):
        return torch.empty(size, dtype=torch.uint8, device="cpu")


DEVICES = ["stand-in", "in order"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


def new_device(kind, seed):
    """A device of a kind; the stand-in's copies are late."""
    if kind == "cuda":
        return CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    return InOrder() if kind == "in order" else HostStandIn.with_random_delays(seed)


def place_of(device):
    """Where params for this device are."""
    return "cuda" if isinstance(device, CudaDevice) else "cpu"


def offloaded(params, device, cls=DeepSpeedCPUAdam, **settings):
    return OffloadedOptimizer(cls, params, device=device, **settings)


def small_model(device=None, dtype=torch.bfloat16):
    """A model on the device, and the same on the host."""
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 4)).to(dtype)
    return model.to(place_of(device)), copy.deepcopy(model)


def loss_of(model):
    param = next(model.parameters())
    return model(torch.randn(6, 8).to(param)).float().square().mean()


def backward(model):
    loss_of(model).backward()


def capture(model, twin, accumulate=1):
    """Has the sums of the grads of backward passes through a model kept for a twin, in float32 if there are several."""
    sums = {}

    def keep(of, grad):
        grad = grad.detach().to("cpu", torch.float32 if accumulate > 1 else grad.dtype, copy=True)
        sums[of] = sums[of] + grad if of in sums else grad

    for param, of in zip(model.parameters(), twin.parameters(), strict=True):
        before = param.requires_grad
        param.requires_grad_(True)
        param.register_hook(functools.partial(keep, of))
        param.requires_grad_(before)
    return sums


def give(sums):
    for param, total in sums.items():
        param.grad = None
        if total.dtype != param.dtype:
            param.grad_dtype = total.dtype
        param.grad = total
    sums.clear()


def grads_for(model, twin):
    """A backward pass of the model, whose grads the twin gets too."""
    sums = capture(model, twin)
    backward(model)
    give(sums)


def assert_same_params(model, twin):
    """The same bits."""
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.detach().cpu(), theirs)


def assert_same_state(ours, theirs):
    """State dicts with the same bits."""
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(ours["state"][index][name]), torch.as_tensor(value)), (index, name)
    assert ours["param_groups"] == theirs["param_groups"]

"""The optimizers of docs/examples on each backend: Lion, SignSGD without states, and Adagrad with one unsigned state.

Each has a reference, written from its paper or taken from torch, which knows nothing of adamops.
"""

import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
from compiled import cache_folder
from optimizers import HOST, OnEmulatedCuda

from adamops.optim.backends.cpu import NativeBackend
from adamops.optim.backends.torch import TorchBackend

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
sys.path += [str(EXAMPLES / "lion"), str(EXAMPLES / "small_rules")]

from adamops_lion.builders import CPULionBuilder, FusedLionBuilder  # noqa: E402
from adamops_lion.lion import Lion  # noqa: E402
from small_rules.adagrad import Adagrad  # noqa: E402
from small_rules.builders import (  # noqa: E402
    CPUAdagradBuilder,
    CPUSignSGDBuilder,
    FusedAdagradBuilder,
    FusedSignSGDBuilder,
)
from small_rules.sign_sgd import SignSGD  # noqa: E402

BUILDERS = {
    Lion: (CPULionBuilder(), FusedLionBuilder()),
    SignSGD: (CPUSignSGDBuilder(), FusedSignSGDBuilder()),
    Adagrad: (CPUAdagradBuilder(), FusedAdagradBuilder()),
}


class ReferenceLion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                m = self.state[param].setdefault("m", torch.zeros_like(param))
                update = m.lerp(param.grad, 1 - group["betas"][0]).sign_()
                m.lerp_(param.grad, 1 - group["betas"][1])
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


class ReferenceSignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(param.grad.sign(), alpha=-group["lr"])


# By optimizer.
REFERENCES = {Lion: ReferenceLion, SignSGD: ReferenceSignSGD, Adagrad: torch.optim.Adagrad}


class OnBackend:
    """Makes an optimizer update params on the CPU by a certain backend; comes before its class."""

    module = None  # to be set, for ops

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._backends[HOST] = self._new_backend()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._backends[HOST] = self._new_backend()


class InPurePyTorch(OnBackend):
    def _new_backend(self):
        return TorchBackend()


class OnCpuOp(OnBackend):
    def _new_backend(self):
        return NativeBackend(self.module)


class OnCpuOpSlowly(OnCpuOp):
    """Every tensor is checked and read from Python."""

    def _new_backend(self):
        backend = super()._new_backend()
        backend._reader = None
        return backend


class OnCudaOp(OnEmulatedCuda):
    pass


class OnCudaOpCapturable(OnEmulatedCuda):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, capturable=True, **kwargs)


WAYS = (InPurePyTorch, OnCpuOp, OnCpuOpSlowly, OnCudaOp, OnCudaOpCapturable)


def optimizer_of(way, cls):
    """The class of the optimizer on a backend; a name in this module, so that its objects can be pickled."""
    name = f"{cls.__name__}{way.__name__}"
    if name not in globals():
        globals()[name] = type(name, (way, cls), {"__module__": __name__, "base": cls, "reference": REFERENCES[cls]})
    return globals()[name]


for _cls in REFERENCES:
    for _way in WAYS:
        optimizer_of(_way, _cls)


def module_of(way, cls):
    """The op that a rule has for a backend, compiled unless that was done before; None in pure PyTorch."""
    cpu, cuda = BUILDERS[cls]
    if issubclass(way, OnEmulatedCuda):
        return cuda_emulation.load(cuda_emulation.build_op(builder=cuda))
    if not issubclass(way, OnCpuOp):
        return None
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAMOPS_CACHE_DIR", str(cache_folder() / "ops"))
        patched.setenv("ADAMOPS_CPU_TARGETS", "baseline")  # test_example.py compares targets
        return cpu.jit_load()

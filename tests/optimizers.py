"""The optimizers under test: DeepSpeedCPUAdam, and FusedAdam on the CPU op and on the emulated CUDA op."""

import contextlib

import torch

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.optim.backends.cuda import CudaBackend
from adamops.optim.backends.torch import TorchBackend
from adamops.optim.settings import to_number

HOST = torch.device("cpu")


class EmulatedBackend(CudaBackend):
    """The CUDA op's backend, on the op that runs on the host: its device is the host, and it has no streams."""

    capturing = False

    def __init__(self, module):
        super().__init__(module, HOST)

    def _stream(self):
        return 0

    def _as_current_device(self):
        return contextlib.nullcontext()

    def _capturing(self):
        return self.capturing


class OnEmulatedCuda:
    """Makes an optimizer take params on the CPU for params on a GPU; comes before its class."""

    module = None  # to be set: the emulated op

    @staticmethod
    def _to_number(value, name, where=""):
        """As a tensor on a GPU, one on the host stays a tensor: it is where the emulated op reads it."""
        number = to_number(value, name, where)
        return value if isinstance(value, torch.Tensor) else number

    def _backend_of(self, param, name):
        if not isinstance(self._backends.get(HOST), EmulatedBackend):
            self._backends[HOST] = EmulatedBackend(self.module)
        return super()._backend_of(param, name)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._backends[HOST] = EmulatedBackend(self.module)


class EmulatedFusedAdam(OnEmulatedCuda, FusedAdam):
    """FusedAdam on the emulated CUDA op."""


def by_deepspeeds_names(cls, **settings):
    """A function that makes a FusedAdam from DeepSpeedCPUAdam's arguments."""

    def make(params, *, adamw_mode=True, **kwargs):
        return cls(params, adam_w_mode=adamw_mode, **settings, **kwargs)

    return make


MAKERS = {
    "DeepSpeedCPUAdam": DeepSpeedCPUAdam,
    "FusedAdam": by_deepspeeds_names(FusedAdam),
    "FusedAdam-CUDA": by_deepspeeds_names(EmulatedFusedAdam),
    "FusedAdam-CUDA-capturable": by_deepspeeds_names(EmulatedFusedAdam, capturable=True),
}


def without_reader(make):
    """Has every tensor checked and read from Python, as where it is not known how torch lays tensors out in memory."""

    def made(*args, **kwargs):
        optimizer = make(*args, **kwargs)
        for backend in optimizer._backends.values():
            backend._reader = None
        return optimizer

    return made


def in_pure_pytorch(make):
    """Has steps done in pure PyTorch, as where no op is compiled."""

    def made(*args, **kwargs):
        optimizer = make(*args, **kwargs)
        optimizer._backends = {HOST: TorchBackend()}
        return optimizer

    return made


# Each class on each op by the fast path; each op by the slow one; and pure PyTorch. On the CPU op both classes have the
# same code on the latter two.
PATHS = {
    **MAKERS,
    **{f"{name}, slow path": without_reader(MAKERS[name]) for name in ("DeepSpeedCPUAdam", "FusedAdam-CUDA")},
    "FusedAdam, pure PyTorch": in_pure_pytorch(MAKERS["FusedAdam"]),
}

# Every kind of states: the settings, and the dtype of the params.
STATES = {
    "float32": ({}, torch.float32),
    "float32, amsgrad": ({"amsgrad": True}, torch.float32),
    "bfloat16": ({"state_dtype": torch.bfloat16}, torch.float32),
    "8bit": ({"state_dtype": "8bit"}, torch.float32),
    "8bit, amsgrad": ({"state_dtype": "8bit", "amsgrad": True}, torch.float32),
    "masters of 24 bits": ({"master_weight_bits": 24}, torch.bfloat16),
    "masters of 32 bits, 8bit": ({"master_weight_bits": 32, "state_dtype": "8bit"}, torch.bfloat16),
}


def state_tensors(optimizer, param):
    """The tensors in the state of a param, without its step count."""
    state = optimizer.state[param]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"}

"""The optimizers under test: DeepSpeedCPUAdam, and FusedAdam on the CPU op and on the emulated CUDA op."""

import contextlib

import torch

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.ops.adam.cuda_backend import CudaBackend

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


class EmulatedFusedAdam(FusedAdam):
    """FusedAdam that takes params in host memory for params on a GPU."""

    module = None  # to be set: the emulated op

    def _backend_of(self, param, name):
        if not isinstance(self._backends.get(HOST), EmulatedBackend):
            self._backends[HOST] = EmulatedBackend(self.module)
        return super()._backend_of(param, name)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._backends[HOST] = EmulatedBackend(self.module)


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

"""Step times on DTensors: fully_shard() on a mesh of this process alone, so that only the step is timed.

Must not know how any optimizer handles DTensors.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adamops import DeepSpeedCPUAdam
from adamops.bench import time_in_rounds

CASES = {"500 x 64": [64] * 500, "100 x 10 000": [10_000] * 100, "10 x 1 M": [1_000_000] * 10}
ROUNDS = 20


class Params(nn.Module):
    """Params of the given sizes, all of which contribute to the output."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])

    def forward(self) -> torch.Tensor:
        """Their sum."""
        return torch.stack([param.sum() for param in self.all]).sum()


def _params(sizes: list[int], sharded: bool) -> list[nn.Parameter]:
    module = Params(sizes)
    if sharded:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    module().backward()
    return list(module.parameters())


def measure() -> dict[str, dict[str, float]]:
    """Median milliseconds of a step, by case and implementation. DeepSpeed's optimizers were not tried on DTensors."""
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for case, sizes in CASES.items():
                settings = {"lr": 1e-3, "weight_decay": 0.01}
                calls: dict[str, Callable[[], object]] = {
                    "adamops": DeepSpeedCPUAdam(_params(sizes, True), **settings).step,
                    "adamops, plain tensors": DeepSpeedCPUAdam(_params(sizes, False), **settings).step,
                    "torch AdamW": torch.optim.AdamW(_params(sizes, True), **settings).step,
                    "torch AdamW, fused": torch.optim.AdamW(_params(sizes, True), **settings, fused=True).step,
                }
                times = time_in_rounds(calls, ROUNDS)
                medians[case] = {name: statistics.median(values) for name, values in times.items()}
        finally:
            dist.destroy_process_group()
    return medians

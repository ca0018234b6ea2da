"""Measures the memory of training with each kind of states and masters, and with steps inside the backward pass.

    python ci/memory.py

Every figure is a process's own memory, resident and peak (VmRSS, VmHWM), minus what it had before the params were
created. Each is measured in a new process; none is computed from sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from adamops import DeepSpeedCPUAdam, OffloadedAdam, step_in_backward
from adamops.offload.host_stand_in import HostStandIn

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """The dtype of params and grads, and the arguments of DeepSpeedCPUAdam (None: torch.optim.AdamW, fused)."""

    dtype: torch.dtype
    settings: dict[str, Any] | None


KINDS = {
    "float32, torch fused": Kind(torch.float32, None),
    "float32": Kind(torch.float32, {}),
    "float32, 8-bit states": Kind(torch.float32, {"state_dtype": "8bit"}),
    "bfloat16, float32 states": Kind(torch.bfloat16, {}),
    "bfloat16, 32-bit masters": Kind(torch.bfloat16, {"master_weight_bits": 32}),
    "bfloat16, 24-bit masters, 8-bit states": Kind(torch.bfloat16, {"master_weight_bits": 24, "state_dtype": "8bit"}),
    "bfloat16, 8-bit states, stochastic rounding": Kind(
        torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "8bit"}
    ),
}


def memory(name: str) -> int:
    """A figure from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def new_optimizer(kind: Kind, params: Any) -> Any:
    """The optimizer of a kind."""
    if kind.settings is None:
        return torch.optim.AdamW(params, fused=True)
    return DeepSpeedCPUAdam(params, **kind.settings)


def of_a_step(name: str, elements: int) -> tuple[int, int]:
    """Bytes kept for a param, its grad and its states, and bytes at the peak."""
    kind = KINDS[name]
    warm = nn.Parameter(torch.ones(64, dtype=kind.dtype))  # what a first step loads must not count
    warm.grad = torch.ones_like(warm)
    new_optimizer(kind, [warm]).step()
    before = memory("VmRSS")
    param = nn.Parameter(torch.full((elements,), 0.5, dtype=kind.dtype))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = new_optimizer(kind, [param])
    for _ in range(STEPS):
        optimizer.step()
    return memory("VmRSS") - before, memory("VmHWM") - before


def of_a_backward_pass(name: str, elements: int) -> tuple[int, int]:
    """Bytes kept and at the peak, for training a model of many layers with steps after or inside the backward pass."""
    width, layers = 1024, max(1, elements // 1024**2)
    torch.ones(8, 8).matmul(torch.ones(8, 8))
    before = memory("VmRSS")
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = DeepSpeedCPUAdam(model.parameters())
    if name == "inside":
        step_in_backward(model, optimizer)
    for _ in range(STEPS):
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmRSS") - before, memory("VmHWM") - before


OFFLOADED = {
    "8-bit states, 24-bit masters": {"state_dtype": "8bit", "master_weight_bits": 24},
    "float32 states, 32-bit masters": {"master_weight_bits": 32},
    "8-bit states, 24-bit masters, sums of grads": {"state_dtype": "8bit", "master_weight_bits": 24, "accumulate": 2},
}


def of_offloading(name: str, elements: int) -> tuple[int, int]:
    """Host bytes for offloaded params of 1 Mi elements, without these and grads, which would be on a device."""

    def train(params: list[nn.Parameter]) -> OffloadedAdam:
        grad = torch.full_like(params[0], 1e-3)
        optimizer = OffloadedAdam(params, device=HostStandIn(), **OFFLOADED[name])
        for _ in range(STEPS):
            for param in params:
                param.grad = grad
                optimizer._send_others()  # and frees it
            optimizer.step()
        return optimizer

    train([nn.Parameter(torch.ones(64).bfloat16())])
    params = [nn.Parameter(torch.full((1024**2,), 0.5).bfloat16()) for _ in range(max(1, elements // 1024**2))]
    before = memory("VmRSS")
    kept = train(params)
    result = memory("VmRSS") - before, memory("VmHWM") - before
    del kept
    return result


MEASURES: dict[str, Callable[[str, int], tuple[int, int]]] = {
    "step": of_a_step,
    "backward": of_a_backward_pass,
    "offloading": of_offloading,
}


def measure(what: str, name: str, elements: int) -> tuple[float, float]:
    """Bytes per param, kept and at the peak, measured in a new process."""
    command = [sys.executable, __file__, "--measure", what, name, "--elements", str(elements)]
    kept, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return kept / elements, peak / elements


def main() -> None:
    """Measures every case, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=int, default=100 * 1024**2, help="params (default: 100 Mi)")
    parser.add_argument("--json", type=Path, help="also write the figures of steps there")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, name = args.measure
        print(json.dumps(MEASURES[what](name, args.elements)))
        return
    cases = [("step", name, name) for name in KINDS]
    cases += [("backward", name, f"a model of float32, steps {name} the backward pass") for name in ("after", "inside")]
    cases += [("offloading", name, f"bfloat16, offloaded: {name}, on the host") for name in OFFLOADED]
    table = Table("bytes per param, grads included", "kept", "peak", title=f"{args.elements:,} params")
    steps = {}
    for what, name, title in cases:
        figures = measure(what, name, args.elements)
        table.add_row(title, *(f"{figure:.2f}" for figure in figures))
        if what == "step":
            steps[title] = [round(figure, 2) for figure in figures]
    Console(highlight=False).print(table, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps({"elements": args.elements, "bytes_per_param": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()

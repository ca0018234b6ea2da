"""What it saves to add the last grads of an accumulation in the update's pass: python ci/grad_sums.py [--elements N]

Two ways in turns, on the same params: the op adds a bfloat16 grad to the sum in float32, and then updates; or it does
both in one pass.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from adamops import DeepSpeedCPUAdam

PRECISIONS = {
    "fp32 states, fp32 params": (torch.float32, {}),
    "fp32 states, 32-bit masters": (torch.bfloat16, {"master_weight_bits": 32}),
    "8-bit states, 24-bit masters": (torch.bfloat16, {"state_dtype": "8bit", "master_weight_bits": 24}),
}


def seconds(elements, rounds, dtype, settings):
    """The times of both ways, in each round."""
    param = nn.Parameter(torch.randn(elements).to(dtype))
    optimizer = DeepSpeedCPUAdam([param], **settings)
    if dtype != torch.float32:
        param.grad_dtype = torch.float32
    param.grad = total = torch.randn(elements)
    grad = torch.randn(elements).bfloat16()
    backend = optimizer._backend_of(param, "the param")

    def in_one_pass():
        optimizer._step_params(0, 0, 1, before=add_in_step)

    def add_in_step(step):
        assert step.adds_to_grads([total], [grad])

    def one_after_another():
        backend.add_grad(total, grad, False, None)
        optimizer._step_params(0, 0, 1)

    ways = [one_after_another, in_one_pass]
    times = []
    for _ in range(rounds + 2):
        row = []
        for way in ways:
            begin = time.perf_counter()
            way()
            row.append(time.perf_counter() - begin)
        times.append(row)
    return times[2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{options.elements / 1e6:.0f} M params; median ms, and the ratio of each round")
    for name, (dtype, settings) in PRECISIONS.items():
        times = seconds(options.elements, options.rounds, dtype, settings)
        apart, together = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        print(f"{name:30} one after another {apart:6.1f}   in one pass {together:6.1f}   {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()

"""Times steps as torchrun's processes take them, ours and torch's fused AdamW in turns. See docs/threads.md.

    torchrun --nproc-per-node 2 ci/torchrun_steps.py
    taskset -c 0 torchrun --nproc-per-node 1 ci/torchrun_steps.py

Each process prints a line: how many threads torch and a step of adamops have, and the median milliseconds of a step.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time

import torch

import adamops
from adamops import threads

ELEMENTS, ROUNDS = 25_000_000, 15


def main() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(2)]
    for param in params:
        param.grad = torch.randn_like(param)
    steps = {
        "adamops": adamops.DeepSpeedCPUAdam(params[:1], lr=1e-3).step,
        "torch fused": torch.optim.AdamW(params[1:], lr=1e-3, fused=True).step,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(ROUNDS + 2):
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            if i >= 2:  # the first creates the states, the second finds them in memory
                times[name].append(1e3 * (time.perf_counter() - start))
    ours, theirs = (statistics.median(times[name]) for name in steps)
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    rank, count = os.environ.get("RANK", "0"), threads.explained()
    sys.stdout.write(
        f"rank {rank}: torch has {torch.get_num_threads()} threads, a step {count.number} ({count.why}); "
        f"adamops {ours:.1f} ms, torch fused {theirs:.1f} ms, {ratio:.2f} x adamops\n"
    )


if __name__ == "__main__":
    main()

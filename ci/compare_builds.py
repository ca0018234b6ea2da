"""Times two builds of adamops against each other: python ci/compare_builds.py BEFORE AFTER [--cases CASE ...]

BEFORE and AFTER are checkouts whose op was built in place. Each runs in its own process, and they alternate round by
round, so that other load on the machine affects both alike. The ratio of a case is the median of its rounds' ratios.
Must use only adamops' public names, because BEFORE may be old.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LARGE = 50_000_000  # elements
# Per case: sizes in elements, dtypes of params and states, steps per round, and number of rounds.
STEADY = {
    "fp32": ([LARGE], "float32", "float32", 1, 41),
    "bf16-params": ([LARGE], "bfloat16", "float32", 1, 41),
    "bf16": ([LARGE], "bfloat16", "bfloat16", 1, 41),
    "8bit": ([LARGE], "float32", "8bit", 1, 41),
    "clip": ([LARGE // 200] * 200, "float32", "float32", 1, 41),
    "many-tensors": ([4000] * 1000, "float32", "float32", 5, 101),
    "many-small": ([100] * 1000, "float32", "float32", 20, 101),
    "small": ([100] * 4, "float32", "float32", 500, 201),
}
MODEL = """
import time, torch
{before_import}
from adamops import DeepSpeedCPUAdam
{after_import}
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
model(torch.randn(32, 64)).square().mean().backward()
{before_step}
DeepSpeedCPUAdam(model.parameters(), 1e-3).step()
{after_step}
"""
START, STOP = "start = time.perf_counter()", "print(1e3 * (time.perf_counter() - start), flush=True); raise SystemExit"
NOTHING = dict.fromkeys(("before_import", "after_import", "before_step", "after_step"), "")
# The cases that are measured in a new process each time.
FRESH = {
    "import": MODEL.format(**NOTHING | {"before_import": START, "after_import": STOP}),
    "first-step": MODEL.format(**NOTHING | {"before_step": START, "after_step": STOP}),
}
FRESH_ROUNDS = 41


def worker(case: str) -> None:
    """Runs one round of steps for each line on stdin, and prints the milliseconds per step."""
    import torch

    from adamops import DeepSpeedCPUAdam

    sizes, param_dtype, state_dtype, steps, _ = STEADY[case]
    if case == "small":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size).to(getattr(torch, param_dtype))) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    dtype = state_dtype if state_dtype == "8bit" else getattr(torch, state_dtype)
    optimizer = DeepSpeedCPUAdam(params, 1e-3, state_dtype=dtype)

    def clip_and_step() -> None:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step(zero_grads=True)

    step: Callable[[], object] = clip_and_step if case == "clip" else optimizer.step
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        print(1e3 * (time.perf_counter() - start) / steps, flush=True)


def environment(tree: Path) -> dict[str, str]:
    """This process's environment, but with the tree's modules, whose bytecode is cached as for an installed package."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**own, "PYTHONPATH": str(tree)}


def steady_rounds(trees: list[Path], case: str) -> list[list[float]]:
    """The times of both builds, round by round."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", case],
            env=environment(tree),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in trees
    ]

    def ask(process: subprocess.Popen[str]) -> float:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        for process in workers:
            assert process.stdout
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{case} cannot be run there")
        return rounds(lambda i: ask(workers[i]), STEADY[case][-1])
    finally:
        for process in workers:
            process.kill()
            process.wait()


def fresh_rounds(trees: list[Path], case: str) -> list[list[float]]:
    """As steady_rounds(), but in a new process each time."""

    def run(i: int) -> float:
        command = [sys.executable, "-c", FRESH[case]]
        done = subprocess.run(command, env=environment(trees[i]), cwd="/", capture_output=True, text=True, check=True)
        return float(done.stdout)

    for i in range(2):  # so that the files are in the page cache
        run(i)
    return rounds(run, FRESH_ROUNDS)


def rounds(run: Callable[[int], float], count: int) -> list[list[float]]:
    """Runs both in every round, in a random order."""
    times = []
    for _ in range(count):
        pair = [0.0, 0.0]
        for i in random.sample(range(2), 2):
            pair[i] = run(i)
        times.append(pair)
    return times


def main() -> None:
    """Prints one line per case."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    cases = [*STEADY, *FRESH]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE", help=", ".join(cases))
    args = parser.parse_args()
    trees = [args.before.resolve(), args.after.resolve()]
    print(f"{'case':14}{'before ms':>12}{'after ms':>12}{'after/before':>14}   of the fastest rounds")
    for case in args.cases:
        times = steady_rounds(trees, case) if case in STEADY else fresh_rounds(trees, case)
        before, after = zip(*times, strict=True)
        ratio = statistics.median(b / a for a, b in times)
        fastest = min(after) / min(before)
        medians = statistics.median(before), statistics.median(after)
        print(f"{case:14}{medians[0]:12.4f}{medians[1]:12.4f}{ratio:14.3f}   {fastest:.3f}", flush=True)


if __name__ == "__main__":
    main()

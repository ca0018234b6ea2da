"""Trains a small transformer with low-precision states and params, and compares the losses with float32's.

    python ci/quality.py --json quality.json --plot docs/quality.png

Text, model and schedule are those of ci/demo.py, with a smaller model. The seed determines a run's initial weights and
batches, so each run has a counterpart in float32. 16-bit params are updated with 16-bit grads, and the model computes
with their values in float32, so that only what the optimizer keeps differs. The loss of a run is the mean over its last
tenth.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from demo import LEARNING_RATE, WEIGHT_DECAY, CharTransformer, Size, Text, final_loss, rate_factor, smoothed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from adamops import DeepSpeedCPUAdam

Runs = dict[int, list[float]]  # the losses of each step, by seed

SIZE = Size(context=64, batch=16, width=96, heads=4, blocks=2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The dtype of params, and the arguments of DeepSpeedCPUAdam (None: torch.optim.AdamW)."""

    param: torch.dtype
    settings: dict[str, Any] | None
    color: str


FP32 = "float32, torch.optim.AdamW"
BARE = "bfloat16, bare"
KINDS = {
    FP32: Kind(torch.float32, None, "#777777"),
    "float32": Kind(torch.float32, {}, "#000000"),
    "float32, bfloat16 states": Kind(torch.float32, {"state_dtype": torch.bfloat16}, "#17a2b8"),
    "float32, 8-bit states": Kind(torch.float32, {"state_dtype": "8bit"}, "#1f4e79"),
    "bfloat16, 24-bit masters": Kind(torch.bfloat16, {"master_weight_bits": 24}, "#2e8b57"),
    "bfloat16, 24-bit masters, 8-bit states": Kind(
        torch.bfloat16, {"master_weight_bits": 24, "state_dtype": "8bit"}, "#8e44ad"
    ),
    "bfloat16, stochastic rounding": Kind(torch.bfloat16, {"stochastic_rounding": True}, "#d9822b"),
    BARE: Kind(torch.bfloat16, {}, "#c0392b"),
}


def train(job: tuple[str, int, int]) -> tuple[str, int, list[float]]:
    """Trains one job (kind, seed, number of steps); returns the kind, the seed and the losses."""
    name, seed, steps = job
    kind = KINDS[name]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text = Text()
    model = CharTransformer(text.vocabulary, SIZE)
    computed = list(model.parameters())
    kept = [nn.Parameter(param.detach().to(kind.param, copy=True)) for param in computed]
    common = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    optimizer: Any
    if kind.settings is None:
        optimizer = torch.optim.AdamW(kept, **common)
    else:
        optimizer = DeepSpeedCPUAdam(kept, **common, **kind.settings)
        optimizer.load_fp32_params([param.detach() for param in computed])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    batches = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            for param, own in zip(computed, kept, strict=True):
                param.copy_(own)
        inputs, targets = text.batch(batches, SIZE)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        for param, own in zip(computed, kept, strict=True):
            own.grad = param.grad.to(own.dtype)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return name, seed, losses


def train_all(names: list[str], seeds: list[int], steps: int, jobs: int) -> dict[str, Runs]:
    """The runs of each kind, by seed; `jobs` runs at a time, in single-threaded processes."""
    todo = [(name, seed, steps) for seed in seeds for name in names]
    runs: dict[str, Runs] = {name: {} for name in names}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, Progress() as progress:
        task = progress.add_task(f"{len(todo)} runs of {steps} steps", total=len(todo))
        for name, seed, losses in pool.imap_unordered(train, todo):
            runs[name][seed] = losses
            progress.advance(task)
    return runs


def mean_loss(runs: Runs) -> float:
    """The mean final loss over the seeds."""
    return statistics.fmean(map(final_loss, runs.values()))


def print_table(runs: dict[str, Runs], console: Console) -> None:
    """Prints each kind's loss, by seed and on average, and how it compares with float32's."""
    reference = mean_loss(runs[FP32])
    seeds = sorted(runs[FP32])
    table = Table("params and states", *(f"seed {seed}" for seed in seeds), "mean", "to float32")
    for name, own in runs.items():
        losses = [f"{final_loss(own[seed]):.4f}" for seed in seeds]
        table.add_row(name, *losses, f"{mean_loss(own):.4f}", f"{100 * (mean_loss(own) / reference - 1):+.2f} %")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table, soft_wrap=True)


def plot(runs: dict[str, Runs], path: Path) -> None:
    """Plots the loss over the steps and, next to it, the final losses relative to float32's with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    for i, (name, own) in enumerate(runs.items()):
        mean = smoothed([statistics.fmean(losses) for losses in zip(*own.values(), strict=True)])
        shown = len(mean) - len(mean) // 50  # beyond that, a mean covers only a few steps
        curves.plot(range(1, shown + 1), mean[:shown], color=KINDS[name].color, linewidth=1.4, label=name)
        relative = [100 * (final_loss(losses) / final_loss(runs[FP32][seed]) - 1) for seed, losses in own.items()]
        ends.plot(relative, [-i] * len(relative), "o", color=KINDS[name].color, alpha=0.6)
        ends.plot(statistics.fmean(relative), -i, "|", color=KINDS[name].color, markersize=24, markeredgewidth=2)
    top = statistics.fmean(losses[len(losses) // 8] for losses in runs[FP32].values())
    floor = min(mean_loss(own) for own in runs.values())
    curves.set(xlabel="step", ylabel="cross-entropy, nats per character", ylim=(0.97 * floor, 1.1 * top))
    curves.set_title("Loss, mean of the seeds", loc="left")
    curves.grid(alpha=0.25)
    curves.legend(frameon=False)
    ends.axvspan(-0.5, 0.5, color="#000000", alpha=0.06)  # a scale, with no other meaning
    ends.set_yticks([-i for i in range(len(runs))], list(runs))
    ends.set(xlabel="% more than float32 with the same seed (grey: ±0.5 %)")
    ends.set_title("Loss at the end; a bar is the mean", loc="left")
    ends.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, prints the table, draws the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="which to compare with the first"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="where to write all losses")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    runs = train_all(list(dict.fromkeys([FP32, *args.kinds])), args.seeds, args.steps, args.jobs)
    print_table(runs, Console(highlight=False))
    if args.json:
        args.json.write_text(json.dumps(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()

"""Trains a character-level transformer on Python's own documentation, with optimizers of torch and of adamops in turns.

Must know nothing of adamops but its optimizers. Exits with status 1 if the loss curves disagree or a model learnt too
little.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

import adamops

SEED = 20240607
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 2e-3, 0.01, 40

# The runs do the same arithmetic except for rounding, which training amplifies. Over the last tenth of the steps,
# losses may differ from those of the first run by this relative amount on average; and each must fall below this part
# of its first value.
AGREEMENT, AGREEMENT_16_BIT = 0.02, 0.06
LEARNT = 0.75

NEXT = f"""
Next: change torch.optim.AdamW to adamops.AdamW in your own code; {sys.executable} -m adamops.bench times both here;
docs/low-precision.md has the options of the last run."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's context in characters, width, attention heads and transformer blocks; and the windows in a batch."""

    context: int
    batch: int
    width: int
    heads: int
    blocks: int


SIZE = Size(context=96, batch=24, width=128, heads=4, blocks=4)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a run trains: an optimizer's class and settings, the dtype of the params, and the color of its curves."""

    optimizer: Callable[..., Optimizer]
    settings: dict[str, Any]
    color: str
    dtype: torch.dtype = torch.float32


KINDS = {
    "torch.optim.AdamW": Kind(torch.optim.AdamW, {}, "#d9822b"),
    "torch.optim.AdamW, fused": Kind(torch.optim.AdamW, {"fused": True}, "#b5382a"),
    "adamops.AdamW": Kind(adamops.AdamW, {}, "#1f4e79"),
    "adamops, bf16, 8-bit states, 24-bit masters": Kind(
        adamops.DeepSpeedCPUAdam, {"state_dtype": "8bit", "master_weight_bits": 24}, "#2a9d8f", torch.bfloat16
    ),
}


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class CharTransformer(nn.Module):
    """A character-level GPT: for each position, the logits of the next character."""

    def __init__(self, characters: int, size: Size = SIZE) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.blocks)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, characters, bias=False)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.token(characters) + self.position.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Text:
    """The documentation behind help(), as token ids, one per character."""

    def __init__(self) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
        characters = sorted(set(text))
        number = {character: i for i, character in enumerate(characters)}
        self.vocabulary = len(characters)
        self.data = torch.tensor([number[character] for character in text])

    def batch(self, generator: torch.Generator, size: Size = SIZE) -> tuple[Tensor, Tensor]:
        """Random windows of the text, and the same windows shifted by one character."""
        starts = torch.randint(len(self.data) - size.context, (size.batch, 1), generator=generator)
        windows = self.data[starts + torch.arange(size.context + 1)]
        return windows[:, :-1], windows[:, 1:]


class Run:
    """A model and its optimizer, whose initial weights and batches depend only on SEED.

    Attributes
    ----------
    losses, step_ms
        The loss of each step, and the milliseconds of each optimizer.step().
    """

    def __init__(self, kind: Kind, text: Text, steps: int) -> None:
        torch.manual_seed(SEED)
        self.text, self.kind = text, kind
        self.model = CharTransformer(text.vocabulary).to(kind.dtype)
        self.batches = torch.Generator().manual_seed(SEED)
        settings = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, **kind.settings}
        self.optimizer = kind.optimizer(self.model.parameters(), **settings)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, steps))
        self.losses: list[float] = []
        self.step_ms: list[float] = []

    def step(self) -> None:
        """Trains on a batch. Whatever the dtype of the params, the model computes in float32."""
        inputs, targets = self.text.batch(self.batches)
        params = {name: param.float() for name, param in self.model.named_parameters()}
        loss = F.cross_entropy(functional_call(self.model, params, inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        start = time.perf_counter()
        self.optimizer.step()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.schedule.step()
        self.losses.append(loss.item())

    def bytes_per_param(self) -> float:
        """Bytes of params, grads and all that the optimizer keeps."""
        params = list(self.model.parameters())
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*params, *(param.grad for param in params), *(value for value in kept if isinstance(value, Tensor))]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        return size / sum(param.numel() for param in params)

    def median_ms(self) -> float:
        """The median time of a step, without the first ones, which make the states."""
        return statistics.median(self.step_ms[2:])


def end_of(losses: list[float]) -> list[float]:
    """Those of the last tenth of the steps."""
    return losses[-max(1, len(losses) // 10) :]


def final_loss(losses: list[float]) -> float:
    """The mean loss at the end."""
    return statistics.fmean(end_of(losses))


def rate_factor(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear warm-up, and half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train_all(text: Text, steps: int, console: Console) -> dict[str, Run]:
    """All runs, step by step in turns of random order, so that no load on the machine falls on one of them."""
    runs = {name: Run(kind, text, steps) for name, kind in KINDS.items()}
    order = random.Random(SEED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[losses]}"), console=console) as progress:
        task = progress.add_task(f"{len(runs)} runs in turns", total=steps, losses="")
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            for run in order.sample(list(runs.values()), len(runs)):
                run.step()
            losses = " ".join(f"{run.losses[-1]:.3f}" for run in runs.values())
            progress.update(task, advance=1, losses=f"losses {losses}")
            if step % 50 == 0 and not console.is_terminal:
                left = (time.perf_counter() - begin) * (steps - step) / step / 60
                print(f"step {step} of {steps}: losses of the batch {losses}, {left:.1f} minutes left", flush=True)
    return runs


def disagreement(run: Run, first: Run) -> float:
    """The mean relative difference between the losses over the last tenth of the steps."""
    return statistics.fmean(
        abs(a - b) / max(abs(a), 1e-9) for a, b in zip(end_of(first.losses), end_of(run.losses), strict=True)
    )


def print_summary(runs: dict[str, Run], console: Console) -> None:
    """Prints the runs below each other."""
    first = next(iter(runs.values())).median_ms()
    table = Table("", "loss", "step, ms", "speed", "bytes", box=None)
    for name, run in runs.items():
        speed, size = f"{first / run.median_ms():.1f} x", f"{run.bytes_per_param():.1f}"
        table.add_row(name, f"{final_loss(run.losses):.3f}", f"{run.median_ms():.2f}", speed, size)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print("loss: the mean of the last tenth of the steps; bytes: of each param, with its grad and states")


def smoothed(values: list[float]) -> list[float]:
    """Means over windows around each step, cut off at the ends. Unlike a running average, they do not lag."""
    half = len(values) // 50
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def plot(runs: dict[str, Run], path: Path) -> None:
    """Plots the loss curves, and next to them the step times and the memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, times, sizes) = pyplot.subplots(
        1, 3, figsize=(14, 5), width_ratios=(2.4, 1, 1), layout="constrained"
    )
    figure.suptitle("adamops beside torch.optim.AdamW: same start, same batches, steps in turns", x=0.01, ha="left")
    for i, run in enumerate(runs.values()):
        steps = range(1, len(run.losses) + 1)
        width = 1.4 + 1.6 * (len(runs) - 1 - i)  # later curves lie on earlier ones
        curves.plot(steps, smoothed(run.losses), color=run.kind.color, linewidth=width, alpha=0.8)
    curves.legend([f"{name}: {final_loss(run.losses):.3f}" for name, run in runs.items()], frameon=False, fontsize=10)
    curves.set(xlabel="step", ylabel="loss: cross-entropy, nats per character", xlim=(0, len(steps)))
    curves.set_title("Loss of each (all coincide), and the mean of its last tenth", loc="left")
    curves.grid(alpha=0.25)

    colors = [run.kind.color for run in runs.values()]
    names = ["torch", "torch\nfused", "adamops", "adamops\nbf16, 8-bit"]
    bars(times, "optimizer.step(), ms", names, [run.median_ms() for run in runs.values()], colors, "{:.2f}")
    memory = [run.bytes_per_param() for run in runs.values()]
    bars(sizes, "Bytes per param, with grads", names, memory, colors, "{:.1f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def bars(axes: Any, title: str, names: list[str], values: list[float], colors: list[str], shown: str) -> None:
    drawn = axes.bar(names, values, color=colors, width=0.65)
    axes.bar_label(drawn, labels=[shown.format(value) for value in values], padding=3)
    axes.set_title(title, loc="left")
    axes.margins(x=0.08, y=0.1)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def verdict(runs: dict[str, Run], console: Console) -> bool:
    """Prints whether the curves agree and the models learnt; returns whether both hold."""
    is_good = True
    first = next(iter(runs.values()))
    for name, run in runs.items():
        allowed = AGREEMENT if run.kind.dtype == torch.float32 else AGREEMENT_16_BIT
        difference = disagreement(run, first)
        if not difference < allowed:
            console.print(
                f"[bold red]{name}: the losses at the end differ by {difference:.1%}[/] (allowed: {allowed:.0%})"
            )
            is_good = False
        if not final_loss(run.losses) < LEARNT * run.losses[0]:
            console.print(f"[bold red]{name} has not learnt:[/] {run.losses[0]:.3f} -> {final_loss(run.losses):.3f}")
            is_good = False
    if is_good:
        console.print(
            f"All learn alike: losses at the end differ by less than {AGREEMENT:.0%} ({AGREEMENT_16_BIT:.0%} in bf16)."
        )
    return is_good


def main() -> int:
    """Trains, compares, prints and plots; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=320, help="of each run (default: 320)")
    default_output = Path(__file__).resolve().parent.parent / "demo_output"
    parser.add_argument("--output", type=Path, default=default_output, help="the folder of the plot")
    args = parser.parse_args()
    if args.steps < 50:
        parser.error("--steps: the model needs 50 or more to learn anything")

    console = Console(highlight=False)
    text = Text()
    params = sum(param.numel() for param in CharTransformer(text.vocabulary).parameters())
    console.print(
        f"{len(text.data):,} characters of the documentation of Python {platform.python_version()}, "
        f"{text.vocabulary} different ones; a transformer of {params:,} params; "
        f"{args.steps} steps of {SIZE.batch} x {SIZE.context} characters; {torch.get_num_threads()} threads"
    )
    runs = train_all(text, args.steps, console)
    print_summary(runs, console)
    path = args.output / "adamops.png"
    plot(runs, path)
    is_good = verdict(runs, console)
    console.print(f"Picture: {path}", soft_wrap=True)
    console.print(NEXT, soft_wrap=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

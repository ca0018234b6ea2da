"""Trains a character-level transformer on Python's own documentation, with torch.optim.AdamW and with DeepSpeedCPUAdam.

Must know nothing of adamops but its optimizer. Exits with status 1 if the loss curves disagree or a model learnt too
little.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adamops import DeepSpeedCPUAdam

SEED = 20240607
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 2e-3, 0.01, 40

# Both runs do the same arithmetic except for rounding in the optimizer, which training amplifies. Over the last tenth
# of the steps, the losses may differ by this relative amount on average, and each must fall below this part of its
# first value.
AGREEMENT = 0.02
LEARNT = 0.75


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's context in characters, width, attention heads and transformer blocks; and the windows in a batch."""

    context: int
    batch: int
    width: int
    heads: int
    blocks: int


SIZE = Size(context=96, batch=24, width=128, heads=4, blocks=4)

Optimizers = dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]]
OPTIMIZERS: Optimizers = {
    "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "DeepSpeedCPUAdam": lambda params: DeepSpeedCPUAdam(params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
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


@dataclasses.dataclass
class Run:
    """The results of one training run: the loss of each step, and the milliseconds of each optimizer.step()."""

    losses: list[float] = dataclasses.field(default_factory=list)
    step_ms: list[float] = dataclasses.field(default_factory=list)

    def end(self) -> list[float]:
        """The losses of the last tenth of the steps."""
        return self.losses[-max(1, len(self.losses) // 10) :]

    def final_loss(self) -> float:
        """The mean loss over the last tenth of the steps."""
        return statistics.fmean(self.end())


def rate_factor(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear warm-up, and half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    text: Text,
    steps: int,
    on_step: Callable[[float], None],
) -> Run:
    """Trains a new model, whose initial weights and batches depend only on SEED. `on_step` gets each step's loss."""
    torch.manual_seed(SEED)
    model = CharTransformer(text.vocabulary)
    batches = torch.Generator().manual_seed(SEED)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    run = Run()
    for _ in range(steps):
        inputs, targets = text.batch(batches)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.perf_counter()
        optimizer.step()
        run.step_ms.append(1e3 * (time.perf_counter() - start))
        schedule.step()
        run.losses.append(loss.item())
        on_step(run.losses[-1])
    return run


def train_all(text: Text, steps: int, console: Console) -> dict[str, Run]:
    """One run per optimizer, each with a progress bar."""
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        tasks = {name: progress.add_task(name, total=steps, loss=math.nan, start=False) for name in OPTIMIZERS}
        runs = {}
        for name, task in tasks.items():
            progress.start_task(task)
            runs[name] = train(
                OPTIMIZERS[name], text, steps, lambda loss, task=task: progress.update(task, advance=1, loss=loss)
            )
    return runs


def disagreement(runs: dict[str, Run]) -> float:
    """The mean relative difference between the losses over the last tenth of the steps."""
    first, second = (run.end() for run in runs.values())
    return statistics.fmean(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(first, second, strict=True))


def print_summary(runs: dict[str, Run], console: Console) -> None:
    """Prints both runs side by side."""
    table = Table("", *runs, title="Loss and time of optimizer.step()", title_justify="left")
    rows: dict[str, Callable[[Run], str]] = {
        "first loss": lambda run: f"{run.losses[0]:.4f}",
        "last loss": lambda run: f"{run.losses[-1]:.4f}",
        "mean of last tenth": lambda run: f"{run.final_loss():.4f}",
        "step, median ms": lambda run: f"{statistics.median(run.step_ms):.3f}",
    }
    for title, value in rows.items():
        table.add_row(title, *(value(run) for run in runs.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)


def smoothed(values: list[float]) -> list[float]:
    """Means over windows centered on each step, narrower near the ends. Unlike a running average, they do not lag."""
    half = len(values) // 50
    reach = (min(half, i, len(values) - 1 - i) for i in range(len(values)))
    return [statistics.fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def plot(runs: dict[str, Run], path: Path) -> None:
    """Plots both loss curves and, next to them, the optimizers' step times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4.8), width_ratios=(3, 1), layout="constrained")
    styles = {"color": "#d9822b", "linewidth": 4, "alpha": 0.55}, {"color": "#1f4e79", "linewidth": 1.6}
    for (name, run), style in zip(runs.items(), styles, strict=True):
        steps = range(1, len(run.losses) + 1)
        curves.plot(steps, run.losses, color=style["color"], linewidth=0.6, alpha=0.25)
        curves.plot(steps, smoothed(run.losses), label=f"{name} (ends at {run.final_loss():.3f})", **style)
    curves.set(xlabel="step", ylabel="cross-entropy, nats per character", xlim=(0, len(steps)))
    curves.set_title("Same start, same batches", loc="left")
    curves.grid(alpha=0.25)
    curves.legend(frameon=False)

    medians = [statistics.median(run.step_ms) for run in runs.values()]
    drawn = bars.bar(["torch.optim\nAdamW", "DeepSpeed\nCPUAdam"], medians, color=["#e9b684", "#1f4e79"], width=0.6)
    bars.bar_label(drawn, labels=[f"{median:.2f} ms" for median in medians], padding=3)
    bars.set_title("Median step time", loc="left")
    bars.margins(x=0.12, y=0.1)
    bars.set_yticks([])
    bars.spines["left"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def verdict(runs: dict[str, Run], console: Console) -> bool:
    """Prints whether the curves agree and the models learnt; returns whether both hold."""
    difference = disagreement(runs)
    agree = difference < AGREEMENT
    console.print(
        f"Over the last tenth the losses differ by {difference:.1e} of their size (allowed: {AGREEMENT:g}): "
        + ("the curves agree." if agree else "[bold red]THE CURVES DO NOT AGREE.[/]")
    )
    learnt = True
    for name, run in runs.items():
        if not run.final_loss() < LEARNT * run.losses[0]:
            console.print(f"[bold red]{name} has not learnt:[/] {run.losses[0]:.3f} -> {run.final_loss():.3f}")
            learnt = False
    return agree and learnt


def main() -> int:
    """Trains, compares, prints and plots; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of each run (default: 500)")
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
    path = args.output / "loss_curves.png"
    plot(runs, path)
    console.print(f"Plot: {path}", soft_wrap=True)
    return 0 if verdict(runs, console) else 1


if __name__ == "__main__":
    sys.exit(main())

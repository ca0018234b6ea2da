"""Step times as in Lightning: its clipping by norm, then the step of its wrapper around the optimizer."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import lightning
import torch
from torch.optim import Optimizer

from adamops.bench import OPTIMIZERS, OURS, new_params, time_in_rounds

MAX_NORM = 1.0
SIZES = [256 * 256] * 60 + [256] * 120  # those of a model with 4 M params
IMPLEMENTATIONS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    OURS: lambda params: OPTIMIZERS[OURS](params, torch.float32),
    "torch.optim.AdamW": torch.optim.AdamW,
    "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
}  # DeepSpeed's crashes: Lightning's wrapper inherits its __del__, which frees what the wrapped optimizer still uses
IN_STEP = f"{OURS}, optimizer.clip_grad_norm_()"


class Times(lightning.LightningModule):
    """Holds all optimizers, and times them in its single training step."""

    automatic_optimization = False

    def __init__(self, clip: bool, rounds: int) -> None:
        super().__init__()
        self.clip, self.rounds = clip, rounds
        self.names: list[str] = []
        self.times: dict[str, list[float]] = {}

    def configure_optimizers(self) -> list[Optimizer]:
        self.names = [*IMPLEMENTATIONS, IN_STEP] if self.clip else [*IMPLEMENTATIONS]
        makers = [IMPLEMENTATIONS.get(name, IMPLEMENTATIONS[OURS]) for name in self.names]
        return [make(new_params(SIZES, torch.float32)) for make in makers]

    def training_step(self, batch: object, batch_idx: int) -> None:
        calls = {
            name: self.call(name, optimizer) for name, optimizer in zip(self.names, self.optimizers(), strict=True)
        }
        self.times = time_in_rounds(calls, self.rounds)

    def call(self, name: str, optimizer: Optimizer) -> Callable[[], None]:
        def step() -> None:
            if name == IN_STEP:
                optimizer.clip_grad_norm_(MAX_NORM)
            elif self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
            optimizer.step()

        return step


def median_times(clip: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step by implementation."""
    module = Times(clip, rounds)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=len(IMPLEMENTATIONS) + 1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([0]))
    return {name: statistics.median(times) for name, times in module.times.items()}


def measure() -> dict[str, dict[str, float]]:
    """Median milliseconds by case and implementation."""
    case = f"{len(SIZES)} tensors, {sum(SIZES) / 1e6:.1f} M"
    return {case: median_times(clip=False, rounds=30), f"{case}, clipped": median_times(clip=True, rounds=30)}

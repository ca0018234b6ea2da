"""Step times in plain torch training loops: torch.optim.AdamW by default, with foreach and fused, and compiled;
DeepSpeed's Adam; and ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adamops.bench import (
    HYPER,
    OURS,
    Unavailable,
    adamops_optimizer,
    deepspeed_optimizer,
    time_in_rounds,
    torch_optimizer,
)

ROUNDS = 15


class Residual(nn.Module):
    """A residual block: two convolutions with batch norms, and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus the output of the convolutions."""
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def convolutional(blocks: int = 24, width: int = 48) -> nn.Module:
    """A residual network: of the six tensors in each residual block, four are tiny."""
    layers = [Residual(width) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def transformer(layers: int = 12, width: int = 192) -> nn.Module:
    """The layers of a small language model, with twelve tensors each."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(32, width), nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional, 28 tensors": (lambda: convolutional(4), (1, 3, 8, 8)),
    "convolutional, 148 tensors": (convolutional, (1, 3, 8, 8)),
    "transformer, 146 tensors": (transformer, (1, 4, 32)),
}
MOST_COMPILED = 50  # tensors: the step is compiled for all of them at once, which takes longer the more there are


def compiled_adamw(params: list[nn.Parameter]) -> Optimizer:
    """AdamW with its step compiled, as torch's documentation shows it."""
    if len(params) > MOST_COMPILED:
        raise Unavailable(f"is compiled here for {MOST_COMPILED} tensors at most")
    optimizer = torch_optimizer("foreach", params, torch.float32)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


IMPLEMENTATIONS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    OURS: lambda params: adamops_optimizer(params, torch.float32),
    "torch default": lambda params: AdamW(params, **HYPER),
    "torch foreach": lambda params: torch_optimizer("foreach", params, torch.float32),
    "torch fused": lambda params: torch_optimizer("fused", params, torch.float32),
    "torch compiled": compiled_adamw,
    "DeepSpeed": lambda params: deepspeed_optimizer(params, torch.float32),
}


def measure() -> dict[str, dict[str, float]]:
    """Median milliseconds of a step by case and implementation, without those that cannot run here.

    Each model is trained: a call runs a forward and a backward pass, which are not timed, and the step, which is.
    """
    return {case: _measure_case(make, shape) for case, (make, shape) in CASES.items()}


def _measure_case(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    torch.manual_seed(0)
    x, steps, times = torch.randn(shape), {}, {}
    for name, make_optimizer in IMPLEMENTATIONS.items():
        model = make()
        try:
            optimizer = make_optimizer(list(model.parameters()))
        except Unavailable:
            continue
        times[name], steps[name] = [], _call(model, optimizer.step, x)

    def call(name: str) -> Callable[[], None]:
        return lambda: times[name].append(steps[name]())

    time_in_rounds({name: call(name) for name in steps}, ROUNDS)
    return {name: statistics.median(measured[-ROUNDS:]) for name, measured in times.items()}


def _call(model: nn.Module, step: Callable[[], object], x: Tensor) -> Callable[[], float]:
    """A function that runs one training step and returns the milliseconds that the optimizer took."""

    def train() -> float:
        model.zero_grad()
        model(x).square().mean().backward()
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    return train

"""Compares 8-bit formats for Adam's states, ours and others', on the states of a model that is being trained.

    python ci/quantization_formats.py

Prints one table per state: the errors of the state and of the resulting update after quantizing once, to nearest; and
how many elements of exp_avg_sq become zero, after which the update divides by eps alone. Every format has one scale per
quantization block of 256 elements, their largest magnitude (ours rounds it up to bfloat16), so that only the formats
differ. The row of bitsandbytes needs that package.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
from demo import LEARNING_RATE, WEIGHT_DECAY, CharTransformer, Text
from quality import SIZE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from adamops.optim.state.quantization import QUANTIZATION_BLOCK, SIGNED, UNSIGNED, dequantize, quantize

EPS = 1e-8
STATES = ("exp_avg", "exp_avg_sq")
RoundTrip = Callable[[Tensor], Tensor]


def by_values(values: Tensor) -> RoundTrip:
    """Rounds to the nearest of a format's values, in [-1, 1], which are multiplied by a quantization block's scale."""
    values = values.sort().values
    middles = (values[1:] + values[:-1]) / 2

    def round_trip(line: Tensor) -> Tensor:
        blocks = F.pad(line, (0, -line.numel() % QUANTIZATION_BLOCK)).view(-1, QUANTIZATION_BLOCK)
        scales = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = values[torch.bucketize(blocks / scales, middles)] * scales
        return rounded.flatten()[: line.numel()]

    return round_trip


def companded(signed: bool, expand: Callable[[Tensor], Tensor]) -> RoundTrip:
    """The format whose values are `expand` at evenly spaced points from 0 to 1, signed or unsigned."""
    positive = expand(torch.linspace(0, 1, 128 if signed else 256, dtype=torch.float64)).float()
    return by_values(torch.cat([-positive[1:], positive]) if signed else positive)


def ours(signed: bool) -> RoundTrip:
    """This package's own format."""
    fmt = SIGNED if signed else UNSIGNED
    return lambda line: dequantize(*quantize(line, fmt), fmt)


def floats_of_8_bits(signed: bool) -> RoundTrip:
    """8-bit floats: a sign bit if `signed`, three significand bits, and the remaining bits for the exponent."""
    exponents = 16 if signed else 32
    steps = torch.arange(8, dtype=torch.float64) / 8
    normal = torch.cat([(1 + steps) * 2.0**-e for e in range(exponents - 1)])
    positive = torch.cat([torch.zeros(1, dtype=torch.float64), normal / normal.max()]).float()
    return by_values(torch.cat([-positive[1:], positive]) if signed else positive)


def bitsandbytes(signed: bool) -> RoundTrip:
    """The dynamic quantization map (arXiv 2110.02861), from the package itself."""
    from bitsandbytes.functional import create_dynamic_map

    return by_values(create_dynamic_map(signed=signed).float())


@dataclasses.dataclass(frozen=True)
class Format:
    """A format for each state; None if there is none for that state."""

    exp_avg: Callable[[bool], RoundTrip] | None
    exp_avg_sq: Callable[[bool], RoundTrip] | None


def power(exponent: int) -> Callable[[bool], RoundTrip]:
    """Values that are powers of evenly spaced points, so that the stored integer is a root of the value."""
    return lambda signed: companded(signed, lambda x: x**exponent)


FORMATS = {
    "ours": Format(ours, ours),
    "dynamic, bitsandbytes": Format(bitsandbytes, bitsandbytes),
    "softsign, as FlashOptim's": Format(lambda signed: companded(signed, lambda x: x / (2 - x)), None),
    "square root": Format(power(2), power(2)),
    "fourth root": Format(None, power(4)),
    "eighth root": Format(None, power(8)),
    "float of 8 bits": Format(floats_of_8_bits, floats_of_8_bits),
    "linear": Format(power(1), power(1)),
}


def states_of_training(stops: list[int], seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """exp_avg and exp_avg_sq of all large params of a character transformer, concatenated, at each of the `stops`."""
    torch.manual_seed(seed)
    text = Text()
    model = CharTransformer(text.vocabulary, SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches, kept = torch.Generator().manual_seed(seed), {}
    for step in range(1, max(stops) + 1):
        inputs, targets = text.batch(batches, SIZE)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        if step in stops:
            large = [optimizer.state[param] for param in model.parameters() if param.numel() >= 4096]
            exp_avg, exp_avg_sq = (torch.cat([state[name].flatten() for state in large]) for name in STATES)
            kept[step] = exp_avg, exp_avg_sq
    return kept


def rms(values: Tensor) -> float:
    """Root mean square."""
    return values.double().square().mean().sqrt().item()


def error_of_update(states: tuple[Tensor, Tensor], quantized: tuple[Tensor, Tensor]) -> float:
    """The root mean square error of the updates, relative to their own root mean square."""
    exact, found = (m / (v.sqrt() + EPS) for m, v in (states, quantized))
    return rms(found - exact) / rms(exact)


def table_of(name: str, kept: dict[int, tuple[Tensor, Tensor]]) -> Table:
    """The errors of one state in each format, with the other state exact."""
    which = STATES.index(name)
    columns = [f"{what}, step {step}" for what in ("state", "update") for step in kept]
    if which:
        columns += [f"zeros, step {step}" for step in kept]
    table = Table(f"{name} in each format", *columns)
    for title, fmt in FORMATS.items():
        make = getattr(fmt, name)
        if make is None:
            continue
        try:
            round_trip = make(which == 0)
        except ImportError:
            table.add_row(title, *["not installed"] * len(columns))
            continue
        own, update, zeros = [], [], []
        for states in kept.values():
            quantized = round_trip(states[which])
            pair = (quantized, states[1]) if which == 0 else (states[0], quantized)
            own.append(f"{rms(quantized - states[which]) / rms(states[which]):.4f}")
            update.append(f"{error_of_update(states, pair):.4g}")
            zeros.append(str(int(((quantized == 0) & (states[which] != 0)).sum())))
        table.add_row(title, *own, *update, *(zeros if which else []))
    return table


def main() -> None:
    """Trains, and prints one table per state."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 200, 800], help="after which to look")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    kept = states_of_training(args.steps, args.seed)
    console = Console(highlight=False, width=160)
    console.print(f"{kept[args.steps[0]][0].numel():,} elements, errors in parts of the root mean square")
    for name in STATES:
        console.print(table_of(name, kept))


if __name__ == "__main__":
    main()

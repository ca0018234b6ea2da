"""Draws README's charts from measurements: python ci/draw_charts.py

The measurements are in docs/figures: bench.json, put together of `python -m adamops.bench --json` and a run with
`--models gpt2 llama-0.5b resnet50 lora-8b --repeat 11`, and memory.json, of `python ci/memory.py --json`. Measures
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from adamops._bench_text import draw

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
SHOWN = ["fp32", "bf16", "many-tensors", "clip", "gpt2", "llama-0.5b", "resnet50", "lora-8b"]  # cases of bench.json


def speed() -> None:
    """How fast a step is beside those of peers."""
    measured = json.loads((FIGURES / "bench.json").read_text())
    cases = {name: measured["cases"][name] for name in SHOWN if name in measured["cases"]}
    draw(cases, measured["environment"], FIGURES / "speed.png")


def memory() -> None:
    """Bytes per param, with its grad, while training."""
    measured = json.loads((FIGURES / "memory.json").read_text())["bytes_per_param"]
    names, sizes = list(measured), [kept for kept, _ in measured.values()]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(names)), layout="constrained")
    colors = ["tab:orange" if "torch" in name else "#1f4e79" for name in names]
    drawn = axes.barh(names, sizes, color=colors, height=0.65)
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("bytes per param: param, grad, states and master weights, as measured while training")
    axes.set_title("Memory of training with adamops, and with torch's AdamW", loc="left", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "memory.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    speed()
    memory()

"""What the benchmark prints, in 80 columns, and the chart that it draws. Must not know how anything is timed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ._report_text import wrapped

WIDTH = 80
PROBE = "bandwidth probe"
PEERS = {"torch fused": "tab:orange", "torch foreach": "tab:red", "DeepSpeed": "tab:blue"}  # with their colors
EXPLANATION = (
    "Times are of whole calls of optimizer.step(), in rounds of random order. Ratios are medians over the rounds. "
    "The bandwidth probe is a loop that moves the same bytes and computes nothing, on the same threads, with the best "
    "of some prefetch distances: what memory allows."
)


def header(facts: Mapping[str, Any], plan: str, warning: str | None) -> Iterator[str]:
    """The lines before the first case."""
    cores, threads = numbered(facts["cores"], "core"), numbered(facts["threads"], "thread")
    yield f"{facts['cpu']}, {cores}; SIMD target {facts['simd_target']}; {threads}"
    deepspeed = f"DeepSpeed {facts['deepspeed']}" if facts["deepspeed"] else "DeepSpeed is not installed"
    yield f"adamops {facts['adamops']}, torch {facts['torch']}, {deepspeed}"
    if warning:
        yield ""
        yield from wrapped(warning, "! ", WIDTH)
    yield ""
    yield from textwrap.wrap(EXPLANATION, WIDTH)
    yield ""
    yield from textwrap.wrap(plan, WIDTH)


def lines_of(option: str, case: Mapping[str, Any], said: set[str]) -> Iterator[str]:
    """A finished case, as in the JSON file, and the option that chooses it. Reasons in `said` are not said again."""
    yield ""
    yield f"{case['title']}{option:>{max(WIDTH - len(case['title']), len(option) + 2)}}"
    if case["implementations"]:
        yield f"  {'':28}{'median ms':>11}{'min ms':>11}   adamops is"
    for implementation, figures in case["implementations"].items():
        ratio = ""
        if implementation == PROBE:
            ratio = f"at {figures['adamops_speed']:.3f} of it"
        elif implementation != case["ours"]:
            ratio = f"{figures['adamops_speed']:.2f} x as fast"
        row = f"  {implementation:28}{figures['median_ms']:11.2f}{figures['min_ms']:11.2f}   {ratio}"
        yield row.rstrip()
    for implementation, reason in case["skipped"].items():
        words = f"  {implementation}: {reason}"
        yield from textwrap.wrap(words, WIDTH, subsequent_indent="    ") if words not in said else ()
        said.add(words)


def draw(cases: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """Draws how fast adamops is beside its peers, case by case. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        (case["title"], peer, figures["adamops_speed"])
        for case in cases.values()
        for peer, figures in case["implementations"].items()
        if peer in PEERS
    ]
    titles = list(dict.fromkeys(title for title, *_ in rows))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.55 * len(titles)), layout="constrained")
    most = max([2.0, *(speed for *_, speed in rows)])
    for i, title in enumerate(titles):
        own = [(peer, speed) for row, peer, speed in rows if row == title]
        height = 0.8 / len(PEERS)
        for j, (peer, speed) in enumerate(own):
            y = i + (j - (len(own) - 1) / 2) * height
            axes.barh(y, speed, height * 0.92, color=PEERS[peer], label=peer)
            axes.text(speed + 0.01 * most, y, f"{speed:.2f} x", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(titles)), titles, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * most)
    axes.set_xlabel("speed of adamops, relative to each (1: equal; more is faster)")
    axes.set_title(f"A step of adamops beside its peers\n{_machine(facts)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    shown = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [f"against {name}" for name in shown]
    axes.legend(shown.values(), names, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['cpu']}, {numbered(facts['threads'], 'thread')}, {facts['simd_target']}, torch {facts['torch']}"


def numbered(number: int, noun: str) -> str:
    """A count with its noun: "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_words(seconds: float) -> str:
    """A duration, roughly."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"

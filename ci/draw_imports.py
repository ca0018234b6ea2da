"""Draws what imports what, and counts lines: `python ci/draw_imports.py > docs/dev/imports.md`.

Needs grimp, which import-linter brings. An arrow is left out where other arrows lead the same way. Fails if there is a
circle.
"""

from __future__ import annotations

import graphlib
import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
LONG = 400  # lines
WHY_LONG = {
    "adamops/bench.py": "the whole benchmark: implementations, rounds, tables, command line",
    "adamops/deepspeed.py": "all that is replaced in DeepSpeed, in one patch that can be undone",
    "adamops/optim/batch.py": "the step's data with every check of it, so that no check is looked for elsewhere",
    "csrc/python/table.cpp": "the same table from params and from rows, and its binding",
    "csrc/cpu/staged.cpp": "the staged loops, for all kinds of columns",
    "csrc/cuda/blocks.cuh": "what a thread block does, for all kinds of columns",
    "ci/fuzz.py": "the whole fuzzer: mutations, the clean copies that it compares with, sessions, replay",
}
Graph = dict[str, set[str]]


def python_graph(package: str) -> Graph:
    """What the modules and folders of a package import from one another, in functions too."""
    found = grimp.build_graph(package.partition(".")[0], exclude_type_checking_imports=True, cache_dir=None)
    graph: Graph = {}
    for module in found.modules:
        if name := part_of(module, package):
            others = map(part_of, found.find_modules_directly_imported_by(module), itertools.repeat(package))
            graph.setdefault(name, set()).update(other for other in others if other and other != name)
    return graph


def part_of(module: str, package: str) -> str:
    """The module or folder of the package that this module is in; empty if it is not in the package."""
    return module.removeprefix(f"{package}.").partition(".")[0] if module.startswith(f"{package}.") else ""


def include_graph(root: Path) -> Graph:
    """What each C++ and CUDA file includes."""
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    graph: Graph = {}
    for name, path in files.items():
        names = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        graph[name] = files.keys() & set(names)  # includes begin at csrc
    return graph


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that a path of other arrows replaces. Raises graphlib.CycleError for a circle."""
    order = list(graphlib.TopologicalSorter(graph).static_order())
    reach: Graph = {}
    for name in order:
        reach[name] = set().union(*({other} | reach[other] for other in graph.get(name, ())))
    return {
        name: {other for other in others if not any(other in reach[between] for between in others if between != other)}
        for name, others in graph.items()
    }


def mermaid(graph: Graph) -> Iterable[str]:
    names = sorted({*graph, *(other for others in graph.values() for other in others)})
    ids = {name: f"n{i}" for i, name in enumerate(names)}
    yield "```mermaid"
    yield "graph TD"
    yield from (f'  {ids[name]}["{name}"]' for name in names)
    yield from (f"  {ids[name]} --> {ids[other]}" for name in names for other in sorted(graph.get(name, ())))
    yield "```"


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def sources(folder: str) -> list[Path]:
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}
    return [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]


def counted(folders: Mapping[str, str]) -> Iterable[str]:
    yield "| folder | files | lines | longest file |"
    yield "|---|---|---|---|"
    for folder, pattern in folders.items():
        files = [path for path in sources(folder) if re.fullmatch(pattern, str(path.relative_to(ROOT / folder)))]
        longest = max(files, key=lines_of)
        total = sum(map(lines_of, files))
        yield f"| `{folder}` | {len(files)} | {total} | `{longest.name}`, {lines_of(longest)} |"


def page() -> Iterable[str]:
    yield "# What imports what"
    yield ""
    yield "Made by `python ci/draw_imports.py`. An arrow points to what is imported or included; it is left out where"
    yield "other arrows lead the same way. There are no circles."
    drawings = {
        "op_builder": python_graph("op_builder"),
        "adamops": python_graph("adamops"),
        "adamops.optim": python_graph("adamops.optim"),
        "csrc": include_graph(ROOT / "csrc"),
    }
    for title, graph in drawings.items():
        yield from ["", f"## {title}", "", *mermaid(reduced(graph))]
    yield from ["", "## Lines", ""]
    yield from counted(
        {"op_builder": r".*", "adamops": r"[^/]*", "adamops/ops": r".*", "adamops/optim": r"[^/]*"}
        | {f"adamops/optim/{name}": r".*" for name in ("backends", "state", "checkpoint")}
        | {"csrc": r"[^/]*"}
        | {f"csrc/{path.name}": r".*" for path in sorted((ROOT / "csrc").iterdir()) if path.is_dir()}
        | {"tests": r".*", "ci": r".*"}
    )
    yield from ["", *long_files()]


def long_files() -> Iterable[str]:
    yield f"## Files of over {LONG} lines"
    yield ""
    yield "| file | lines | why |"
    yield "|---|---|---|"
    for path in itertools.chain.from_iterable(map(sources, ("adamops", "op_builder", "csrc", "ci"))):
        name = str(path.relative_to(ROOT))
        if lines_of(path) > LONG:
            yield f"| `{name}` | {lines_of(path)} | {WHY_LONG[name]} |"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print("\n".join(page()))

"""The lines of the report. Must work without torch, and must not know how facts are found."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from ._op_facts import FALLBACK, NOT_BUILT

_LABEL = 30  # columns of a label, where there are 80
_ERROR_LINES = 8  # of an error in the summary


class Row(NamedTuple):
    """What the details say in one line or several."""

    label: str
    text: str


def rows_of_op(op: dict[str, Any]) -> list[Row]:
    """What the report says about one op, in rows."""
    rows = [Row("origin", op["origin"])]
    if "prebuilt" in op:
        rows.append(Row("prebuilt", _yes_no(op["prebuilt"])))
        if not op.get("not_applicable_reason"):
            rows.append(Row("works here", _yes_no(op["ok"])))
        rows.append(Row("can be built here", f"{_yes_no(op['compatible'])}: {op['reason']}"))
        rows.append(Row("in use", op["in_use"]))
    if simd := op.get("simd"):
        forced = " (forced by ADAMOPS_SIMD)" if simd["forced"] else ""
        rows.append(Row("SIMD targets in binary", " ".join(simd["in_binary"])))
        rows.append(Row("SIMD targets supported here", " ".join(simd["supported_here"])))
        rows.append(Row("SIMD target chosen", simd["chosen"] + forced))
    rows += _rows_of_build(op.get("build", {}))
    if cuda := op.get("cuda"):
        rows.append(Row("CUDA runtime linked in", _cuda_version(cuda["runtime_version"])))
        rows.append(Row("CUDA devices", cuda["problem"] or str(cuda["devices"])))
    if op.get("not_applicable_reason"):
        rows.append(Row("not needed here", op["not_applicable_reason"]))
    for name, found in op.get("gpus", {}).items():
        rows.append(Row(f"GPU {name}", f"{_yes_no(found['runs'])}: {found['how']}"))
    if op.get("openmp_runtime"):
        rows.append(Row("OpenMP runtime", op["openmp_runtime"]))
    if op.get("error"):
        rows.append(Row("error", op["error"]))
    return rows


def _rows_of_build(build: dict[str, Any]) -> list[Row]:
    if not build:
        return []
    if not build.get("built"):
        return [Row("build", str(build.get("reason", "left out of the build")))]
    rows = [Row("build", f"{build['compiler']} for {build['machine']}"), Row("flags", " ".join(build["flags"]))]
    if "targets" in build:
        rows.append(Row("SIMD targets requested", build["targets_requested"]))
        rows.append(Row("SIMD targets enabled", " ".join(build["targets"])))
        rows += [Row("SIMD target dropped", f"{name} ({why})") for name, why in build["targets_dropped"].items()]
    if "architectures" in build:
        how = "; all from the oldest's PTX" if build.get("from_one_ptx") else ""
        wanted = f"{build['architectures_requested']}{how}"
        rows.append(Row("CUDA architectures", f"{' '.join(build['architectures'])} ({wanted})"))
        rows.append(Row("nvcc", build["nvcc"]))
        rows += [Row("CUDA architecture dropped", f"{n} ({why})") for n, why in build["architectures_dropped"].items()]
    return rows


def rows_of_machine(machine: dict[str, Any]) -> list[Row]:
    """What the report says about versions and hardware, in rows."""
    labels = {
        "adamops": "adamops",
        "python": "Python",
        "torch": "torch",
        "threads": "threads of torch",
        "step_threads": "threads of a step",
        "tensors": "tensors are read",
        "platform": "platform",
        "cpu": "CPU",
        "cuda_toolkit": "CUDA toolkit",
        "driver": "NVIDIA driver",
        "gpus": "GPUs",
        "backends": "backends of plugins",
    }
    rows = [Row(label, _as_text(machine[key])) for key, label in labels.items()]
    rows.append(Row("installed in", machine["installation"]["path"]))
    if machine["installation"]["hint"]:
        rows.append(Row("warning", machine["installation"]["hint"]))
    return rows + [Row(name, version) for name, version in machine["frameworks"].items()]


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    elif isinstance(value, dict):  # of threads.Threads
        value = f"{value['number'] or '?'}: {value['why']}"
    return str(value) if value not in (None, "") else "none"


def rows_of_environment(variables: dict[str, Any]) -> list[Row]:
    """What the report says about environment variables, in rows."""
    rows = [Row(name, value) for name, value in variables["set"].items()]
    rows += [Row("unknown", words) for words in variables["unknown"]]
    return rows + [Row("error", error) for error in variables["errors"]]


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def verdict(report: dict[str, Any]) -> str:
    """Whether adamops works here, in a line."""
    name = f"adamops {report['machine']['adamops']}"
    if report["ok"]:
        return f"{name} works here: every op that this machine can use is compiled, and loads."
    bad = [op["name"] for op in report["ops"] if not op["ok"] and not _is_to_be_built(op)]
    if report["environment"]["errors"]:
        bad.append("environment variables")
    if report["machine"]["threads"] is None:  # torch is missing or broken
        bad.append("torch")
    bad += [f"the steps of {outcome['name']}" for outcome in report.get("check", []) if not outcome["ok"]]
    if not bad:
        return f"{name} is not compiled here yet: the first step does that, once, in about a minute."
    return f"{name} is NOT OK here. Missing or broken: {', '.join(bad)}."


def summary(report: dict[str, Any], width: int, is_verbose: bool = False) -> Iterator[str]:
    """The lines that everyone wants to see, with what else can be asked for."""
    yield from wrapped(verdict(report), "", width)
    yield ""
    column = max([12, *(len(op["name"]) + 2 for op in report["ops"])])
    for op in report["ops"]:
        yield from wrapped(_state_of(op), f"  {op['name']:<{column}}", width)
        if not op["ok"] and not _is_to_be_built(op):
            yield from _problem(op.get("error") or op.get("reason", ""), width)
    machine, variables = report["machine"], report["environment"]
    yield ""
    found = ", ".join(f"{name} {version}" for name, version in machine["frameworks"].items())
    facts = {
        "installed in": machine["installation"]["path"],
        "with": f"Python {machine['python']}, torch {machine['torch'] or '(none)'}" + (f", {found}" if found else ""),
        "threads of a step": _as_text(machine["step_threads"]),
    }
    for label, value in facts.items():
        yield from wrapped(value, f"  {label}: ", width)
    for problem in [*filter(None, [machine["installation"]["hint"]]), *variables["errors"], *variables["unknown"]]:
        yield ""
        yield from wrapped(problem, "! ", width)
    hints = [] if is_verbose else ["--verbose shows everything"]
    hints += [] if "check" in report else ["--check takes steps and compares their bits"]
    if hints:
        yield ""
        yield from wrapped(f"{'; '.join(hints)}.", "", width)


def steps_taken(outcomes: list[dict[str, Any]], width: int) -> Iterator[str]:
    """How the steps of --check ended."""
    yield ""
    for outcome in outcomes:
        yield from wrapped(f"{outcome['name']}: {outcome['text']}", "ok  " if outcome["ok"] else "NOT OK  ", width)


def _state_of(op: dict[str, Any]) -> str:
    """What an op is used for, or why not, in words."""
    if "in_use" not in op:
        return "NOT OK"
    if op["name"] == FALLBACK and op["ok"]:
        return f"in reserve: {op['in_use']}"
    if op.get("not_applicable_reason"):
        return f"not needed: {op['not_applicable_reason']}"
    chosen = op.get("simd", {}).get("chosen")
    used = f"in use: {op['in_use']}" + (f", {chosen}" if chosen else "")
    if _is_to_be_built(op):
        return "not built yet: the first step builds it, in about a minute"
    return used if op["ok"] else f"NOT OK, {used}"


def _is_to_be_built(op: dict[str, Any]) -> bool:
    """Whether nothing is wrong with an op but that nobody has used it yet."""
    return not op["ok"] and op.get("in_use") == NOT_BUILT and not op.get("error")


def _problem(text: str, width: int) -> Iterator[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines[:_ERROR_LINES]:
        yield from wrapped(line.strip(), "      ", width)
    if len(lines) > _ERROR_LINES:
        yield f"      ... and {len(lines) - _ERROR_LINES} more lines: --verbose"


def details(report: dict[str, Any], width: int) -> Iterator[str]:
    """All that is known, section by section."""
    sections = [(f"op {op['name']}: {'ok' if op['ok'] else 'NOT OK'}", rows_of_op(op)) for op in report["ops"]]
    if variables := rows_of_environment(report["environment"]):
        sections.append(("environment", variables))
    sections.append(("machine", rows_of_machine(report["machine"])))
    column = _LABEL if width >= 80 else 0
    for title, rows in sections:
        yield title
        for label, text in rows:
            first, *others = text.splitlines() or [""]
            yield from wrapped(first, f"  {label + ': ':<{column}}", width)
            for line in others:
                yield from wrapped(line, " " * (column + 2 if column else 6), width)
        yield ""


def wrapped(text: str, begin: str, width: int) -> Iterator[str]:
    """A line, or several if it is longer than the width; those after the first are indented."""
    fits = len(begin) < width // 2 and len(begin) + len((text.split() or [""])[0]) <= width
    indent = " " * (len(begin) if fits else 4)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, replace_whitespace=False)
    wrapper.break_on_hyphens = wrapper.break_long_words = False  # paths and flags stay whole
    yield from wrapper.wrap(begin + text) or [begin.rstrip()]

"""Shows which ops are built, usable and in use on this machine, and why not: python -m adamops.report [--json].

Builds nothing and imports only what it must. Must work without torch, whatever state the installation is in.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__, op_builder, plugin_process
from ._op_facts import describe, in_words, torch_facts
from .op_builder import environment
from .op_builder.nvcc import Nvcc
from .op_builder.simd import targets_of

PLUGIN_SECONDS = 60.0  # time limit for importing, loading and describing a plugin
BACKENDS = "adamops.backends"  # ENTRY_POINT_GROUP of adamops.optim.backends.loading, which needs torch
OTHER_VARIABLES = ("CUDA_HOME", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "OMP_NUM_THREADS", "TORCH_CUDA_ARCH_LIST")


def collect() -> dict[str, Any]:
    """Everything the report shows, as JSON types.

    `ok` says whether torch is available, every op loads natively or is not meant to (the fallback), no plugin is
    broken, and no environment variable has an invalid value.
    """
    machine = _machine()  # first: it imports torch, whose OpenMP runtime the ops then find
    ops = [_showable(describe(op)) for op in op_builder.builtin_ops()]
    ops += _describe_plugins({op["name"]: op["origin"] for op in ops})
    variables = _environment([op["name"] for op in ops])
    ok = all(op["ok"] for op in ops) and not variables["errors"] and machine["threads"] is not None
    return {"ok": ok, "ops": ops, "environment": variables, "machine": machine}


def _environment(ops: list[str]) -> dict[str, Any]:
    """The environment variables for adamops that are set, and the errors in them.

    Which values of ADAMOPS_SIMD are valid depends on the binary, so the op that reads it reports that error.
    """
    targets = [target.name for target in targets_of(platform.machine())]
    errors = []
    checks: list[Callable[[], Any]] = [functools.partial(environment.cpu_targets, targets)]
    checks += [environment.max_jobs, environment.num_threads, environment.check_cache_dir]
    checks += [functools.partial(environment.words, name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    checks += [functools.partial(environment.build_switch, op) for op in ops]
    for check in checks:
        try:
            check()
        except ValueError as error:
            if str(error) not in errors:  # ADAMOPS_BUILD_OPS is read for each op
                errors.append(str(error))
    names = [name for name in os.environ if name.startswith("ADAMOPS_") or name in OTHER_VARIABLES]
    return {
        "set": {name: os.environ[name] for name in sorted(names)},
        "unknown": environment.unknown(ops),
        "errors": errors,
    }


def _describe_plugins(origins: dict[str, str]) -> list[dict[str, Any]]:
    """The ops of other packages, by entry point. `origins` maps names that are already taken to their origins."""
    entries = []
    for entry_point in op_builder.plugins():
        entry = _showable(plugin_process.describe(entry_point, PLUGIN_SECONDS))
        name = entry["name"]
        if name in origins:
            origin = op_builder.origin_of(entry_point)
            error = op_builder.name_is_taken(name, origins[name].removeprefix("plugin of "))
            entry = {"name": f"{name} ({origin})", "origin": entry["origin"], "ok": False, "error": error}
        origins[entry["name"]] = entry["origin"]
        entries.append(entry)
    return entries


def _machine() -> dict[str, Any]:
    nvcc = Nvcc.find()
    gpus, driver = _gpus()
    return {
        "adamops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        **torch_facts(),
        "backends": [f"{found.name} of {op_builder.origin_of(found)}" for found in op_builder.plugins(BACKENDS)],
        "cuda_toolkit": nvcc.version if nvcc else None,
        "driver": driver,
        "gpus": gpus,
    }


def cpu_name() -> str:
    """The CPU's human-readable name."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpus() -> tuple[list[str], str | None]:
    """The names of the GPUs, and the version of their driver."""
    command = shutil.which("nvidia-smi")
    if not command:
        return [], None
    rows = _output_of(command, "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    pairs = [row.rsplit(", ", 1) for row in rows if ", " in row]
    return [name for name, _ in pairs], pairs[0][1] if pairs else None


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _showable(op: dict[str, Any]) -> dict[str, Any]:
    """The facts about an op; if they cannot be shown, as those of a plugin may be anything, the error that says so."""
    try:
        rows_of_op(op)
    except Exception as error:
        return {"name": str(op.get("name")), "origin": str(op.get("origin")), "ok": False, "error": in_words(error)}
    return op


class Row(NamedTuple):
    """What the report says in one line or several."""

    label: str
    text: str
    is_bad: bool = False


def rows_of_op(op: dict[str, Any]) -> list[Row]:
    """What the report says about one op, in rows."""
    rows = [Row("origin", op["origin"])]
    if "prebuilt" in op:
        rows.append(Row("prebuilt", _yes_no(op["prebuilt"])))
        rows.append(Row("compatible", f"{_yes_no(op['compatible'])}: {op['reason']}", not op["compatible"]))
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
        rows.append(Row(f"GPU {name}", f"{_yes_no(found['runs'])}: {found['how']}", not found["runs"]))
    if op.get("openmp_runtime"):
        rows.append(Row("OpenMP runtime", op["openmp_runtime"]))
    if op.get("error"):
        rows.append(Row("error", op["error"], True))
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
    rows: list[Row] = []
    for key, label in labels.items():
        value = machine[key]
        if isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):  # of threads.Threads
            value = f"{value['number'] or '?'}: {value['why']}"
        rows.append(Row(label, str(value) if value not in (None, "") else "none"))
    return rows


def rows_of_environment(variables: dict[str, Any]) -> list[Row]:
    """What the report says about environment variables, in rows."""
    rows = [Row(name, value) for name, value in variables["set"].items()]
    rows += [Row("unknown", words, True) for words in variables["unknown"]]
    return rows + [Row("error", error, True) for error in variables["errors"]]


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _verdict(report: dict[str, Any]) -> str:
    if report["ok"]:
        return "All ops are natively available."
    bad = [op["name"] for op in report["ops"] if not op["ok"]]
    if report["environment"]["errors"]:
        bad.append("environment variables")
    if report["machine"]["threads"] is None:  # torch is missing or broken
        bad.append("torch")
    return f"Missing or broken: {', '.join(bad)}."


def _print_plain(report: dict[str, Any], write: Callable[[str], Any]) -> None:
    sections = [(f"op {op['name']}: {'ok' if op['ok'] else 'NOT OK'}", rows_of_op(op)) for op in report["ops"]]
    if variables := rows_of_environment(report["environment"]):
        sections.append(("environment", variables))
    sections.append(("machine", rows_of_machine(report["machine"])))
    for title, rows in sections:
        write(f"{title}\n")
        for label, text, _ in rows:
            first, *others = text.splitlines() or [""]
            write(f"  {label + ':':<30}{first}\n".encode("ascii", "backslashreplace").decode())
            for line in others:
                write(f"  {'':<30}{line}\n".encode("ascii", "backslashreplace").decode())
        write("\n")
    write(f"{_verdict(report)}\n")


def _print_rich(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def panel(title: str, rows: list[Row], style: str) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(row.label, Text(row.text, style="red" if row.is_bad else ""))
        console.print(Panel(table, title=title, title_align="left", border_style=style))

    for op in report["ops"]:
        mark, style = ("[green]ok[/green]", "green") if op["ok"] else ("[red]not ok[/red]", "red")
        panel(f"op [bold]{op['name']}[/bold] {mark}", rows_of_op(op), style)
    if variables := rows_of_environment(report["environment"]):
        panel("environment", variables, "red" if report["environment"]["errors"] else "blue")
    panel("machine", rows_of_machine(report["machine"]), "blue")
    console.print(_verdict(report), style="bold green" if report["ok"] else "bold red")


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns 0 if the optimizers are natively available, 1 if something is missing or broken."""
    parser = argparse.ArgumentParser(prog="python -m adamops.report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # a plugin may print anything
        report = collect()
    if sys.stdout is not None:  # else it was closed by whoever started this, who wants the exit status
        _print(report, options.json)
    return 0 if report["ok"] else 1


def _print(report: dict[str, Any], as_json: bool) -> None:
    try:
        if as_json:
            print(json.dumps(report, indent=2))
        elif sys.stdout.isatty():
            _print_rich(report)
        else:
            _print_plain(report, sys.stdout.write)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


if __name__ == "__main__":
    sys.exit(main())

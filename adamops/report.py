"""Shows which ops are built, usable and in use on this machine, and why not: python -m adamops.report [--verbose].

Builds nothing, but that --check may build an op at its first use, and imports only what it must. Must work without
torch, whatever state the installation is in.
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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import __version__, op_builder, plugin_process
from ._installation import frameworks, installation
from ._op_facts import NUMPY_IS_MISSING, describe, in_words, torch_facts
from ._report_text import details, rows_of_op, steps_taken, summary
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
        "installation": installation(),
        "frameworks": frameworks(),
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


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns 0 if the optimizers are natively available, 1 if something is missing or broken."""
    is_script = Path(sys.argv[0]).stem == "adamops-report"
    prog = "adamops-report" if is_script else "python -m adamops.report"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--verbose", action="store_true", help="print all that is known")
    parser.add_argument("--check", action="store_true", help="also take steps, and compare their bits")
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # a plugin may print anything
        warnings.filterwarnings("ignore", NUMPY_IS_MISSING)
        report = collect()
        if options.check:
            report["check"] = _check()
            report["ok"] = report["ok"] and all(outcome["ok"] for outcome in report["check"])
    if sys.stdout is not None:  # else it was closed by whoever started this, who wants the exit status
        _print(report, options)
    return 0 if report["ok"] else 1


def _check() -> list[dict[str, Any]]:
    """How the steps of each optimizer end, as JSON types."""
    try:
        from . import _smoke_step

        return [outcome._asdict() for outcome in _smoke_step.run()]
    except Exception as error:  # whatever is broken
        return [{"name": "steps", "ok": False, "text": in_words(error)}]


def _print(report: dict[str, Any], options: argparse.Namespace) -> None:
    try:
        for line in [json.dumps(report, indent=2)] if options.json else _lines(report, options.verbose):
            print(line.encode("ascii", "backslashreplace").decode())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def _lines(report: dict[str, Any], is_verbose: bool) -> Iterator[str]:
    # In a file or a pipe, lines are as long as they are, unless COLUMNS says otherwise.
    is_wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width = 10_000 if is_wide else max(40, shutil.get_terminal_size().columns)
    yield from summary(report, width, is_verbose)
    if is_verbose:
        yield ""
        yield from details(report, width)
    if "check" in report:
        yield from steps_taken(report["check"], width)


if __name__ == "__main__":
    sys.exit(main())

"""Shows which ops are built, usable and in use on this machine, and why not: python -m adamops.report [--json].

Builds nothing and imports only what it must. Must work without torch, whatever state the installation is in.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, op_builder, plugin_process
from .op_builder import environment, jit
from .op_builder.builder import OpBuilder
from .op_builder.cpu import targets_of
from .op_builder.cuda import covers, visible_gpus

FALLBACK = "torch_adam"
PLUGIN_SECONDS = 60.0  # time limit for importing, loading and describing a plugin
OTHER_VARIABLES = ("CUDA_HOME", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")


def collect() -> dict[str, Any]:
    """Everything the report shows, as JSON types.

    `ok` says whether torch is available, every op loads natively or is not meant to (the fallback), no plugin is
    broken, and no environment variable has an invalid value.
    """
    machine = _machine()  # first: it imports torch, whose OpenMP runtime the ops then find
    ops = [_describe(op) for op in op_builder.builtin_ops()]
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
    checks += [environment.max_jobs, environment.check_cache_dir]
    checks += [functools.partial(environment.words, name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    checks += [functools.partial(environment.build_switch, op) for op in ops]
    for check in checks:
        try:
            check()
        except ValueError as error:
            if str(error) not in errors:  # ADAMOPS_BUILD_OPS is read for each op
                errors.append(str(error))
    names = [name for name in os.environ if name.startswith("ADAMOPS_") or name in OTHER_VARIABLES]
    return {"set": {name: os.environ[name] for name in sorted(names)}, "errors": errors}


def _describe(op: op_builder.RegisteredOp) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": op.name,
        "origin": "built-in" if op.origin == "built-in" else f"plugin of {op.origin}",
        "ok": False,
    }
    if op.builder is None:
        return {**entry, "error": op.error}
    try:
        described = json.loads(json.dumps({**entry, **_describe_builder(op.builder)}, default=str))
        rows_of_op(described)  # so that what cannot be shown fails here
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's builder may do anything
        return {**entry, "error": _in_words(error)}
    return described


def _describe_plugins(origins: dict[str, str]) -> list[dict[str, Any]]:
    """The ops of other packages, by entry point. `origins` maps names that are already taken to their origins."""
    entries = []
    for entry_point in op_builder.plugins():
        entry = plugin_process.describe(entry_point, PLUGIN_SECONDS)
        name = entry["name"]
        if name in origins:
            origin = op_builder.origin_of(entry_point)
            error = op_builder.name_is_taken(name, origins[name].removeprefix("plugin of "))
            entry = {"name": f"{name} ({origin})", "origin": entry["origin"], "ok": False, "error": error}
        origins[entry["name"]] = entry["origin"]
        entries.append(entry)
    return entries


def describe_plugin(entry_point: importlib.metadata.EntryPoint) -> dict[str, Any]:
    """The report's entry for a plugin. Runs the plugin's code, so plugin_process.py calls this in another process."""
    _torch()  # first, as in collect()
    return _describe(op_builder.load_plugin(entry_point))


def _describe_builder(builder: OpBuilder) -> dict[str, Any]:
    compatible = builder.compatibility()
    entry: dict[str, Any] = {
        "prebuilt": bool(builder.is_prebuilt()),
        "compatible": bool(compatible),
        "reason": str(getattr(compatible, "reason", "")),
    }
    record = builder.build_record() if hasattr(builder, "build_record") else None
    _check_record(record)
    if record:
        entry["build"] = record
    entry.update(_usable(builder, bool(compatible), entry["prebuilt"]))
    if record and "architectures" in record:
        entry["gpus"] = {f"sm_{gpu}": covers(record["architectures"], gpu) for gpu in visible_gpus()}
    not_applicable_reason = builder.not_applicable_reason() if hasattr(builder, "not_applicable_reason") else ""
    if not_applicable_reason:
        entry["not_applicable_reason"] = not_applicable_reason
        entry["ok"] = entry["ok"] or not entry.get("error")
    elif problem := entry.get("cuda", {}).get("problem"):  # there is a GPU that this build cannot use
        entry.update(ok=False, in_use=f"a build at first use, else {FALLBACK} (pure PyTorch)", error=problem)
    return entry


def _check_record(record: Any) -> None:
    """Raises TypeError or ValueError for an invalid build record, which a plugin may return."""
    if record is None:
        return
    if not isinstance(record, dict):
        raise TypeError(f"build_record() returned a {type(record).__name__}, expected a dict or None")
    needed = {"compiler": str, "machine": str, "flags": list} if record.get("built") else {}
    if "targets" in record:
        needed |= {"targets_requested": str, "targets": list, "targets_dropped": dict}
    if "architectures" in record:
        needed |= {"architectures_requested": str, "architectures": list, "architectures_dropped": dict, "nvcc": str}
    for key, kind in needed.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"build_record() has {record.get(key)!r} for {key!r}, expected a {kind.__name__}")


def _usable(builder: OpBuilder, compatible: bool, prebuilt: bool) -> dict[str, Any]:
    """What would be used if the op were loaded now. Loads the op if that needs no build."""
    if builder.NAME == FALLBACK:
        return {"ok": compatible, "in_use": "pure PyTorch, where nothing compiled can be used"}
    own = builder.NAME in [known.NAME for known in op_builder.builtin_builders()]
    without = f"{FALLBACK} (pure PyTorch)" if own else "nothing"
    why = ""
    if prebuilt:
        try:
            if isinstance(builder, OpBuilder) and compatible:
                builder.load_prebuilt()  # first on its own: where it fails, load() would build the op
            return {"ok": True, "in_use": "prebuilt extension", **_of_module(builder.load())}
        except ValueError as error:  # from an environment variable
            return {"ok": False, "in_use": "nothing", "error": str(error)}
        except Exception as error:
            why = f"the prebuilt extension does not load: {_in_words(error)}"
    described = {"ok": False, **({"error": why} if why else {})}
    if not compatible:
        return {**described, "in_use": without}
    try:
        if isinstance(builder, OpBuilder) and jit.is_cached(builder):
            found = {**described, "ok": not why, "in_use": "extension built at first use, from the cache"}
            return {**found, **_of_module(builder.load())}
    except ValueError as error:
        return {"ok": False, "in_use": "nothing", "error": str(error)}
    except Exception as error:
        return {"ok": False, "in_use": without, "error": f"{why}\n{_in_words(error)}".strip()}
    return {**described, "in_use": "a build at first use, not done yet"}


def _of_module(module: Any) -> dict[str, Any]:
    """What a loaded op reports about itself: its SIMD targets, or what its CUDA runtime finds."""
    if hasattr(module, "status"):
        return {"cuda": module.status()}
    if not hasattr(module, "supported_targets"):
        return {}
    supported = module.supported_targets()
    return {
        "simd": {
            "in_binary": module.targets(),
            "supported_here": supported,
            "chosen": module.target(),
            "forced": environment.simd(supported),
        },
        "openmp_runtime": module.openmp_runtime() or None,
    }


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _machine() -> dict[str, Any]:
    cuda = _cuda_toolkit()
    gpus, driver = _gpus()
    return {
        "adamops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        **_torch(),
        "cuda_toolkit": cuda,
        "driver": driver,
        "gpus": gpus,
    }


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"torch": None, "threads": None}
    try:
        import torch
    except Exception as error:
        return {"torch": f"broken: {_in_words(error)}", "threads": None}
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """The CPU's human-readable name."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _cuda_toolkit() -> str | None:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    found = re.search(r"release ([\d.]+)", _output_of(nvcc, "--version")) if nvcc else None
    return found.group(1) if found else None


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


def rows_of_op(op: dict[str, Any]) -> list[tuple[str, str]]:
    """What the report says about one op, as pairs of label and text."""
    rows = [("origin", op["origin"])]
    if "prebuilt" in op:
        rows.append(("prebuilt", _yes_no(op["prebuilt"])))
        rows.append(("compatible", f"{_yes_no(op['compatible'])}: {op['reason']}"))
        rows.append(("in use", op["in_use"]))
    if simd := op.get("simd"):
        forced = " (forced by ADAMOPS_SIMD)" if simd["forced"] else ""
        rows.append(("SIMD targets in binary", " ".join(simd["in_binary"])))
        rows.append(("SIMD targets supported here", " ".join(simd["supported_here"])))
        rows.append(("SIMD target chosen", simd["chosen"] + forced))
    rows += _rows_of_build(op.get("build", {}))
    if cuda := op.get("cuda"):
        rows.append(("CUDA runtime linked in", _cuda_version(cuda["runtime_version"])))
        rows.append(("CUDA devices", cuda["problem"] or str(cuda["devices"])))
    if op.get("not_applicable_reason"):
        rows.append(("not needed here", op["not_applicable_reason"]))
    rows += [(f"GPU {name}", covered) for name, covered in op.get("gpus", {}).items()]
    if op.get("openmp_runtime"):
        rows.append(("OpenMP runtime", op["openmp_runtime"]))
    if op.get("error"):
        rows.append(("error", op["error"]))
    return rows


def _rows_of_build(build: dict[str, Any]) -> list[tuple[str, str]]:
    if not build:
        return []
    if not build.get("built"):
        return [("build", str(build.get("reason", "left out of the build")))]
    rows = [("build", f"{build['compiler']} for {build['machine']}"), ("flags", " ".join(build["flags"]))]
    if "targets" in build:
        rows.append(("SIMD targets requested", build["targets_requested"]))
        rows.append(("SIMD targets enabled", " ".join(build["targets"])))
        rows += [("SIMD target dropped", f"{name} ({why})") for name, why in build["targets_dropped"].items()]
    if "architectures" in build:
        how = "; all from the oldest's PTX" if build.get("from_one_ptx") else ""
        wanted = f"{build['architectures_requested']}{how}"
        rows.append(("CUDA architectures", f"{' '.join(build['architectures'])} ({wanted})"))
        rows.append(("nvcc", build["nvcc"]))
        rows += [("CUDA architecture dropped", f"{n} ({why})") for n, why in build["architectures_dropped"].items()]
    return rows


def rows_of_machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """What the report says about versions and hardware, as pairs of label and text."""
    labels = {
        "adamops": "adamops",
        "python": "Python",
        "torch": "torch",
        "threads": "threads of torch",
        "platform": "platform",
        "cpu": "CPU",
        "cuda_toolkit": "CUDA toolkit",
        "driver": "NVIDIA driver",
        "gpus": "GPUs",
    }
    rows = []
    for key, label in labels.items():
        value = ", ".join(machine[key]) if isinstance(machine[key], list) else machine[key]
        rows.append((label, str(value) if value not in (None, "") else "none"))
    return rows


def rows_of_environment(variables: dict[str, Any]) -> list[tuple[str, str]]:
    """What the report says about environment variables, as pairs of label and text."""
    return [*variables["set"].items(), *(("error", error) for error in variables["errors"])]


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
        for label, text in rows:
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

    def panel(title: str, rows: list[tuple[str, str]], style: str) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            bad = label == "error" or text.startswith("no:")
            table.add_row(label, Text(text, style="red" if bad else ""))
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

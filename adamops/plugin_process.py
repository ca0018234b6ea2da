"""Describes a plugin's op in a separate process, so that one that crashes, exits or hangs costs a line of the report.

python -m adamops.plugin_process NAME VALUE OUTPUT    # of an entry point; writes JSON to the file
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from . import op_builder
from ._op_facts import NUMPY_IS_MISSING, describe_plugin


def describe(entry_point: importlib.metadata.EntryPoint, seconds: float) -> dict[str, Any]:
    """The result of describe_plugin(), or an entry that says how its process ended."""
    try:
        with tempfile.TemporaryDirectory(prefix="adamops-report-") as folder:
            output = Path(folder) / "plugin.json"  # not a pipe, which a child of the plugin could keep open
            outcome = _run([entry_point.name, entry_point.value, str(output)], seconds)
            with contextlib.suppress(OSError, ValueError):
                return json.loads(output.read_text())
    except OSError as error:  # no folder for temporary files, or no more processes
        outcome = f"the plugin could not be looked at: {error}"
    origin = f"plugin of {op_builder.origin_of(entry_point)}"
    return {"name": entry_point.name, "origin": origin, "ok": False, "error": outcome}


def _run(arguments: list[str], seconds: float) -> str:
    """Runs this module in a process and says in words how that ended. Its output goes to standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__, *arguments]
    try:
        output = sys.stderr.fileno()
    except (AttributeError, OSError):  # closed, or replaced by an object without a file
        output = subprocess.DEVNULL
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"the plugin did not answer within {seconds:g} s, while it was imported, loaded or described"
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()
    if status < 0:
        return f"the plugin crashed: its process was ended by {signal.Signals(-status).name}"
    return f"the plugin ended its process with exit status {status}"


def main(name: str, value: str, output: str) -> None:
    """Describes the plugin of the entry point with this name and value."""
    warnings.filterwarnings("ignore", NUMPY_IS_MISSING)
    found = next(entry for entry in op_builder.plugins() if (entry.name, entry.value) == (name, value))
    text = json.dumps(describe_plugin(found))
    unfinished = Path(f"{output}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(output)


if __name__ == "__main__":
    main(*sys.argv[1:])

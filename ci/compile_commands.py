"""Writes compile_commands.json for clangd and clang-tidy, and prints the sources in it: python ci/compile_commands.py

Holds the commands that a build would run here, as op_builder gives them: one entry for each source, or for each source
and SIMD target. Compiles nothing. Leaves out what nvcc compiles, as clang does not know its options.
ADAMOPS_CPU_TARGETS and CXX apply, as they do to a build.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from op_builder import builtin_builders  # noqa: E402
from op_builder.compile import unit_command  # noqa: E402
from op_builder.compiler import Compiler  # noqa: E402


def entries() -> list[dict[str, object]]:
    """The contents of compile_commands.json."""
    compiler = Compiler.find()
    if compiler is None:
        sys.exit("no C++ compiler found")
    objects = ROOT / "build" / "objects"  # named for the format's sake; nothing is written there
    commands = [
        (builder.locate(unit.source), unit_command(builder, unit, compiler, objects / builder.NAME))
        for builder in builtin_builders()
        if builder.compatibility()
        for unit in builder.compile_units()
        if not unit.command
    ]
    return [
        {"directory": str(ROOT), "file": str(file), "arguments": command, "output": command[-1]}
        for file, command in commands
    ]


if __name__ == "__main__":
    found = entries()
    (ROOT / "compile_commands.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(sorted({str(entry["file"]) for entry in found})))

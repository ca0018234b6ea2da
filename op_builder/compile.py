"""Compiles and links one extension, as its spec describes it.

The only module that compiles anything, both for setup.py (through build_ext.py) and for run-time builds (cache.py).
Must not know any particular op.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import environment
from .compiler import Compiler
from .objects import KeptObjects
from .python_extension import python_headers
from .spec import BuildError, CompileUnit, OpSpec

SCRATCH_PREFIX = "adamops-"  # of the folders for temporary files


def cxx_flags(spec: OpSpec) -> list[str]:
    """The C++ compiler's flags for all units of the op."""
    return [*environment.words("CXXFLAGS"), *Compiler.COMMON_FLAGS, *spec.cxx_args()]


def unit_command(spec: OpSpec, unit: CompileUnit, compiler: Compiler, folder: Path) -> list[str]:
    """The command that compiles a unit of the op, with `compiler` unless it has its own, to an object in `folder`."""
    include_paths = [*spec.include_paths(), str(python_headers())]
    if unit.command:
        command = [word.format(jobs=environment.max_jobs()) for word in unit.command]
    else:
        # Headers embed their own paths in messages, and an isolated build has pybind11's in a new place each time.
        prefix_maps = [f"-ffile-prefix-map={path}=." for path in (*include_paths, *spec.source_roots())]
        command = [*compiler.command, *cxx_flags(spec), *prefix_maps]
    command += [*unit.flags, *(f"-I{path}" for path in include_paths)]
    return [*command, "-c", str(spec.locate(unit.source)), "-o", str(folder / unit.object_name)]


def _made_by(spec: OpSpec, unit: CompileUnit, compiler: Compiler) -> list[str]:
    """All that decides what compiling the unit gives, besides the contents of its source and of what that includes."""
    unit = unit._replace(command=tuple(word.format(jobs=1) for word in unit.command))
    *command, _ = unit_command(spec, unit, compiler, Path())
    # A new header may be found before another of its name, so their names count, too.
    return [*command, compiler.version, *spec.toolchain(), *environment.read_by_compilers(), *spec.headers()]


def compile_op(
    spec: OpSpec, output: Path, scratch_root: Path | None = None, kept: KeptObjects | None = None
) -> dict[str, Any]:
    """Compiles and links the op's extension into `output`, and returns the record of what was built.

    Works in a new folder in `scratch_root`, by default the system's folder for temporary files. Compiles all units, or
    only those that are not current in `kept`. On failure it raises BuildError and writes nothing to `output`.
    """
    compiler = Compiler.find()
    if compiler is None:
        raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")
    link_flags = [*spec.extra_ldflags(), *environment.words("LDFLAGS")]
    units = spec.compile_units()

    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{spec.NAME}-", dir=scratch_root) as scratch:

        def compile_unit(unit: CompileUnit) -> None:
            command, *arguments = unit_command(spec, unit, compiler, Path(scratch))

            def run(more_flags: list[str]) -> None:
                Compiler([command]).run([*more_flags, *arguments])

            if kept is None:
                run([])
            else:
                kept.provide(Path(scratch) / unit.object_name, _made_by(spec, unit, compiler), run)

        with ThreadPoolExecutor(environment.max_jobs()) as pool:
            list(pool.map(compile_unit, units))
        linked, exports = Path(scratch) / "linked.so", Path(scratch) / "exports.map"
        # Export only the module's entry point. Exported templates of the C++ library would be shared with other
        # libraries that have them, and torch's own CUDA runtime, perhaps of another version, is in the same process.
        exports.write_text(f"{{ global: PyInit_{spec.MODULE.rpartition('.')[2]}; local: *; }};\n")
        objects = [str(Path(scratch) / unit.object_name) for unit in units]
        compiler.run(
            [*objects, *Compiler.LINK_FLAGS, f"-Wl,--version-script={exports}", *link_flags, "-o", str(linked)]
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(linked, output)

    return {
        "op": spec.NAME,
        "built": True,
        "compiler": compiler.version,
        "machine": compiler.machine,
        "flags": [flag for flag in (*cxx_flags(spec), *link_flags) if not flag.startswith("-L")],  # no paths
        "units": {unit.object_name: list(unit.flags) for unit in units},
        **spec.record(),
    }

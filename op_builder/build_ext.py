"""Glue for setuptools: turns builders into extensions, and provides the build_ext that compiles them.

Used by adamops' own setup.py and by those of packages that add ops. compile.py does the actual compiling.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext as setuptools_build_ext

from . import environment
from .compile import compile_op
from .compiler import Compiler
from .loading import OpBuilder
from .objects import KeptObjects
from .python_extension import record_path, write_record
from .spec import BuildError

_WORDS_OF_TARGETS = ("targets_requested", "targets", "targets_dropped")
_WORDS_OF_ARCHITECTURES = ("architectures_requested", "architectures", "architectures_dropped")


class OpExtension(Extension):
    """One op's extension module, as setuptools sees it."""

    def __init__(self, builder: OpBuilder) -> None:
        # No sources: setuptools would use them for the sdist only. The builder decides what is compiled, and how often.
        super().__init__(builder.MODULE, sources=[])
        self.builder = builder
        # An op that cannot be built is left out, unless the environment requires it: then build_extension() exits.
        self.optional = True


def extensions(builders: Iterable[OpBuilder]) -> list[OpExtension]:
    """What to pass to setup() as ext_modules, together with cmdclass={"build_ext": build_ext}."""
    return [OpExtension(builder) for builder in builders]


class build_ext(setuptools_build_ext):
    """Compiles each op with compile_op, and writes a record next to it: what was built, or why it was left out."""

    def run(self) -> None:
        """Compiles the ops, after a look at all of them: a wrong setting stops the build before it has begun."""
        try:
            environment.max_jobs(), environment.words("CXXFLAGS"), environment.words("LDFLAGS")
            for ext in self.extensions:
                if isinstance(ext, OpExtension):
                    self._check(ext.builder)
        except (ValueError, BuildError) as error:
            raise SystemExit(f"adamops: {error}") from None
        super().run()

    def _check(self, builder: OpBuilder) -> None:
        """Raises ValueError or BuildError for a variable with a wrong value, or an op that must be built and cannot."""
        wanted, who_says_so = environment.build_switch(builder.NAME)
        if wanted is False:
            return
        Compiler.find()  # raises for a CXX that names no program, where an op would be left out otherwise
        compatible = builder.compatibility()
        if compatible:
            builder.record()  # reads the variables that choose targets or architectures
        elif wanted:
            raise BuildError(f"{builder.NAME} must be built ({who_says_so}) but cannot: {compatible.reason}")

    def build_extension(self, ext: Any) -> None:
        if not isinstance(ext, OpExtension):
            super().build_extension(ext)
            return
        builder = ext.builder
        output = Path(self.get_ext_fullpath(ext.name))
        wanted, who_says_so = environment.build_switch(builder.NAME)
        reason = self._build(builder, output, wanted, who_says_so)
        if reason:
            if wanted:
                raise SystemExit(f"adamops: {builder.NAME} must be built ({who_says_so}) but cannot: {reason}")
            output.unlink(missing_ok=True)
            write_record(output, {"op": builder.NAME, "built": False, "reason": f"left out of the build: {reason}"})
            self._say(f"{builder.NAME} is left out: {reason}")

    def _build(self, builder: OpBuilder, output: Path, wanted: bool | None, who_says_so: str) -> str:
        """Builds the op if that is allowed and possible; returns why it was not built, else an empty string."""
        if wanted is False:
            return who_says_so
        compatible = builder.compatibility()
        if not compatible:
            return compatible.reason
        kept = KeptObjects(Path(self.build_temp) / builder.NAME)
        if self.force:
            shutil.rmtree(kept.folder, ignore_errors=True)
        try:
            record = compile_op(builder, output, kept=kept)
        except BuildError as error:
            return str(error)
        write_record(output, record)
        self._say(f"{builder.NAME} is built, with {record['compiler']}")
        self._say(f"  compiled: {len(record['units']) - len(kept.reused)} of {len(record['units'])} units")
        for name in (*_WORDS_OF_TARGETS, *_WORDS_OF_ARCHITECTURES):
            if record.get(name):
                self._say(f"  {name.replace('_', ' ')}: {record[name]}")
        return ""

    def copy_extensions_to_source(self) -> None:
        """For `pip install -e`: copies the records along with the extensions."""
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            if isinstance(ext, OpExtension):
                inplace, built = self._get_inplace_equivalent(build_py, ext)
                self.copy_file(str(record_path(Path(built))), str(record_path(Path(inplace))))
                if not Path(built).is_file():
                    Path(inplace).unlink(missing_ok=True)  # left by an earlier build

    def _say(self, message: str) -> None:
        print(f"adamops: {message}", flush=True)

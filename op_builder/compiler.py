"""The C++ compiler: finds it, asks what it supports, and runs it. Must not know of ops."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import environment
from .python_extension import pybind11_headers, python_headers
from .spec import BuildError


class Compiler:
    """A C++ compiler that accepts GCC's options (GCC, Clang)."""

    # Order matters: later flags override $CXXFLAGS, which may hold -march=native or -ffast-math.
    # Never fast math or contraction: bit-identical results on every machine are the point of this project.
    # No debug info and no absolute paths, so that the same sources compile to the same bytes.
    COMMON_FLAGS = (
        "-std=c++17",
        "-O3",
        "-g0",
        "-DNDEBUG",  # else pybind11 asks at every change of a reference count whether the GIL is held
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-fast-math",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",  # changes no value, and lets loops with conditions vectorize
        "-Wall",
        "-Wextra",
    )
    LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,-s")

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    @classmethod
    def find(cls) -> Compiler | None:
        """The compiler named by $CXX, else the first of c++, g++ and clang++ on PATH; None if there is none.

        Raises ValueError if $CXX names no program.
        """
        named = environment.words("CXX")
        for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
            if shutil.which(command[0]):
                return cls(command)
        if named:
            raise ValueError(f"CXX={environment.quoted(named)}: there is no program {named[0]!r}; name a C++ compiler")
        return None

    @functools.cached_property
    def version(self) -> str:
        """The compiler's one-line description of itself."""
        return self._ask("--version").splitlines()[0].strip()

    @functools.cached_property
    def machine(self) -> str:
        """The architecture it compiles for: x86_64, aarch64, ..."""
        return self._ask("-dumpmachine").strip().split("-")[0]

    def _ask(self, question: str) -> str:
        result = _run([*self.command, question])
        if result.returncode or not result.stdout.strip():
            words = result.stderr.strip() or "it says nothing"
            raise BuildError(f"{environment.quoted(self.command)} {question} failed: {words}")
        return result.stdout

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether it compiles an empty file with these flags."""
        return _compiles((*self.command, *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull))

    @functools.cached_property
    def problem(self) -> str:
        """Why it cannot compile even an empty file, in its own words; empty if it can."""
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "empty.o"
            try:
                self.run([*self.COMMON_FLAGS, "-x", "c++", "-c", os.devnull, "-o", str(made)])
            except BuildError as error:
                return str(error)
            return "" if made.exists() else f"{environment.quoted(self.command)} makes no object file"

    def run(self, arguments: Sequence[str]) -> None:
        """Runs the compiler with these arguments. Raises BuildError with its output if it fails."""
        command = [*self.command, *arguments]
        result = _run(command)
        if result.returncode:
            raise BuildError(f"{environment.quoted(command)}\nfailed:\n{result.stderr or result.stdout}")


@functools.cache
def _compiles(command: tuple[str, ...]) -> bool:
    return _run(command).returncode == 0


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises BuildError for what cannot be run, such as a file that is no program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error


def cannot_compile_extensions(what: str) -> str:
    """Why C++ extension modules cannot be compiled here; empty if they can. `what` is the subject of the message."""
    if os.name != "posix":
        return f"{what} need a POSIX system with GCC or Clang, this is {platform.system()}"
    try:
        compiler = Compiler.find()
        environment.words("CXXFLAGS"), environment.words("LDFLAGS")
    except ValueError as error:
        return str(error)
    if compiler is None:
        return "no C++ compiler found (set CXX, or install g++ or clang++)"
    try:
        if problem := (compiler.version and compiler.machine and compiler.problem):
            return f"the compiler cannot compile: {problem}"
    except BuildError as error:  # what CXX names is no compiler
        return str(error)
    if not (python_headers() / "Python.h").is_file():
        return f"no Python.h in {python_headers()} (install python3-dev)"
    if pybind11_headers() is None:
        return "pybind11 is not installed"
    return ""

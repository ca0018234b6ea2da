"""Builds the CUDA op as plain C++, its kernels run on the host, from the very sources that nvcc compiles."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from pathlib import Path

from adamops.op_builder.compiler import Compiler
from adamops.op_builder.python_extension import pybind11_headers
from compiled import compiled

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OP_SOURCES = ["cuda/launches.cu", "python/cuda_module.cpp", "python/table.cpp", "cuda/launch_plan.cpp"]


def build(output: str, sources: list[Path], *more_flags: str) -> Path:
    """Compiles the sources into an extension module of that file name, unless that was done before."""
    compiler = Compiler.find()
    assert compiler is not None
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *more_flags, "-x", "c++"]
    includes = [HERE, CSRC, pybind11_headers(), Path(sysconfig.get_paths()["include"])]
    return compiled(output, compiler, flags, includes, sources)


def build_op(*flags: str) -> Path:
    """Compiles the emulated CUDA op, unless that was done before."""
    return build("fused_adam.so", [CSRC / source for source in OP_SOURCES], *flags)


def load(path: Path):
    """The module of that file."""
    name = path.name.split(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    loader.exec_module(module)
    return module


def asan_library() -> str:
    """The address sanitizer's runtime that belongs to the compiler; empty if it has none."""
    compiler = Compiler.find()
    assert compiler is not None
    command = [*compiler.command, "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else ""

"""Builds the CUDA op as plain C++, its kernels run on the host, from the very sources that nvcc compiles."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from adamops.op_builder import CUDARuleBuilder, FusedAdamBuilder
from adamops.op_builder.compiler import Compiler
from adamops.op_builder.nvcc import Nvcc
from adamops.op_builder.python_extension import pybind11_headers
from compiled import compiled

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def build(output: str, sources: list[Path], *more_flags: str, roots: Sequence[Path] = (CSRC,)) -> Path:
    """Compiles the sources into an extension module of that file name, unless that was done before.

    `roots` are the folders of headers.
    """
    compiler = Compiler.find()
    assert compiler is not None
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *more_flags, "-x", "c++"]
    includes = [HERE, *roots, pybind11_headers(), Path(sysconfig.get_paths()["include"])]
    return compiled(output, compiler, flags, includes, sources)


def build_op(*flags: str, builder: CUDARuleBuilder | None = None) -> Path:
    """Compiles the emulated CUDA op of Adam, or of the rule that a builder is for, unless that was done before."""
    builder = builder or FusedAdamBuilder()
    sources = [builder.locate(source) for source in (*builder.cuda_sources(), *builder.sources())]
    name = f"{builder.MODULE.rpartition('.')[2]}.so"
    return build(name, sources, *builder.cxx_args(), *flags, roots=builder.source_roots())


def rounding_check(program: Path, target: str) -> list[str]:
    """The nvcc command that compiles cuda_rounding_check.cu, with the flags of the op."""
    nvcc, builder = Nvcc.find(), FusedAdamBuilder()
    assert nvcc is not None
    source = HERE.parent / "cuda_rounding_check.cu"
    return [nvcc.path, *builder.NVCC_FLAGS, *builder.nvcc_args(), target, f"-I{CSRC}", str(source), "-o", str(program)]


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

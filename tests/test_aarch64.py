"""The CPU kernel compiled for AArch64, under user emulation: the bits of this machine's extension."""

import copy
import io
import itertools
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from adamops.op_builder.compiler import Compiler
from adamops.op_builder.cpu_adam import CPUAdamBuilder
from adamops.op_builder.simd import choose_targets
from compiled import compiled
from kernel_check import (
    BFLOAT16,
    COMBINATIONS,
    FLOAT32,
    canonical,
    random_values,
    scalars_of,
    small_tensors,
    stored,
    table_of,
)

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
COMPILERS = ("aarch64-linux-gnu-g++", "clang++ --target=aarch64-linux-gnu")
QEMU = "qemu-aarch64"
SIZES = (0, 1, 7, 31, 32, 33, 64, 130, 1000)
CHUNK = 32768  # kNormChunk of csrc/grad_norm.h


def cases(seed):
    """Every dtype, mode and kind of tail: header, scalars and arrays."""
    rng = random.Random(seed)
    modes = itertools.product(COMBINATIONS, (0, 1), (0, 1), (0, 1), SIZES)
    whole_chunks = itertools.product(COMBINATIONS, (0,), (0,), (0,), (CHUNK,))
    for (param, grad, state), with_master, l2, amsgrad, numel in itertools.chain(modes, whole_chunks):
        if with_master and (param == FLOAT32 or state != FLOAT32):
            continue
        dtypes = (param, grad, state, state, state, FLOAT32)
        arrays = [stored(random_values(rng, numel, positive=k in (3, 4)), dtype) for k, dtype in enumerate(dtypes)]
        scalars = (rng.choice((1.0, -1.0, 0.3)), 0.9, 1 - 0.9, 0.999, 1 - 0.999, -1e-3 / 0.19, 0.001999**-0.5, 1e-8)
        scalars += (1.0, 0.01) if l2 else (1 - 1e-5, 0.0)
        yield (param, grad, state, with_master, l2, amsgrad), rng.randrange(4), dtypes, scalars, arrays


def step_here(cpu_adam, kind, scalars, arrays):
    """The same step by the extension of this machine."""
    param, grad, state, with_master, l2, amsgrad = kind
    addresses = [[array.buffer_info()[0]] for array in arrays]
    columns = [*addresses[:4], addresses[4] if amsgrad else None, addresses[5] if with_master else None]
    table = table_of(cpu_adam, columns, [len(arrays[0])], (param, grad, state), [1])
    cpu_adam.step_with_scalars(table, [scalars], int(l2), 1)


def norms_here(cpu_adam, grad, dtype):
    """The norms of order 1, 2 and infinity by the extension of this machine."""
    columns = [grad.buffer_info()[0]], [len(grad)], [dtype]
    return [cpu_adam.grad_norm(*columns, order, 1) for order in (1.0, 2.0, math.inf)]


def norms_there(file):
    """The same by the driver, which writes the sum of squares as it is."""
    magnitudes, squares, largest = struct.unpack("3d", file.read(24))
    return [magnitudes, math.sqrt(squares), largest]


def packed(numel, scalars, columns, offset=0, rng_offset=0, **kind):
    """A case as the driver reads it: arrays, or None where there is none."""
    names = ("param", "grad", "state", "master", "lowp_out", "l2", "amsgrad", "zero_grads", "stochastic_rounding")
    parts = [struct.pack("12B2I10f", *(kind.get(name, 0) for name in names), 0, 0, 0, numel, rng_offset, *scalars)]
    for column in (*columns, *[None] * (8 - len(columns))):
        data = b"" if column is None else column.tobytes()
        parts += [struct.pack("2I", len(data), offset * column.itemsize if data else 0), data]
    return b"".join(parts)


def build_driver(compiler, target):
    flags = [*Compiler.COMMON_FLAGS, *target.flags, *CPUAdamBuilder().cxx_args(), "-static"]
    flags += [f"-DADAMOPS_TARGET={target.name}", f'-DADAMOPS_SIMD_HEADER="{target.header}"']
    kernels = ("direct.cpp", "staged.cpp", "grad_norm.cpp", "grad_sum.cpp")
    sources = [HERE / "cross" / "kernel_driver.cpp", *(CSRC / "cpu" / name for name in kernels)]
    return compiled("kernel_driver", compiler, flags, [CSRC], sources)


def test_targets_are_those_of_the_architecture_that_is_built_for(monkeypatch):
    monkeypatch.delenv("ADAMOPS_CPU_TARGETS", raising=False)
    monkeypatch.setattr(Compiler, "accepts", lambda self, flags: True)
    arm = Compiler(["c++"])
    arm.machine = "aarch64"
    assert [target.name for target in choose_targets(arm, "all").enabled] == ["neon"]
    monkeypatch.setattr(Compiler, "find", lambda: arm)
    units = CPUAdamBuilder().compile_units()
    assert "-DADAMOPS_TARGETS(X)=X(neon)" in units[0].flags
    kernels = [unit.object_name for unit in units if "-DADAMOPS_TARGET=neon" in unit.flags]
    assert kernels == [f"cpu_{name}.neon.o" for name in ("direct", "staged", "grad_norm", "grad_sum")]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILERS[0]) and shutil.which(QEMU)),
    reason=f"needs {COMPILERS[0]}, whose libraries Clang takes too, and {QEMU} (Debian packages g++-aarch64-linux-gnu "
    "and qemu-user)",
)
@pytest.mark.parametrize("command", COMPILERS)
def test_neon_has_the_bits_of_this_machine(command, monkeypatch, cpu_adam, seed):
    if not shutil.which(command.split()[0]):
        pytest.skip("needs clang++")
    monkeypatch.setenv("CXX", command)
    monkeypatch.delenv("ADAMOPS_CPU_TARGETS", raising=False)
    compiler = Compiler.find()
    assert compiler.machine == "aarch64"
    (target,) = choose_targets(compiler, "all").enabled
    assert target.name == "neon"
    driver = build_driver(compiler, target)
    given = list(cases(seed))
    small = list(small_tensors(random.Random(seed), SIZES[1:] + (257,)))
    text = b"".join(packed_case(*case) for case in given)
    text += b"".join(
        packed(
            tensor.size,
            scalars_of(1, False, False),
            tensor.columns,
            param=tensor.param,
            grad=tensor.param,
            state=cpu_adam.DTYPES["quantized"],
            lowp_out=BFLOAT16,
            **{
                name: getattr(tensor, name)
                for name in ("master", "amsgrad", "zero_grads", "stochastic_rounding", "rng_offset")
            },
        )
        for tensor in small
    )
    command = [*shlex.split(os.environ.get("ADAMOPS_TEST_QEMU", QEMU)), str(driver)]
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    theirs = io.BytesIO(done.stdout)
    for kind, offset, dtypes, scalars, arrays in given:
        assert norms_there(theirs) == norms_here(cpu_adam, arrays[1], dtypes[1]), (kind, offset, len(arrays[1]))
        step_here(cpu_adam, kind, scalars, arrays)
        for column, (own, dtype) in enumerate(zip(arrays, dtypes, strict=True)):
            assert canonical(read_like(own, theirs), dtype) == canonical(own, dtype), (kind, offset, len(own), column)
    for tensor in small:
        assert norms_there(theirs) == norms_here(cpu_adam, tensor.columns[1], tensor.param), vars(tensor)
        there = copy.deepcopy(tensor)
        there.columns = [None if own is None else read_like(own, theirs) for own in tensor.columns]
        modes = tensor.zero_grads, tensor.stochastic_rounding
        cpu_adam.step_with_scalars(tensor.table(cpu_adam, 1), [scalars_of(1, False, False)], 0, 1, *modes)
        assert there.bits() == tensor.bits(), vars(tensor)
    assert not theirs.read()


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(COMPILERS[0]), reason=f"needs {COMPILERS[0]} (Debian package g++-aarch64-linux-gnu)"
)
def test_what_old_glibc_py_links_for_aarch64_runs_on_glibc_2_17(tmp_path):
    """The unit with the most of libc: threads, dlsym and exceptions. Without the script it needs glibc 2.34."""
    prefix = COMPILERS[0].removesuffix("g++")
    script = [sys.executable, str(HERE.parent / "ci" / "old_glibc.py"), str(tmp_path / "stubs"), prefix]
    stubs = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()

    def newest_glibc(*ldflags):
        output = str(tmp_path / "linked.so")
        source = str(CSRC / "runtime" / "parallel.cpp")
        Compiler(COMPILERS[:1]).run(
            ["-std=c++17", "-fPIC", "-shared", "-Wl,--exclude-libs,ALL", f"-I{CSRC}", source, *ldflags, "-o", output]
        )
        tables = subprocess.run(["readelf", "--wide", "--version-info", output], capture_output=True, text=True).stdout
        return max(tuple(map(int, found.split("."))) for found in re.findall(r"Name: GLIBC_([\d.]+)", tables))

    assert newest_glibc() >= (2, 34)
    assert newest_glibc(*stubs) == (2, 17)


def packed_case(kind, offset, dtypes, scalars, arrays):
    """One of cases()."""
    param, grad, state, master, l2, amsgrad = kind
    return packed(
        len(arrays[0]),
        scalars,
        arrays,
        offset,
        param=param,
        grad=grad,
        state=state,
        master=master,
        l2=l2,
        amsgrad=amsgrad,
    )


def read_like(own, file):
    """An array of the same size from a file."""
    there = own[:0]
    there.frombytes(file.read(len(own) * own.itemsize))
    return there

"""Builds in a checkout compile only what has changed, and never take for current what is not."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from adamops.op_builder import BuildError, Compatibility, CompileUnit, OpBuilder
from adamops.op_builder.compile import compile_op
from adamops.op_builder.nvcc import Nvcc
from adamops.op_builder.objects import KeptObjects

# A module without pybind11, whose units compile in a moment.
SOURCES = {
    "module.cpp": """
        #include <Python.h>
        #include "shared.h"
        #include "odd $ #1 name.h"
        int add_one(int), add_two(int);
        static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(add_two(add_one(SHARED)) + ODD); }
        static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods, 0, 0, 0, 0};
        PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&definition); }
    """,
    "kernel.cpp": "int NAME(int x) { return x + ADDED; }",
    "twice.cpp": '#include "shared.h"\nint twice() { return 2 * SHARED; }',
    "shared.h": "#define SHARED 30\n",
    "odd $ #1 name.h": "#define ODD 9\n",
}
KERNELS, MODULE, TWICE = {"kernel.one.o", "kernel.two.o"}, {"module.o"}, {"twice.o"}
ALL = KERNELS | MODULE | TWICE


class Tiny(OpBuilder):
    """An op of which one source is compiled twice, as kernels are for each SIMD target."""

    NAME, MODULE = "tiny", "somewhere.tiny"
    more_flags = ()

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def source_root(self):
        return self.folder

    def source_roots(self):
        return [self.folder]

    def include_paths(self):
        return [str(self.folder)]

    def compile_units(self):
        kernels = [("one", "-DADDED=1"), ("two", "-DADDED=2")]
        units = [CompileUnit("kernel.cpp", (f"-DNAME=add_{name}", flag), name) for name, flag in kernels]
        return [*units, CompileUnit("module.cpp"), CompileUnit("twice.cpp", self.more_flags)]

    def compatibility(self):
        return Compatibility(True, "it is tiny")


def write(path, text):
    """Writes a file, and waits until what starts next is later by the file system's clock."""
    path.write_text(textwrap.dedent(text))
    later = path.with_name("clock")
    while not later.exists() or later.stat().st_mtime_ns <= path.stat().st_ctime_ns:
        later.touch()
        time.sleep(0.001)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    for name in ("CXXFLAGS", "LDFLAGS", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "sources").mkdir()
    for name, text in SOURCES.items():
        write(tmp_path / "sources" / name, text)
    return Tiny(tmp_path / "sources")


def build(op):
    """Builds the op; returns the names of the objects that were compiled, and what its module answers."""
    kept, output = KeptObjects(op.folder.parent / "kept"), op.folder.parent / "tiny.so"
    units = compile_op(op, output, kept=kept)["units"]
    return set(units) - set(kept.reused), answer_of(output)


def answer_of(extension):
    """Asked in a process of its own, as a process loads a file of one name once."""
    code = f"import sys; sys.path[:0] = [{str(extension.parent)!r}]; import tiny; print(tiny.answer())"
    return int(subprocess.check_output([sys.executable, "-S", "-c", code]))


def test_what_has_not_changed_is_not_compiled_and_gives_the_same_bytes(tiny, tmp_path):
    assert build(tiny) == (ALL, 42)
    first = (tmp_path / "tiny.so").read_bytes()
    for path in tiny.folder.iterdir():
        path.touch()
    assert build(tiny) == (set(), 42)
    assert (tmp_path / "tiny.so").read_bytes() == first
    compile_op(tiny, tmp_path / "without" / "tiny.so")
    assert (tmp_path / "without" / "tiny.so").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "text", "compiled", "answer"),
    [
        ("kernel.cpp", "int NAME(int x) { return x + 2 * ADDED; }", KERNELS, 45),
        ("twice.cpp", "int twice() { return 2; }", TWICE, 42),
        ("shared.h", "#define SHARED 31", MODULE | TWICE, 43),
        ("odd $ #1 name.h", "#define ODD 10", MODULE, 43),
        ("new.h", "", ALL, 42),  # it might have been found before another of its name
    ],
)
def test_a_changed_file_recompiles_what_includes_it(tiny, name, text, compiled, answer):
    build(tiny)
    write(tiny.folder / name, text)
    assert build(tiny) == (compiled, answer)
    assert build(tiny) == (set(), answer)


@pytest.mark.parametrize("name", ["CXXFLAGS", "CPATH"])
def test_a_changed_environment_recompiles_all(tiny, monkeypatch, name):
    build(tiny)
    monkeypatch.setenv(name, "-DOTHER" if name == "CXXFLAGS" else str(tiny.folder))
    assert build(tiny) == (ALL, 42)
    monkeypatch.delenv(name)
    assert build(tiny) == (ALL, 42)


@pytest.mark.smoke
def test_changed_flags_of_a_unit_recompile_it(tiny):
    build(tiny)
    tiny.more_flags = ("-DOTHER",)
    assert build(tiny) == (TWICE, 42)


def test_another_version_of_the_compiler_recompiles_all(tiny, monkeypatch):
    compiler = tiny.folder.parent / "compiler"
    script = '#!/bin/sh\n[ "$1" != --version ] || {{ echo "version {}"; exit; }}\nexec c++ "$@"\n'
    compiler.write_text(script.format(1))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert [build(tiny)[0], build(tiny)[0]] == [ALL, set()]
    compiler.write_text(script.format(2))
    assert build(tiny)[0] == ALL


@pytest.mark.parametrize("damaged", ["module.o", "module.o.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "exchanged"])
def test_what_is_damaged_is_compiled_again(tiny, damaged, damage):
    build(tiny)
    path = tiny.folder.parent / "kept" / damaged
    if damage == "removed":
        path.unlink()
    else:
        other = path.with_name(damaged.replace("module", "twice")).read_bytes()
        path.write_bytes({"cut": path.read_bytes()[:-100], "emptied": b"", "exchanged": other}[damage])
    assert build(tiny) == (MODULE, 42)
    assert build(tiny) == (set(), 42)


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_complete(tiny, tmp_path, monkeypatch):
    """By its compiler, in the middle of an object, once two others are complete."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'for last; do :; done\ncase "$*" in *module.cpp*)\n'
        f'    [ ! -e {tmp_path}/killing ] || {{ echo half > "$last"; kill -9 $PPID; exit; }}\n'
        'esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    for name, value in {"CXX": str(compiler), "MAX_JOBS": "1"}.items():
        monkeypatch.setenv(name, value)
    build(tiny)
    for name in ("module.cpp", "kernel.cpp", "twice.cpp"):
        write(tiny.folder / name, SOURCES[name] + "\n// changed\n")
    (tmp_path / "killing").touch()
    code = f"import pathlib, test_incremental_builds as t; t.build(t.Tiny(pathlib.Path({str(tiny.folder)!r})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (tmp_path / "killing").unlink()
    assert build(tiny) == (MODULE | TWICE, 42)


def test_a_unit_that_does_not_compile_leaves_the_others_current(tiny):
    build(tiny)
    write(tiny.folder / "module.cpp", "this is no C++")
    with pytest.raises(BuildError, match="module.cpp"):
        build(tiny)
    write(tiny.folder / "module.cpp", SOURCES["module.cpp"])
    assert build(tiny) == (set(), 42)  # of the object before


def test_what_is_changed_while_the_compiler_runs_is_compiled_again(tmp_path):
    """The compiler may have read the former contents."""
    write(tmp_path / "source", "former")
    kept, output, runs = KeptObjects(tmp_path / "kept"), tmp_path / "x.o", []

    def compile_with(flags):
        output.write_bytes((tmp_path / "source").read_bytes())
        Path(flags[flags.index("-MF") + 1]).write_text(f"object: {tmp_path / 'source'}\n")
        if not runs:
            write(tmp_path / "source", "new")
        runs.append(output.read_bytes())

    for _ in range(3):
        kept.provide(output, [], compile_with)
    assert runs == [b"former", b"new"]
    assert output.read_bytes() == b"new"


SETUP = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from adamops.op_builder.build_ext import build_ext, extensions
    from setuptools import setup
    from test_incremental_builds import Tiny
    Path("somewhere").mkdir(exist_ok=True)
    tiny = Tiny(Path("sources").resolve())
    setup(name="tiny", packages=["somewhere"], ext_modules=extensions([tiny]), cmdclass={{"build_ext": build_ext}})
"""


def test_build_ext_in_place_says_how_much_it_compiled(tiny, tmp_path):
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    (tmp_path / "setup.py").write_text(textwrap.dedent(SETUP).format(paths=paths))

    def build_in_place(*arguments):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (extension,) = (tmp_path / "somewhere").glob("tiny.*.so")
        return done.stdout, answer_of(extension)

    said, answer = build_in_place()
    assert "adamops: tiny is built, with " in said and "adamops:   compiled: 4 of 4 units" in said
    assert answer == 42
    write(tiny.folder / "kernel.cpp", "int NAME(int x) { return x + 3 * ADDED; }")
    said, answer = build_in_place()
    assert "adamops:   compiled: 2 of 4 units" in said and answer == 48
    assert "adamops:   compiled: 4 of 4 units" in build_in_place("--force")[0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_what_nvcc_compiles_is_kept_whatever_the_number_of_jobs(tiny, monkeypatch):
    class WithKernel(Tiny):
        def compile_units(self):
            command = (shutil.which("nvcc"), "--threads={jobs}", "-arch=sm_90", "-Xcompiler=-fPIC")
            return [*super().compile_units(), CompileUnit("device.cu", command=command)]

        def extra_ldflags(self):
            return [f"-L{Nvcc.find().static_runtime()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    write(tiny.folder / "device.cu", '#include "device.cuh"\n__global__ void kernel() {}\n')
    write(tiny.folder / "device.cuh", "")
    op = WithKernel(tiny.folder)
    assert build(op)[0] == {*ALL, "device.cu.o"}
    monkeypatch.setenv("MAX_JOBS", "1")
    assert build(op)[0] == set()
    write(tiny.folder / "device.cuh", "// changed")
    assert build(op)[0] == {"device.cu.o"}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DOTHER")
    assert build(op)[0] == {*ALL, "device.cu.o"}

"""What tests compile is compiled once for the same sources, flags and compiler, and never used if it is damaged."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import compiled
import pytest
from adamops.op_builder import BuildError
from adamops.op_builder.compiler import Compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMOPS_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def build(cache, tmp_path):
    """Compiles a program that includes a header, with the flags given; returns its path."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "main.cpp").write_text('#include "value.h"\nint main() { return VALUE; }\n')

    def build(*flags, command=("c++",)):
        sources = [tmp_path / "main.cpp"]
        return compiled.compiled("program", Compiler(command), flags, [tmp_path / "include"], sources)

    return build


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_the_same_is_compiled_once_wherever_it_lies(build, cache, tmp_path):
    program = build()
    assert subprocess.run([program]).returncode == 1
    made = program.stat()
    for path in (tmp_path / "main.cpp", tmp_path / "include" / "value.h"):
        path.touch()
    assert build() == program
    shutil.copytree(tmp_path / "include", tmp_path / "elsewhere")
    again = compiled.compiled("program", Compiler(["c++"]), [], [tmp_path / "elsewhere"], [tmp_path / "main.cpp"])
    assert again == program
    assert program.stat().st_ino == made.st_ino and len(entries(cache)) == 1


def test_another_header_source_flag_or_compiler_is_another_entry(build, tmp_path):
    programs = [build(), build("-DOTHER")]
    (tmp_path / "include" / "value.h").write_text("#define VALUE 2\n")
    programs.append(build())
    assert subprocess.run([programs[-1]]).returncode == 2
    (tmp_path / "main.cpp").write_text('#include "value.h"\nint main() { return 1 + VALUE; }\n')
    programs.append(build())
    assert subprocess.run([programs[-1]]).returncode == 3
    other = tmp_path / "compiler"
    other.write_text('#!/bin/sh\n[ "$1" != --version ] || { echo another; exit; }\nexec c++ "$@"\n')
    other.chmod(0o755)
    programs.append(build(command=[str(other)]))
    assert len(set(programs)) == len(programs)


def cut(entry):
    (entry / "program").write_bytes((entry / "program").read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda entry: (entry / "program").unlink(),
        lambda entry: (entry / "digest").unlink(),
        lambda entry: (entry / "digest").write_text(""),
        lambda entry: entry.rename(entry.with_name("unfinished-program")),  # as of a process that was killed
    ],
    ids=["cut", "without its file", "without a digest", "with an empty digest", "unfinished"],
)
def test_a_damaged_entry_is_made_anew(build, cache, damage):
    program = build()
    damage(program.parent)
    assert build() == program
    assert subprocess.run([program]).returncode == 1
    assert entries(cache) == [program.parent.name]


def test_a_failing_compiler_leaves_nothing_and_is_heard(build, cache, tmp_path):
    (tmp_path / "main.cpp").write_text("int main() { this is no C++ }")
    with pytest.raises(BuildError, match=r"(?s)main\.cpp.*failed:.*error: .*this"):
        build()
    assert entries(cache) == []
    (tmp_path / "main.cpp").write_text('#include "lost.h"')
    with pytest.raises(BuildError, match=r"(?s)failed:.*lost\.h"):
        build()
    assert not cache.exists() or entries(cache) == []


def test_of_two_processes_one_makes_it_and_the_other_waits(cache, tmp_path):
    code = f"""
        import pathlib, sys, time
        sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
        import compiled

        def make(folder):
            with open("made", "a") as file:
                file.write("once\\n")
            time.sleep(1)
            (folder / "file").write_text("whole")

        print((compiled.made_once("name", [b"same"], make) / "file").read_text())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["whole\n", "whole\n"]
    assert (tmp_path / "made").read_text() == "once\n"


def fill(size):
    return lambda folder: (folder / "file").write_bytes(bytes(size))


def test_what_was_not_used_for_long_is_removed(cache):
    for name, days in (("old", 31), ("recent", 29), ("used", 31)):
        os.utime(compiled.made_once(name, [], fill(1)), (time.time() - days * 24 * 3600,) * 2)
    compiled.made_once("used", [], fill(1))
    compiled.made_once("new", [], fill(1))
    assert [name.split("-")[0] for name in entries(cache)] == ["new", "recent", "used"]


def test_beyond_a_size_the_least_recently_used_are_removed(cache, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_BYTES", 4000)
    now = time.time()
    for age, name in enumerate("abc"):
        os.utime(compiled.made_once(name, [], fill(1000)), (now + age - 100,) * 2)
    os.utime(compiled.made_once("a", [], fill(1000)), (now - 10,) * 2)
    compiled.made_once("d", [], fill(1000))
    assert [name.split("-")[0] for name in entries(cache)] == ["a", "c", "d"]


def test_what_python_writes_beside_a_module_is_no_damage(cache):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "module.py").write_text("")

    entry = compiled.made_once("package", [b"same"], make)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": str(entry)}
    subprocess.run([sys.executable, "-c", "import module"], env=environment, check=True)
    assert (entry / "__pycache__").is_dir()
    assert compiled.made_once("package", [b"same"], make) == entry
    assert len(made) == 1


def test_without_a_folder_of_its_own_the_cache_is_in_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("ADAMOPS_TEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.cache_folder().name == "adamops-tests"
    assert sys.platform != "linux" or compiled.cache_folder().parent == tmp_path

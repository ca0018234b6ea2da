"""compile_commands.json has the commands of a build. Nothing is compiled here."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "ci" / "compile_commands.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with the checkout's op_builder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("ADAMOPS_CPU_TARGETS", "all")
    spec = importlib.util.spec_from_file_location("compile_commands", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries_of(script, op):
    return [entry for entry in script.entries() if Path(entry["output"]).parent.name == op]


def test_they_are_those_that_a_build_runs(script, monkeypatch, tmp_path):
    ran = []

    def run(self, arguments):
        *command, output = [*self.command, *arguments]
        Path(output).touch()
        ran.append(command)

    monkeypatch.setattr(script.Compiler, "run", run)
    (builder,) = (builder for builder in script.builtin_builders() if builder.NAME == "cpu_adam")
    sys.modules["op_builder.compile"].compile_op(builder, tmp_path / "op.so")
    *compiled, linked = ran
    assert "-shared" in linked
    assert sorted(compiled) == sorted(entry["arguments"][:-1] for entry in entries_of(script, "cpu_adam"))


def test_a_kernel_has_one_for_each_simd_target(script):
    (builder,) = (builder for builder in script.builtin_builders() if builder.NAME == "cpu_adam")
    targets = {target.name for target in builder.target_choice().enabled}
    kernels = {str(builder.locate(name)) for name in builder.kernel_sources()}
    found = {kernel: set() for kernel in kernels}
    for entry in entries_of(script, "cpu_adam"):
        if entry["file"] in kernels:
            found[entry["file"]].add(Path(entry["output"]).suffixes[-2].removeprefix("."))
    assert found == dict.fromkeys(kernels, targets)

"""python -m adamops.report, as a user runs it, in good states and bad."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugins import GOOD, offer, offer_installation

import adamops


def without_columns(environment):
    """So that lines are as long as they are."""
    return {name: value for name, value in environment.items() if name != "COLUMNS"}


def report(tmp_path, *arguments, environment=None, before="", **variables):
    """Runs the report away from the checkout, after some code; returns its output and status."""
    code = f"import runpy, sys\n{before}\nsys.argv[1:] = {list(arguments) or ['--verbose']}\n"
    code += "runpy.run_module('adamops.report', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**without_columns(environment or os.environ), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout, result.returncode


def op_of(output, name):
    return next(op for op in json.loads(output)["ops"] if op["name"].startswith(name))


@pytest.mark.smoke
def test_plain_text(tmp_path, cpu_adam):
    output, status = report(tmp_path)
    assert status == 0
    assert output.isascii() and "\x1b" not in output
    assert "op cpu_adam: ok" in output and "op torch_adam: ok" in output
    for label in (
        "prebuilt:",
        "works here:",
        "can be built here:",
        "in use:",
        "SIMD target chosen:",
        "threads of torch:",
        "CUDA toolkit:",
    ):
        assert label in output
    assert f"SIMD targets in binary:       {' '.join(cpu_adam.targets())}" in output
    first, empty, *_ = output.splitlines()
    assert re.fullmatch(r"adamops \S+ works here: every op .*", first) and not empty


def test_json(tmp_path, cpu_adam):
    output, status = report(tmp_path, "--json")
    found = json.loads(output)
    op = op_of(output, "cpu_adam")
    assert status == 0 and found["ok"] is True
    assert op["origin"] == "built-in" and op["prebuilt"] and op["in_use"] == "prebuilt extension"
    assert op["simd"]["chosen"] == cpu_adam.supported_targets()[0]
    assert op["build"]["built"] and op["build"]["targets"] == cpu_adam.targets()
    assert "-ffp-contract=off" in op["build"]["flags"]
    assert "omp" in op["openmp_runtime"]
    assert found["machine"]["torch"] and found["machine"]["threads"] >= 1


def shown_at(tmp_path, columns, *arguments, **variables):
    command = [sys.executable, "-m", "adamops.report", *arguments]
    environment = {**os.environ, "COLUMNS": str(columns), **variables}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_summary_fits(tmp_path, columns, cpu_adam):
    done = shown_at(tmp_path, columns)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) < 25
    assert all(len(line) <= columns for line in lines if "/" not in line), done.stdout  # paths stay whole
    words = " ".join(done.stdout.split())
    assert f"cpu_adam in use: prebuilt extension, {cpu_adam.supported_targets()[0]}" in words
    assert "torch_adam in reserve: pure PyTorch" in words
    assert f"installed in: {Path(adamops.__file__).parent}" in words and f"torch {torch.__version__}" in words


def test_steps_whose_bits_are_known(tmp_path, cpu_adam):
    done = shown_at(tmp_path, 200, "--check")
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-3:]
    assert [line.split(":")[0] for line in last] == ["ok  AdamW", "ok  DeepSpeedCPUAdam", "ok  FusedAdam"]
    assert all("the expected bits" in line and cpu_adam.supported_targets()[-1] in line for line in last)


def test_steps_with_other_bits_are_a_failure(tmp_path, monkeypatch):
    before = "from adamops import _smoke_step; _smoke_step.DIGEST = 'another'"
    output, status = report(tmp_path, "--check", before=before)
    assert status == 1 and "NOT OK  DeepSpeedCPUAdam: other bits than expected:" in output
    verdict = " ".join(output.partition("\n\n")[0].split())
    assert "Missing or broken: the steps of AdamW, the steps of DeepSpeedCPUAdam, the steps of FusedAdam." in verdict


def test_steps_without_an_op(tmp_path):
    before = "from adamops.op_builder import CPUAdamBuilder as B; B.MODULE = 'adamops._native.missing'"
    output, status = report(tmp_path, "--check", before=before, CXX="/nonexistent")
    assert status == 1 and "NOT OK  FusedAdam: " in output and "no program '/nonexistent'" in output


def test_a_copy_that_hides_an_installation_is_named(tmp_path):
    """As a checkout does in its own folder, after pip install."""
    offer_installation(tmp_path / "site")
    done = shown_at(tmp_path, 500, PYTHONPATH=os.pathsep.join([*sys.path, str(tmp_path / "site")]))
    assert f"which hides the adamops installed in {tmp_path / 'site'}: start Python in another folder" in done.stdout


@pytest.mark.parametrize("script, name", [("adamops-report", "adamops-report"), (None, "python -m adamops.report")])
def test_usage_has_the_name_it_was_called_by(tmp_path, script, name):
    command = ["-m", "adamops.report"]
    if script is not None:
        (tmp_path / script).write_text("from adamops.report import main\nmain()\n")
        command = [script]
    command = [sys.executable, *command, "--nonsense"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.stderr.startswith(f"usage: {name} [-h]") and f"\n{name}: error: " in done.stderr


def test_python_m_adamops_names_the_tools(tmp_path):
    done = subprocess.run([sys.executable, "-m", "adamops"], cwd=tmp_path, capture_output=True, text=True)
    for tool in re.findall(r"python -m (adamops\S*)", done.stdout):
        assert importlib.util.find_spec(tool) is not None
    assert len(re.findall(r"python -m adamops\.\w+ ", done.stdout)) == 4
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("target", ["avx2", "baseline"])
def test_a_forced_target_is_shown(tmp_path, target, cpu_adam):
    if target not in cpu_adam.supported_targets():
        pytest.skip(f"this CPU or build has no {target}")
    output, status = report(tmp_path, ADAMOPS_SIMD=target)
    assert status == 0
    assert f"{target} (forced by ADAMOPS_SIMD)" in output


def test_an_unknown_target_is_an_error(tmp_path):
    output, status = report(tmp_path, ADAMOPS_SIMD="mmx")
    assert status == 1
    assert "ADAMOPS_SIMD='mmx' is not valid on this machine; use one of" in output
    assert re.match(r"adamops \S+ is NOT OK here\. Missing or broken: cpu_adam\.\n", output)


def test_a_misspelt_variable_is_named(tmp_path):
    output, status = report(tmp_path, ADAMOPS_NUM_THREAD="2", ADAMOPS_BUILD_CPUADAM="0", ADAMOPS_TEST_ANYTHING="1")
    assert status == 0
    assert "nothing reads ADAMOPS_NUM_THREAD; is ADAMOPS_NUM_THREADS meant?" in output
    assert "nothing reads ADAMOPS_BUILD_CPUADAM; is ADAMOPS_BUILD_CPU_ADAM meant?" in output
    assert "nothing reads ADAMOPS_TEST_ANYTHING" not in output


def test_without_torch(tmp_path):
    before = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)"
    )
    output, status = report(tmp_path, before=before + "\nsys.modules['torch'] = None")
    assert status == 1
    assert "op cpu_adam: ok" in output
    assert "no: torch is not installed" in output
    assert "torch:                        none" in output


def test_nothing_prebuilt_and_no_compiler(tmp_path):
    before = "from adamops.op_builder import CPUAdamBuilder as B; B.MODULE = 'adamops._native.missing'"
    output, status = report(tmp_path, before=before, PATH="/nonexistent", ADAMOPS_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 1
    assert "no: no C++ compiler found" in output
    assert "torch_adam (pure PyTorch)" in output


def test_nothing_prebuilt_but_a_compiler_builds_nothing(tmp_path):
    before = "from adamops.op_builder import CPUAdamBuilder as B; B.MODULE = 'adamops._native.missing'"
    output, status = report(tmp_path, before=before, ADAMOPS_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 1
    assert output.startswith(f"adamops {adamops.__version__} is not compiled here yet: the first step does that, once")
    assert "not built yet: the first step builds it, in about a minute" in output
    assert not list(tmp_path.glob("cache/*/*.so"))


def test_an_extension_that_does_not_load(tmp_path):
    (tmp_path / "broken_native").mkdir()
    (tmp_path / "broken_native" / "__init__.py").touch()
    before = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from adamops.op_builder import CPUAdamBuilder as B
from adamops.op_builder.python_extension import extension_suffix
B.MODULE = 'broken_native.cpu_adam'
open({str(tmp_path / "broken_native")!r} + '/cpu_adam' + extension_suffix(), 'w').write('no ELF file')
"""
    output, status = report(tmp_path, before=before, CXX="/nonexistent")
    assert status == 1
    assert "OpUnavailableError" in output and "CXX=/nonexistent: there is no program '/nonexistent'" in output


def test_a_good_plugin(tmp_path):
    environment = offer(tmp_path, "good_op", GOOD, "good:Builder")
    output, status = report(tmp_path, environment=environment)
    assert status == 0
    assert "op good_op: ok" in output and "plugin of fake-ops" in output


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("class Builder:\n    def __init__(self): raise KeyError('x')", "KeyError: 'x'"),
        ("Builder = 42", "is not an op builder: it has no NAME, compatibility, is_prebuilt, load"),
        (GOOD.replace('"good_op"', "None"), "is not an op builder: its NAME is None"),
        (GOOD.replace('"good_op"', '"cpu_adam"'), "the name 'cpu_adam' is taken by built-in"),
        (
            GOOD.replace("return Compatibility(True, 'always')", "") + "    def compatibility(self): 1 / 0",
            "ZeroDivisionError",
        ),
        (GOOD + "    def load_prebuilt(self): raise ImportError('lost')\n    def source_root(self): 1 / 0", "lost"),
    ],
    ids=["raises", "exits", "constructor", "nonsense", "nameless", "name-taken", "incompatible", "unloadable"],
)
def test_a_broken_plugin_costs_a_line(tmp_path, code, message):
    environment = offer(tmp_path, "bad_op", code, "bad:Builder")
    output, status = report(tmp_path, environment=environment)
    assert status == 1
    assert message in output
    assert "op cpu_adam: ok" in output
    step = "import torch; from adamops import DeepSpeedCPUAdam as A; p = torch.nn.Parameter(torch.ones(3)); "
    step += "p.grad = torch.ones(3); A([p]).step(); print(p.mean().item() < 1)"
    ours = subprocess.run([sys.executable, "-c", step], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ours.stdout == "True\n", ours.stderr

"""What the report must not do: build, call py-cpuinfo, mix a plugin's output into its own."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from plugins import python_path

import adamops
from adamops import op_builder

BINARY = op_builder.get("cpu_adam").prebuilt_path()
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["report", *sys.argv[1:]]
runpy.run_module("adamops.report", run_name="__main__")
"""


@pytest.fixture
def report(tmp_path):
    """Runs the report with arguments and environment variables; `code` stands in for `-m adamops.report`."""
    (tmp_path / "cwd").mkdir()

    def run(*arguments, code=None, **variables):
        clean = {n: value for n, value in os.environ.items() if not n.startswith("ADAMOPS_") and n != "COLUMNS"}
        return subprocess.run(
            [sys.executable, *(["-c", code] if code else ["-m", "adamops.report"]), *arguments],
            cwd=tmp_path / "cwd",
            env={**clean, "ADAMOPS_CACHE_DIR": str(tmp_path / "cache"), **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the installed package, whatever kind of installation it is, and a place to break its extension."""
    site = tmp_path / "broken"
    package = site / "adamops"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(adamops.__file__).parent, package, ignore=ignore)
    for name, folder in (
        ("op_builder", Path(op_builder.__file__).parent),
        ("csrc", op_builder.CPUAdamBuilder().source_root()),
    ):
        if not (package / name).exists():
            shutil.copytree(folder, package / name, ignore=ignore)
    return site


def make_plugin(folder, code):
    info = folder / "the_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: the-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adamops.op_builders]\nop = the_plugin:Builder\n")
    (folder / "the_plugin.py").write_text(textwrap.dedent(code))
    return str(folder)


def op_of(result, name):
    return next(op for op in json.loads(result.stdout)["ops"] if op["name"] == name)


@pytest.mark.slow
@pytest.mark.parametrize("prebuilt", ["prebuilt", "missing"])
def test_is_quick_apart_from_torch(report, copied_package, prebuilt):
    """A second, interpreter start left out; py-cpuinfo alone takes longer. Even where the cache has to be asked."""
    code = "import time; start = time.perf_counter()\nimport atexit, sys\n"
    code += "atexit.register(lambda: print('seconds', time.perf_counter() - start, 'cpuinfo' in sys.modules, "
    code += "file=sys.stderr))\n" + WITHOUT_TORCH
    where = {} if prebuilt == "prebuilt" else {"PYTHONPATH": python_path(copied_package)}
    results = [report(code=code, **where).stderr.split("seconds ")[1].split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in results) < 1
    assert {cpuinfo for _, cpuinfo in results} == {"False"}


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("ADAMOPS_CPU_TARGETS", "avx3", "native, all, or a list of"),
        ("ADAMOPS_BUILD_OPS", "yes", "use 0 (never build), 1 (must build)"),
        ("ADAMOPS_BUILD_CPU_ADAM", "2", "use 0 (never build), 1 (must build)"),
        ("MAX_JOBS", "many", "positive integer"),
        ("ADAMOPS_CACHE_DIR", __file__, "is not a folder"),
    ],
)
def test_invalid_build_variable_is_shown_once(report, name, value, valid):
    result = report(**{name: value})
    assert result.returncode == 1
    assert result.stdout.count(f"{name}={value!r}") == 1
    assert valid in result.stdout
    assert "is NOT OK here. Missing or broken: environment variables.\n" in result.stdout


def test_broken_torch(report, tmp_path):
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: no such file')")
    result = report("--json", PYTHONPATH=python_path(tmp_path / "site"))
    assert "libtorch.so: no such file" in json.loads(result.stdout)["machine"]["torch"]
    assert result.returncode == 1


PLUGIN = """
from adamops.op_builder import Compatibility
print("a plugin that prints")

class Builder:
    NAME = "op"
    def compatibility(self): return Compatibility({compatible}, "it is what it is")
    def is_prebuilt(self): return {prebuilt}
    def load(self):
        assert {prebuilt}, "the report must build nothing"
        return object()
"""


@pytest.mark.parametrize(
    ("compatible", "prebuilt", "in_use"),
    [
        (True, True, "prebuilt extension"),
        (False, True, "prebuilt extension"),
        (True, False, "a build at first use, not done yet"),
        (False, False, "nothing"),
    ],
)
def test_plugin_of_the_bare_contract_that_prints(report, tmp_path, compatible, prebuilt, in_use):
    site = make_plugin(tmp_path / "site", PLUGIN.format(compatible=compatible, prebuilt=prebuilt))
    result = report("--json", PYTHONPATH=python_path(site))
    op = op_of(result, "op")
    assert (op["compatible"], op["reason"], op["in_use"]) == (compatible, "it is what it is", in_use)
    assert result.returncode == (0 if prebuilt else 1)


def test_broken_extension_is_reported_and_not_rebuilt(report, copied_package, tmp_path):
    (copied_package / "adamops" / "_native" / BINARY.name).write_text("not an extension\n")
    result = report("--json", PYTHONPATH=python_path(copied_package))
    op = op_of(result, "cpu_adam")
    assert result.returncode == 1
    assert "the prebuilt extension does not load" in op["error"]
    assert op["in_use"] == "a build at first use, not done yet"
    assert "building" not in result.stderr
    assert not list((tmp_path / "cache").glob("*/*.so"))


def test_odd_characters_do_not_break_a_pipe(report):
    result = report("--verbose", PYTHONIOENCODING="ascii", ADAMOPS_CACHE_DIR="/tmp/caché")
    assert result.returncode == 0, result.stderr
    assert "/tmp/cach\\xe9" in result.stdout


def test_a_compiler_that_does_not_run_leaves_the_prebuilt_op_in_use(report):
    done = report("--json", CXX="false")
    (op,) = [op for op in json.loads(done.stdout)["ops"] if op["name"] == "cpu_adam"]
    assert not op["compatible"] and "false --version failed" in op["reason"]
    assert op["ok"] and op["in_use"] == "prebuilt extension"


def test_entry_points_of_others_that_cannot_be_read_cost_nothing(tmp_path, report):
    for name, content in (("one", b"[adamops.op_builders]\ngarbage line\n"), ("two", b"[x]\na = \xff\xfe\n")):
        folder = tmp_path / "site" / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_bytes(content)
    # torch itself reads all entry points, unless it is told not to.
    done = report("--json", PYTHONPATH=python_path(tmp_path / "site"), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert {op["name"] for op in json.loads(done.stdout)["ops"]} >= {"cpu_adam", "torch_adam"}, done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m adamops.report | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_closed_output_leaves_the_exit_status(tmp_path):
    command = f"{sys.executable} -m adamops.report >&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode in (0, 1)

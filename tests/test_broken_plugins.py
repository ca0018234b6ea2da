"""What plugins, caches and environment variables may do wrong: a clear line each, and nothing left behind."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from adamops.op_builder import BuildError, CPUAdamBuilder, cache
from adamops.op_builder.compiler import cannot_compile_extensions
from adamops.op_builder.python_extension import read_record, record_path
from plugins import offer

import adamops
from adamops import op_builder, report

PLUGIN = """
import os, signal, time
from adamops.op_builder import Compatibility, OpBuilder

class Builder:
    NAME = "op"
    def compatibility(self): return Compatibility(True, "always")
    def is_prebuilt(self): return True
    def load(self): return object()
    def build_record(self): return {record}
    {method}
"""
WHOLE = {"built": True, "compiler": "c++", "machine": "x86_64", "flags": ["-O3"]}


def describe(tmp_path, monkeypatch, record=None, method="", seconds=60.0):
    """What the report says of a plugin, and whether another one is still reported."""
    offer(tmp_path, "op", PLUGIN.format(record=repr(record), method=method), "the_plugin:Builder")
    crashes = "SIGSEGV" in method
    if crashes:
        offer(
            tmp_path, "other", PLUGIN.replace('"op"', '"other"').format(record=None, method=""), "other:Builder", "more"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(report, "PLUGIN_SECONDS", seconds)
    found = {op["name"]: op for op in report._describe_plugins({})}
    for op in found.values():
        assert all(isinstance(text, str) for row in report.rows_of_op(op) for text in row[:2])
    if crashes:
        assert found["other"]["ok"]
    return found["op"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["built"], "build_record() returned a list, expected a dict or None"),
        ({"built": True}, "build_record() has None for 'compiler', expected a str"),
        ({**WHOLE, "flags": "-O3"}, "build_record() has '-O3' for 'flags', expected a list"),
        ({**WHOLE, "targets": ["avx2"]}, "build_record() has None for 'targets_requested', expected a str"),
    ],
)
def test_a_build_record_that_is_none_costs_a_line(tmp_path, monkeypatch, record, message):
    op = describe(tmp_path, monkeypatch, record)
    assert not op["ok"]
    assert message in op["error"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("def load(self): raise SystemExit(3)", "SystemExit: 3"),
        ("def compatibility(self): raise BaseException('odd')", "BaseException: odd"),
        ("def is_prebuilt(self): raise KeyboardInterrupt", "its process was ended by SIGINT"),
        ("def load(self): os._exit(7)", "ended its process with exit status 7"),
        ("def load(self): os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by SIGSEGV"),
        ("os.abort()", "its process was ended by SIGABRT"),
    ],
)
def test_a_plugin_that_ends_the_process_costs_a_line(tmp_path, monkeypatch, method, message):
    op = describe(tmp_path, monkeypatch, method=method)
    assert not op["ok"]
    assert message in op["error"]


def test_a_plugin_that_hangs_costs_a_line(tmp_path, monkeypatch):
    op = describe(tmp_path, monkeypatch, method="def load(self): time.sleep(1000)", seconds=0.5)
    assert "the plugin did not answer within 0.5 s" in op["error"]


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS", "LDFLAGS"])
def test_unbalanced_quotes_are_a_reason_in_words(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "c++ '-O3")
    monkeypatch.setenv("ADAMOPS_CACHE_DIR", str(tmp_path / "cache"))
    message = f'{name}="c++ \'-O3" is not valid: No closing quotation; quote it as for a shell'
    assert cannot_compile_extensions("ops") == message
    assert CPUAdamBuilder().compatibility().reason == message
    with pytest.raises(BuildError, match="No closing quotation"):
        CPUAdamBuilder().jit_load()
    assert report._environment([])["errors"] == [message]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["[]", "3", '"built"', "null", "{", ""])
def test_a_damaged_record_is_none(tmp_path, text):
    extension = tmp_path / "op.so"
    extension.write_bytes(b"")
    record_path(extension).write_text(text)
    assert read_record(extension) is None
    assert not cache._is_whole(extension)


def test_parents_of_the_cache_folder_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        cache._make_private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")]
    assert modes == [0o700] * 3


def test_what_killed_builds_left_is_removed_by_the_next(tmp_path, monkeypatch):
    """A build works inside its cache folder, where the next one finds what is left."""
    scratch = []

    def compile_op(builder, output, scratch_root):
        scratch.append(scratch_root)
        Path(output).write_bytes(b"built")
        return {"op": builder.NAME}

    monkeypatch.setattr(cache, "compile_op", compile_op)
    extension = tmp_path / "cpu_adam-0" / "cpu_adam.so"
    left = extension.parent / "adamops-cpu_adam-x1y2"
    left.mkdir(parents=True)
    (left / "unit.o").write_bytes(b"half")
    (extension.parent / "unfinished-1.so").write_bytes(b"half")
    cache._build(CPUAdamBuilder(), extension)
    assert scratch == [extension.parent]
    assert sorted(path.name for path in extension.parent.iterdir()) == ["cpu_adam.build.json", "cpu_adam.so"]


def test_submodules_are_there_by_attribute():
    folder = Path(adamops.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    there = {name for name in modules if not name.startswith("_")} | {"op_builder"}  # in a checkout it is elsewhere
    assert set(adamops._SUBMODULES) == there
    code = "import adamops, sys; adamops.op_builder.get('cpu_adam'); assert 'torch' not in sys.modules; "
    code += "[getattr(adamops, name) for name in adamops._SUBMODULES]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="module 'adamops' has no attribute 'nothing'"):
        adamops.nothing  # noqa: B018


def test_an_error_in_importing_a_submodule_keeps_its_cause(tmp_path):
    code = "import sys; sys.modules['torch'] = None\nimport adamops\nadamops.deepspeed"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ModuleNotFoundError: import of torch halted" in result.stderr


def test_builders_of_built_in_ops_are_made_once():
    assert [op.name for op in op_builder.builtin_ops()] == ["cpu_adam", "fused_adam", "torch_adam"]
    assert all(op.builder is op_builder.get(op.name) for op in op_builder.builtin_ops())

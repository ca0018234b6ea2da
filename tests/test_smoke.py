"""`pytest -m smoke` touches every room once, and holds nothing that takes long."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The files of tests that stand for the rooms: ops and their builds; steps on both paths; what surrounds them.
ROOMS = {
    *("test_op_builder", "test_incremental_builds", "test_layers", "test_described_once", "test_report"),
    *("test_bits", "test_fused_adam", "test_mixed_grads", "test_low_precision", "test_subgroup"),
    *("test_clipping", "test_async", "test_in_backward", "test_optimizer", "test_loading", "test_errors"),
}


def collected(expression, *files):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", expression]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_smoke_tests_cover_the_rooms_and_none_is_slow():
    tests = collected("smoke")
    files = sorted({name.partition("::")[0] for name in tests})
    assert {Path(name).stem for name in files} == ROOMS
    assert not any("CUDA" in name for name in tests)  # the emulated op may have to be compiled first
    assert collected("smoke and (slow or frameworks)", *files) == []

"""The scripts whose figures the docs quote, each with little to measure: they run, and write what they should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "ci").is_dir(), reason="needs a checkout")]


def run(folder, script, *arguments):
    """What a script prints, in a folder of its own."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, ROOT / "ci" / script, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_quality(tmp_path, cpu_adam):
    kinds = ["--kinds", "float32, 8-bit states"]
    shown = run(tmp_path, "quality.py", "--steps=20", "--seeds=1", *kinds, "--json=losses.json", "--plot=quality.png")
    assert "float32, torch.optim.AdamW" in shown and "float32, 8-bit states" in shown
    assert is_picture(tmp_path / "quality.png") and (tmp_path / "losses.json").stat().st_size > 500


def test_quantization_formats(tmp_path, cpu_adam):
    shown = run(tmp_path, "quantization_formats.py", "--steps", 2, 4)
    assert "exp_avg_sq" in shown


def test_offload_overlap(tmp_path, cpu_adam):
    small = ["--layers=2", "--elements=5000", "--compute-ms=1", "--steps=3"]
    shown = run(tmp_path, "offload_overlap.py", *small, "--plot=steps.png", "--trace=trace.json")
    assert "update_in_backward=True" in shown and is_picture(tmp_path / "steps.png")


def test_grad_sums(tmp_path, cpu_adam):
    shown = run(tmp_path, "grad_sums.py", "--elements=20000", "--rounds=2")
    assert len(re.findall(r"one after another .* in one pass .* \d\.\d\d x$", shown, re.MULTILINE)) == 3


def test_memory(tmp_path, cpu_adam):
    run(tmp_path, "memory.py", f"--elements={2**20}", "--json=memory.json")
    assert "bytes_per_param" in (tmp_path / "memory.json").read_text()


def test_torchrun_steps(tmp_path, cpu_adam):
    assert re.match(
        r"rank 0: torch has \d+ threads, a step \d+ \(.*\d\.\d\d x adamops$", run(tmp_path, "torchrun_steps.py").strip()
    )


def test_charts_are_drawn_from_what_lies_in_the_repository(tmp_path):
    """In a copy: those in the repository are left alone."""
    for folder in ("ci", "docs/figures", "adamops"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "op_builder", tmp_path / "op_builder")
    for picture in (tmp_path / "docs" / "figures").glob("*.png"):
        picture.unlink()
    command = [sys.executable, tmp_path / "ci" / "draw_charts.py"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True, timeout=300)
    for name in ("speed.png", "memory.png"):
        assert is_picture(tmp_path / "docs" / "figures" / name)

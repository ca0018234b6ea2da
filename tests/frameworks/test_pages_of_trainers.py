"""The scripts on the pages about Hugging Face and Lightning, in a process and a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lightning")

from frameworks.pages import script_of  # noqa: E402

pytestmark = pytest.mark.frameworks


def output_of(script, folder):
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_huggingface(tmp_path):
    lines = output_of(script_of("huggingface"), tmp_path).splitlines()
    losses = [float(line.split("'loss': '")[1].split("'")[0]) for line in lines if "'loss': '" in line]
    assert len(losses) == 3
    assert losses[-1] < 3.5 < losses[0]  # of 5.5 at random


def test_lightning(tmp_path):
    loss = float(output_of(script_of("lightning"), tmp_path).split()[-1])
    assert loss < 3.0  # of 5.5 at random

"""The scripts of docs/frameworks/fsdp.md and checkpoints.md, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks.pages import script_of

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]


def output_of(name, folder):
    """What the script prints, run from a file in another folder."""
    file = folder / "script.py"
    file.write_text(script_of(name))
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_in(output):
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", output)]


def test_training_of_the_page(tmp_path):
    losses = losses_in(output_of("fsdp", tmp_path))
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_checkpoints_of_the_page(tmp_path):
    output = output_of("checkpoints", tmp_path)
    losses = losses_in(output)
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert [int(step) for step in re.findall(r"step ([0-9]+)", output)] == list(range(1, 11))
    assert output.count("4 processes") == output.count("2 processes") == 5

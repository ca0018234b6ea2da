"""The script of docs/frameworks/torch.md runs, and trains."""

import os
import re
import subprocess
import sys

import pytest
from frameworks.pages import script_of

pytestmark = pytest.mark.frameworks


def test_the_script_of_the_page_trains(tmp_path):
    code = "import torch; torch.set_num_threads(1)\n" + script_of("torch")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2, done.stdout
    assert (tmp_path / "checkpoint.pt").exists()

"""README's commands, as they stand there. `pip install .` and what follows it: tests/test_packaging.py."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    line.partition("#")[0].strip() for line in re.findall(r"^    (\w.*)$", (ROOT / "README.md").read_text(), re.M)
]
SCRIPTS = [command for command in COMMANDS if command.startswith("bash ")]
TOOLS = [command for command in COMMANDS if command.startswith(("adamops-report", "python -m adamops"))]


def test_these_commands_are_there():
    assert {"bash ci/demo.sh", "bash ci/test.sh"} <= set(SCRIPTS)
    assert {"pip install .", "adamops-report", "python -m adamops.bench"} <= set(COMMANDS)


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_are_scripts(command):
    _, path = command.split()
    assert subprocess.run(["bash", "-n", ROOT / path]).returncode == 0


@pytest.mark.parametrize("command", sorted(set(TOOLS)))
def test_tools_run(command, tmp_path):
    """The benchmark, which takes minutes, shows its help."""
    scripts = sysconfig.get_path("scripts")
    if command == "adamops-report" and not shutil.which(command, path=scripts):
        pytest.skip("adamops is not installed here")
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    words = [sys.executable if word == "python" else word for word in command.split()]
    words += ["--help"] if "bench" in command else []
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bench" in command or " works here: " in done.stdout.splitlines()[0]

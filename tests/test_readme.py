"""README's commands, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import adamops

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^    (\w.*)$", README, re.M)]
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


# A newcomer ---------------------------------------------------------------------------------------------------------


class Newcomer:
    """Someone with a fresh clone, and a shell that has Python, the system's programs and the way to PyPI."""

    def __init__(self, folder):
        self.home, self.clone = folder / "home", folder / "adamops"
        self.home.mkdir()
        self.path = [str(Path(sys.base_prefix, "bin")), "/usr/bin", "/bin"]
        self.type(f"git clone --quiet '{ROOT}' '{self.clone}'", cwd=folder)

    def type(self, command, cwd=None):
        """What a command writes, which must end well."""
        network = {name: value for name, value in os.environ.items() if re.match("PIP_|SSL_|https?_proxy", name)}
        for configuration in (Path.home() / ".pip/pip.conf", Path.home() / ".config/pip/pip.conf"):
            if configuration.exists():
                network.setdefault("PIP_CONFIG_FILE", str(configuration))
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.clone,
            env={**network, "HOME": str(self.home), "PATH": os.pathsep.join(self.path), "LANG": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout")
    if not Path(sys.base_prefix, "bin", "python3").exists():
        pytest.skip("needs a python3 beside this one")
    folder = tmp_path_factory.mktemp("newcomer")
    yield Newcomer(folder)
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.slow
def test_the_demo_from_a_fresh_clone(newcomer):
    """With fewer steps than the default's."""
    shown = newcomer.type("bash ci/demo.sh --steps 60")
    assert " works here: " in shown
    assert "Next: change torch.optim.AdamW to adamops.AdamW" in shown
    assert list((newcomer.clone / "demo_output").glob("*.png"))


@pytest.mark.slow
def test_the_installation_from_a_fresh_clone(newcomer):
    """The commands as they stand, in one shell; with a CPU build of torch from before, as README says."""
    block = README[README.index("    python3 -m venv") :].partition("\n\n")[0]
    environment, *others = map(str.strip, block.splitlines())
    shown = newcomer.type("\n".join(["set -e", environment, "pip install --quiet torch==2.13.0", *others]))
    assert others == ["pip install .", "adamops-report"]
    assert " works here: " in shown.partition("Successfully installed")[2].splitlines()[1]
    newcomer.path.insert(0, str(newcomer.clone / ".venv" / "bin"))
    for command in TOOLS:
        newcomer.type(command + (" --help" if command.endswith("bench") else ""), cwd=newcomer.home)
    shown = newcomer.type("adamops-report --check")
    assert shown.startswith(f"adamops {adamops.__version__} works here: every op that this machine can use is compiled")
    assert shown.count(": the expected bits") == 3
    used = newcomer.type("python -c 'import adamops; print(adamops.__file__)'", cwd=newcomer.home)
    assert Path(used.strip()).is_relative_to(newcomer.clone / ".venv")


@pytest.mark.slow
def test_the_tests_from_a_fresh_clone(newcomer):
    """All but the tests themselves: what runs this is that script."""
    shown = newcomer.type("bash ci/test.sh --collect-only -q -k test_scripts_are_scripts")
    assert re.search(r"^2/\d+ tests collected", shown.splitlines()[-1]), shown[-2000:]

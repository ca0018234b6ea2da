"""The workflows and hooks for contributors: valid, safe, and calling what exists. Each check fails on a broken file.

Needs no network. What a workflow does on GitHub's machines is seen only there.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs a git checkout")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CI, RELEASE = (ROOT / ".github" / "workflows" / name for name in ("ci.yml", "release.yml"))


def read(text):
    return YAML(typ="safe").load(text)


def tool(name):
    """A linter of this environment, whether or not it is active."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is not installed; it is in the extra `test`"
    return path


def linted(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return "" if done.returncode == 0 else done.stdout + done.stderr or "failed"


def of_schema(path):
    return linted(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(path))


def of_security(path):
    return linted(tool("zizmor"), "--offline", "--no-progress", str(path))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def of_pins(path):
    """What is used from other repositories without a commit's full SHA and the version in a comment."""
    uses = re.findall(r"^.*\buses:.*$", path.read_text(), re.MULTILINE)
    return [line for line in uses if not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*$", line)]


def of_permissions(path):
    """Where more is allowed than reading the repository; only publishing needs more."""
    workflow = read(path.read_text())
    found = [] if workflow.get("permissions") == {"contents": "read"} else ["the workflow"]
    for name, job in workflow["jobs"].items():
        publishes = any("gh-action-pypi-publish" in step.get("uses", "") for step in job.get("steps", []))
        allowed = {"id-token": "write"} if publishes else None
        if job.get("permissions") != allowed or (publishes and job.get("environment", {}).get("name") != "pypi"):
            found.append(name)
    return found


def of_mentions(path):
    """What a workflow's commands mention that does not exist: scripts, extras, pytest's markers."""
    commands = "\n".join(step["run"] for step in steps(read(path.read_text())) if "run" in step)
    scripts = [name for name in re.findall(r"\bci/[\w./-]+", commands) if not (ROOT / name).is_file()]
    wanted = {extra.strip() for extras in re.findall(r"\.\[([^\]]*)\]", commands) for extra in extras.split(",")}
    extras = wanted - set(PROJECT["project"]["optional-dependencies"])
    words = {word for expression in re.findall(r"-m \"([^\"]*)\"", commands) for word in re.findall(r"\w+", expression)}
    markers = words - {"not", "and", "or"} - set(names_of_markers())
    return sorted([*scripts, *extras, *markers])


def names_of_markers():
    return [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]


def ordered(versions):
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")])


def declared_pythons():
    found = [re.fullmatch(r".*:: (3\.\d+)", classifier) for classifier in PROJECT["project"]["classifiers"]]
    return ordered(match.group(1) for match in found if match)


def declared_torches():
    """The releases of torch that ci/torch_matrix.sh tries."""
    (runs,) = re.findall(r"runs=\((python3=.*)\)", (ROOT / "ci" / "torch_matrix.sh").read_text())
    return ordered(run.partition("=")[2] for run in runs.split())


def of_versions(path):
    """What differs between the Pythons and torches that a workflow runs and the oldest and newest declared."""
    workflow = read(path.read_text())
    pythons, torches = declared_pythons(), declared_torches()
    found = []
    tested = {row["python"] for row in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]}
    if tested != {pythons[0], pythons[-1]}:
        found.append(f"tests run on {ordered(tested)}")
    (command,) = [step["run"] for step in steps(workflow) if "ci/torch_matrix.sh" in step.get("run", "")]
    runs = dict(re.findall(r"python(3\.\d+)=([\d.]+)", command))
    if runs != {pythons[0]: torches[0], pythons[-1]: torches[-1]}:
        found.append(f"wheels are tried with {runs}")
    return found


def of_released_pythons(path):
    """What differs between the Pythons that are set up, those that wheels are built for, and those declared."""
    workflow = read(path.read_text())
    found = []
    for step in steps(workflow):
        if "setup-python@" in step.get("uses", "") and step["with"]["python-version"].split() != declared_pythons():
            found.append("the Pythons that are set up")
        if "ci/wheel.sh" in step.get("run", ""):
            named = step["env"]["PYTHONS"].split()
            if named != [f"python{version}" for version in declared_pythons()]:
                found.append(f"wheels are built for {named}")
    return found


EVERY_FILE = [of_schema, of_security, of_pins, of_permissions, of_mentions]


@pytest.mark.parametrize("check", EVERY_FILE)
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_passes(path, check):
    assert not check(path)


def test_the_oldest_and_the_newest_python_and_torch_are_tested():
    assert not of_versions(CI)


def test_a_release_has_a_wheel_for_every_python_declared():
    assert not of_released_pythons(RELEASE)


def test_the_oldest_torch_tried_is_the_oldest_declared():
    (declared,) = [name for name in PROJECT["project"]["dependencies"] if name.startswith("torch")]
    assert declared_torches()[0].startswith(declared.removeprefix("torch>=") + ".")


CHECKOUT = "actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2"


@pytest.mark.parametrize(
    ("check", "path", "whole", "broken"),
    [
        (of_schema, CI, "runs-on: ubuntu-24.04\n", "run-on: ubuntu-24.04\n"),
        (of_schema, CI, "    steps:", "    setps:"),
        (of_security, CI, "        with:\n          persist-credentials: false\n", ""),
        (of_security, CI, "run: bash ci/test.sh", "run: echo ${{ github.head_ref }}"),
        (of_security, CI, CHECKOUT, "actions/checkout@v4"),
        (of_security, CI, "permissions:\n  contents: read\n", ""),
        (of_pins, CI, CHECKOUT, CHECKOUT.replace("11bd71901bbe5b16", "")),
        (of_pins, CI, CHECKOUT, CHECKOUT.partition(" #")[0]),
        (of_permissions, CI, "contents: read", "contents: write"),
        (of_permissions, CI, "    runs-on: ", "    permissions: write-all\n    runs-on: "),
        (of_permissions, RELEASE, "name: pypi", "name: other"),
        (of_permissions, RELEASE, "id-token: write", "contents: write"),
        (of_mentions, CI, "ci/lint.sh", "ci/lints.sh"),
        (of_mentions, CI, ".[test,dev]", ".[test,devel]"),
        (of_mentions, CI, "bash ci/coverage.sh", 'bash ci/coverage.sh -m "not quick"'),
        (of_versions, CI, 'python: "3.10"', 'python: "3.11"'),
        (of_versions, CI, "=2.4.1", "=2.5.1"),
        (of_versions, CI, "python3.14=", "python3.13="),
        (of_released_pythons, RELEASE, "            3.12\n", ""),
        (of_released_pythons, RELEASE, "python3.12 ", ""),
    ],
)
def test_a_broken_workflow_does_not_pass(check, path, whole, broken, tmp_path):
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    copy = folder / path.name
    text = path.read_text()
    assert whole in text
    copy.write_text(text.replace(whole, broken))
    assert check(copy)


def hooks(text):
    (local,) = read(text)["repos"]
    assert local["repo"] == "local"  # nothing is fetched that could change
    return local["hooks"]


def test_the_hooks_are_the_checks_of_ci_lint_sh():
    listed = subprocess.run(["bash", "ci/lint.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {hook["id"]: hook["entry"] for hook in hooks((ROOT / ".pre-commit-config.yaml").read_text())}
    assert found == {name: f"bash ci/lint.sh {name}" for name in listed.stdout.split()}


def test_linters_are_called_by_ci_lint_sh_alone():
    script = (ROOT / "ci" / "test.sh").read_text()
    commands = [line for line in script.splitlines() if not line.startswith("#")]
    commands += [step["run"] for path in WORKFLOWS for step in steps(read(path.read_text())) if "run" in step]
    assert sum("bash ci/lint.sh" in command for command in commands) == 2  # ci/test.sh and one job
    linters = re.compile(r"\b(ruff|mypy|clang-format|check-jsonschema|zizmor)\b")
    assert not [command for command in commands if linters.search(command)]


def test_an_unknown_check_is_refused_with_the_known_ones():
    done = subprocess.run(["bash", "ci/lint.sh", "spelling"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no check spelling; there are: ruff-check " in done.stderr

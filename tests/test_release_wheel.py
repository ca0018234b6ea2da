"""The release wheel of this Python, as ci/wheel.sh makes it: built, checked as a file, tried in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adamops import op_builder

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout"),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(not shutil.which("gcc") or not shutil.which("readelf"), reason="needs GCC and binutils"),
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder that ci/wheel.sh fills and what it says, without torch, which it would fetch again."""
    out = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "PYTHONS": sys._base_executable, "WHEEL_TORCH": "", "ONCE": "1"}
    done = subprocess.run(
        ["bash", "ci/wheel.sh", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return out, done.stdout


@pytest.fixture(scope="module")
def wheel(released):
    (found,) = released[0].glob("*.whl")
    return found


def test_it_is_built_checked_and_tried(released, wheel):
    """Once: test_packaging.py and test_cuda_builder.py have builds that give the same bytes."""
    log = released[1]
    assert f"{wheel.name}: right; " in log
    assert log.count("PASSED") == 2  # twine, of the sdist and the wheel
    assert re.search(r"cpu_adam +in use: prebuilt extension", log)
    assert "manylinux_2_17_x86_64" in wheel.name or os.uname().machine != "x86_64"


def test_it_was_tried_on_other_cpus(released):
    if not shutil.which("qemu-x86_64"):
        pytest.skip("needs qemu-x86_64 (Debian package qemu-user)")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (released[0] / "runs.md").open()]
    assert {row[3].removesuffix(" (QEMU)"): row[4] for row in rows} == {
        "Nehalem": "baseline",
        "SandyBridge": "baseline",
        "Haswell": "avx2",
        "Skylake-Server": "avx2",  # QEMU 7 plays it without AVX-512
        "EPYC": "avx2",
        "Haswell,-xsave": "baseline",
    }
    assert {row[5] for row in rows} == {"kernels"}


def test_the_torch_of_this_environment_takes_it(wheel, tmp_path):
    """Unpacked in front of the installed adamops: the bits, the report, one OpenMP runtime."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "ci" / "smoke.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("| training, kernels |") and "manylinux" in done.stdout


def checked(wheel, folder, change):
    """What check_wheel.py says of a copy of the wheel whose files, {name: contents}, `change` has changed."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    command = [sys.executable, "ci/check_wheel.py", str(folder / wheel.name)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda files: files.pop("adamops/py.typed"), "there is no py.typed"),
        (lambda files: files.update({"cpu_adam.py": b""}), "outside of the package: ['cpu_adam.py']"),
        (lambda files: files.update({"adamops/libgomp.so.1": b""}), "bundled libraries: ['adamops/libgomp.so.1']"),
        (lambda files: files.update({"adamops/more.py": os.urandom(4_000_000)}), "bytes are more than 5,000,000"),
        (lambda files: None, None),
    ],
)
def test_what_is_wrong_with_a_wheel_is_said(wheel, tmp_path, change, complaint):
    done = checked(wheel, tmp_path, change)
    assert done.returncode == (1 if complaint else 0)
    assert (complaint or "right;") in done.stdout + done.stderr


def test_an_extension_for_this_system_alone_is_refused(wheel, tmp_path):
    """The extension of a plain build needs the libstdc++ of the machine that it was built on."""
    plain = Path(op_builder.get("cpu_adam").prebuilt_path())
    replaced = {f"adamops/_native/{plain.name}": plain.read_bytes()}
    done = checked(wheel, tmp_path, lambda files: files.update(replaced))
    assert done.returncode == 1
    assert f"adamops/_native/{plain.name} needs " in done.stderr

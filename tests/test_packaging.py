"""Building and installing from a clean copy of the sources: wheel, sdist, editable; with and without a compiler."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from adamops.op_builder.python_extension import pybind11_headers

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where all tests put their sources, so that each finds the objects that those before it have compiled alike."""
    return tmp_path_factory.mktemp("packaging") / "sources"


@pytest.fixture
def sources(place):
    """A copy of what git tracks, or would."""
    copy = place
    copy.mkdir(exist_ok=True)
    for path in copy.iterdir():
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for left in (copy / "build").glob("*"):
        if not left.name.startswith("temp."):
            shutil.rmtree(left)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def run(command, cwd, check=True, **variables):
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "ADAMOPS_BUILD_FUSED_ADAM": "0", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check:
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def build_wheel(sources, out, check=True, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, "."]
    result = run(command, sources, check, **variables)
    wheels = list(Path(out).glob("*.whl"))
    return (wheels[0] if wheels else None), result.stdout + result.stderr


def record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("adamops/_native/cpu_adam.build.json"))


def test_two_builds_give_the_same_bytes(sources, tmp_path):
    """With one SIMD target, and from two folders; ci/wheel.sh compares two builds with all of them."""
    digests = []
    for i in range(2):
        moved = Path(shutil.copytree(sources, tmp_path / f"place{i}", ignore=shutil.ignore_patterns("build")))
        wheel, log = build_wheel(moved, tmp_path / f"out{i}", ADAMOPS_CPU_TARGETS="baseline")
        assert "adamops: cpu_adam is built, with" in log
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            native = [n for n in names if n.startswith("adamops/_native/") and n.endswith((".so", ".json"))]
            contents = b"".join(archive.read(n) for n in native)
            for place in (moved, pybind11_headers()):
                assert str(place).encode() not in contents
            digests.append([(n, hashlib.sha256(archive.read(n)).hexdigest()) for n in native])
    assert len(digests[0]) == 3 and digests[0] == digests[1]  # cpu_adam, its record, and that of the op left out
    for needed in ("adamops/csrc/rules/adam.h", "adamops/op_builder/cpu.py", "adamops/py.typed"):
        assert needed in names
    built = record(wheel)
    assert built["targets"] == ["baseline"] or built["machine"] != "x86_64"
    assert str(tmp_path) not in json.dumps(built)


def test_without_compiled_ops_torch_calls_take_over(sources, tmp_path):
    wheel, log = build_wheel(sources, tmp_path, ADAMOPS_BUILD_OPS="0")
    assert "adamops: cpu_adam is left out: ADAMOPS_BUILD_OPS=0" in log
    assert record(wheel) == {"op": "cpu_adam", "built": False, "reason": "left out of the build: ADAMOPS_BUILD_OPS=0"}
    site = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel], tmp_path)
    code = """
import torch, warnings, adamops
assert adamops.__file__.startswith(SITE), adamops.__file__
param = torch.nn.Parameter(torch.ones(5)); param.grad = torch.ones(5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adamops.DeepSpeedCPUAdam([param], lr=0.5).step()
print(len(caught), param.tolist(), caught[0].message)
"""
    variables = {"PYTHONPATH": str(site), "CXX": "/nonexistent", "ADAMOPS_CACHE_DIR": str(tmp_path / "cache")}
    out = run([sys.executable, "-c", f"SITE = {str(site)!r}\n{code}"], tmp_path, **variables).stdout
    assert out.startswith("1 [0.5, 0.5, 0.5, 0.5, 0.5] adamops falls back to pure PyTorch")
    assert "left out of the build: ADAMOPS_BUILD_OPS=0" in out
    shown = run([sys.executable, "-m", "adamops.report", "--verbose"], tmp_path, check=False, **variables)
    assert shown.returncode == 1 and "left out of the build: ADAMOPS_BUILD_OPS=0" in shown.stdout


def test_an_op_that_must_be_built_and_cannot_fails_the_build(sources, tmp_path):
    wheel, log = build_wheel(sources, tmp_path, check=False, ADAMOPS_BUILD_CPU_ADAM="1", PATH="/nonexistent")
    assert wheel is None
    assert "adamops: cpu_adam must be built (ADAMOPS_BUILD_CPU_ADAM=1) but cannot: no C++ compiler found" in log


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "nonsense -m64"}, "CXX=nonsense -m64: there is no program 'nonsense'; name a C++ compiler"),
        ({"CXX": "g++ '"}, "CXX=\"g++ '\" is not valid: No closing quotation; quote it as for a shell"),
        ({"LDFLAGS": "'x"}, "LDFLAGS=\"'x\" is not valid: No closing quotation; quote it as for a shell"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS='many' is not valid; use a positive integer"),
        ({"ADAMOPS_CPU_TARGETS": "avx3"}, "ADAMOPS_CPU_TARGETS='avx3' names no target: avx3; use native, all"),
        ({"ADAMOPS_BUILD_OPS": "yes"}, "ADAMOPS_BUILD_OPS='yes' is not valid; use 0 (never build), 1 (must build) or"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_end_the_build_in_one_line_before_it_begins(sources, tmp_path, variables, words):
    wheel, log = build_wheel(sources, tmp_path, check=False, **variables)
    lines = [line.strip() for line in log.splitlines()]
    assert wheel is None and any(line.startswith(f"adamops: {words}") for line in lines), log[-3000:]
    assert not any("is built, with" in line for line in lines)
    assert not any(line.startswith("Traceback") for line in lines)


def test_an_op_that_cannot_be_built_is_left_out(sources, tmp_path):
    wheel, log = build_wheel(sources, tmp_path, PATH="/nonexistent")
    assert "adamops: cpu_adam is left out: no C++ compiler found" in log
    assert "no C++ compiler found" in record(wheel)["reason"]


def test_an_op_that_does_not_compile_is_left_out_with_the_compilers_words(sources, tmp_path):
    with (sources / "csrc" / "runtime" / "parallel.cpp").open("a") as file:
        file.write("\nthis is no C++\n")
    wheel, log = build_wheel(sources, tmp_path, ADAMOPS_CPU_TARGETS="baseline")
    assert "adamops: cpu_adam is left out:" in log
    assert "parallel.cpp" in record(wheel)["reason"] and "error:" in record(wheel)["reason"]


def test_requested_targets_are_recorded(sources, tmp_path):
    wheel, _ = build_wheel(sources, tmp_path, ADAMOPS_CPU_TARGETS="avx2")
    built = record(wheel)
    if built["machine"] != "x86_64":
        pytest.skip("avx2 is a target of x86-64")
    assert built["targets_requested"] == "avx2"
    assert built["targets"] == ["avx2", "baseline"]
    assert built["targets_dropped"] == {"avx512": "not requested"}


def test_hostile_flags_change_no_bit(sources, tmp_path):
    """CXXFLAGS of a user who wants speed: the baseline must stay one, and arithmetic must stay exact."""
    wheel, _ = build_wheel(sources, tmp_path, CXXFLAGS="-march=native -Ofast -ffp-contract=fast")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    extension = next((site / "adamops" / "_native").glob("*.so"))
    check = Path(__file__).parent / "kernel_check.py"
    from adamops import op_builder

    ours = op_builder.get("cpu_adam").load()
    for target in ours.supported_targets():
        expected = run([sys.executable, check, ours.__file__, target], tmp_path).stdout
        assert run([sys.executable, check, extension, target], tmp_path).stdout == expected


def test_sdist_builds_and_holds_everything(sources, tmp_path):
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, sources], tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    for needed in (
        *("setup.py", "LICENSE", "README.md", "CHANGELOG.md", "csrc/rules/adam.h", "csrc/simd/avx512.h"),
        *("op_builder/loading.py", "tests/test_bits.py", "ci/test.sh", "docs/numerics.md", "adamops/report.py"),
    ):
        assert needed in names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel, _ = build_wheel(unpacked, tmp_path / "wheel", ADAMOPS_CPU_TARGETS="baseline")
    assert record(wheel)["built"]


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with all that this one has except adamops: its Python and its folder of packages."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python*/site-packages"))
    for path in filter(lambda path: path.endswith("site-packages"), sys.path):
        for entry in Path(path).iterdir():
            if not entry.name.startswith("adamops") and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python", site


def test_editable_installation(sources, tmp_path, environment):
    python, _ = environment
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    run(install, sources, ADAMOPS_CPU_TARGETS="baseline")
    code = """
import adamops, adamops.op_builder, torch
print(adamops.__file__); print(adamops.op_builder.__file__)
param = torch.nn.Parameter(torch.ones(5)); param.grad = torch.ones(5)
adamops.DeepSpeedCPUAdam([param], lr=0.5).step()
print(adamops.op_builder.get("cpu_adam").load().__file__)
"""
    places = run([python, "-c", code], tmp_path).stdout.split()
    assert places[0] == str(sources / "adamops" / "__init__.py")
    assert places[1] == str(sources / "op_builder" / "__init__.py")
    assert places[2].startswith(str(sources / "adamops" / "_native" / "cpu_adam."))
    run(install, sources, ADAMOPS_BUILD_OPS="0")  # what an earlier build left must go
    assert not list((sources / "adamops" / "_native").glob("*.so"))


STEP = """
import torch, adamops
param = torch.nn.Parameter(torch.ones(5)); param.grad = torch.ones(5)
optimizer = adamops.DeepSpeedCPUAdam([param], lr=0.5)
optimizer.step()
print(adamops.__version__, param.tolist(), optimizer._backends[param.device].name)
"""


def test_upgrade_and_uninstallation_leave_nothing_behind(sources, tmp_path, environment):
    python, site = environment
    before = sorted(site.iterdir())
    new, _ = build_wheel(sources, tmp_path / "new", ADAMOPS_CPU_TARGETS="baseline")
    for name in ("pyproject.toml", "adamops/__init__.py"):
        (sources / name).write_text((sources / name).read_text().replace('"0.1.0"', '"0.0.9"'))
    (sources / "adamops" / "gone.py").write_text("# of the old version\n")
    shutil.rmtree(next((sources / "build").glob("lib*")))
    old, _ = build_wheel(sources, tmp_path / "old", ADAMOPS_CPU_TARGETS="baseline")
    pip = [python, "-m", "pip", "install", "--no-deps", "--no-index"]
    run([*pip, old], tmp_path)
    assert (site / "adamops" / "gone.py").is_file()
    assert run([python, "-c", STEP], tmp_path).stdout.startswith("0.0.9 [0.5, ")
    run([*pip, "--upgrade", new], tmp_path)
    assert not (site / "adamops" / "gone.py").exists()
    assert run([python, "-c", STEP], tmp_path).stdout == "0.1.0 [0.5, 0.5, 0.5, 0.5, 0.5] cpu_adam\n"
    assert sorted(path.name for path in site.iterdir() if path not in before) == ["adamops", "adamops-0.1.0.dist-info"]
    run([python, "-m", "pip", "uninstall", "-y", "adamops"], tmp_path)
    assert sorted(site.iterdir()) == before


def test_names_of_others_do_not_clash(sources, tmp_path, environment):
    """DeepSpeed, apex and what they build have modules of these names; adamops must not take them for its own."""
    python, site = environment
    wheel, _ = build_wheel(sources, tmp_path, ADAMOPS_CPU_TARGETS="baseline")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"adamops", "adamops-0.1.0.dist-info"}
    run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], tmp_path)
    for name in ("op_builder", "csrc", "ops", "cpu_adam", "fused_adam", "fused_adam_cuda", "amp_C", "adam"):
        (site / f"{name}.py").write_text("raise ImportError('not for adamops')\n")
    assert run([python, "-c", STEP], tmp_path).stdout == "0.1.0 [0.5, 0.5, 0.5, 0.5, 0.5] cpu_adam\n"


def test_installed_without_ops_they_are_built_at_first_use(sources, tmp_path, environment):
    python, _ = environment
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "."]
    run(install, sources, ADAMOPS_BUILD_OPS="0")
    cache = {"ADAMOPS_CACHE_DIR": str(tmp_path / "cache"), "ADAMOPS_BUILD_OPS": "0"}
    done = run([python, "-c", STEP], tmp_path, **cache)
    assert done.stdout == "0.1.0 [0.5, 0.5, 0.5, 0.5, 0.5] cpu_adam\n"
    assert done.stderr.startswith("adamops: building cpu_adam for this machine, once ... done in ")
    again = run([python, "-c", STEP], tmp_path, **cache)
    assert (again.stdout, again.stderr) == (done.stdout, "")
    shown = run([python, "-m", "adamops.report", "--verbose"], tmp_path, check=False, **cache).stdout
    assert "extension built at first use, from the cache" in shown

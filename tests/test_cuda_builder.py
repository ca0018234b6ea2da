"""Building for CUDA: which nvcc, which architectures, what is left out and why. No GPU is needed."""

import json
import shutil
import stat
import subprocess
import sys

import cuda_emulation
import pytest
from adamops.op_builder import cuda, cuda_architectures, environment
from adamops.op_builder.compile import compile_op
from adamops.op_builder.cuda_architectures import ArchitectureChoice, choose_architectures, coverage
from adamops.op_builder.fused_adam import FusedAdamBuilder
from adamops.op_builder.nvcc import Nvcc

from adamops import _op_facts, op_builder, report

KNOWN = ("75", "80", "86", "90", "100", "120")  # as nvcc lists them: without 90a, which it compiles for all the same
NVCC = Nvcc("/none/nvcc", "13.0", (), KNOWN)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """A machine without GPUs, and no variable that steers the build."""
    for name in ("ADAMOPS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_architectures, "visible_gpus", lambda: ())


def fake_nvcc(folder, gpu_code="sm_80 sm_90", version="release 12.4, V12.4.1", without=""):
    """A script that answers as nvcc does."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "include" / "nv").mkdir(parents=True)
    for name in ("lib64/libcudart_static.a", "include/cuda_fp16.h", "include/nv/target"):
        if name != without:
            (folder / name).write_text("#include <nv/target>\n")
    script = folder / "bin" / "nvcc"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{version}';; --list-gpu-code) echo {gpu_code};; *) exit 1;; esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("8.0, 8.6 9.0a", ["80", "86", "90a"]),
        ("9.0a+PTX;10.0f", ["90a+PTX", "100f"]),
        (";8.0;", ["80"]),
        ("Ampere", ["80", "86+PTX"]),
        ("7.5;Hopper;7.5", ["75", "90+PTX"]),
        ("12.0", ["120"]),
        ("all", ["all"]),
    ],
)
def test_architectures_in_torchs_syntax(monkeypatch, value, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert environment.cuda_archs(KNOWN) == (f"TORCH_CUDA_ARCH_LIST={value}", expected, [])
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", "10.0")
    assert environment.cuda_archs(KNOWN) == ("ADAMOPS_CUDA_ARCHS=10.0", ["100"], [])


@pytest.mark.parametrize("value", ["9.9", "90", "sm_90", "8.0+SASS", "Pascal", "8.0;oops", "9.9a", "9.0b"])
def test_an_unknown_architecture_names_the_valid_ones(monkeypatch, value):
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", value)
    with pytest.raises(ValueError, match=r"is not an architecture that this nvcc knows.* 7\.5, .*9\.0, 10\.0.*Hopper"):
        choose_architectures(NVCC)


@pytest.mark.parametrize("value", ["90", "sm_90", "8.0+SASS", "8.0;oops", "9.0b"])
def test_torchs_list_names_architectures_only(monkeypatch, value):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    with pytest.raises(ValueError, match=r"^TORCH_CUDA_ARCH_LIST=.* is not an architecture that this nvcc knows"):
        choose_architectures(NVCC)


def test_what_nvcc_does_not_know_of_torchs_list_is_dropped(monkeypatch):
    """The list is in many images, for all packages, and older than their nvcc or newer."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 Volta 7.0 8.0 9.0+PTX 10.3a")
    choice = choose_architectures(NVCC)
    assert choice.enabled == ("80", "90+PTX")
    assert choice.dropped == tuple((name, "nvcc 13.0 does not know it") for name in ("52", "70", "103a"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")  # and there is no GPU
    assert choose_architectures(NVCC).enabled == ("75", "80", "86", "90", "100", "120+PTX")


def test_the_op_is_left_out_if_nothing_of_torchs_list_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;10.3a")
    reason = "nvcc 12.4 does not know 7.5, 10.3a (TORCH_CUDA_ARCH_LIST=7.5;10.3a)"
    assert FusedAdamBuilder().compatibility().reason == reason


def test_without_settings_or_gpus_the_wheels_list_is_built():
    choice = choose_architectures(NVCC)
    assert choice.enabled == ("75", "80", "86", "90", "100", "120+PTX")
    assert choice.dropped == (("89", "nvcc 13.0 does not know it"),)
    assert choice.nvcc_flags()[-1] == "-gencode=arch=compute_120,code=[sm_120,compute_120]"


@pytest.mark.parametrize(
    ("enabled", "by_one", "flags"),
    [
        (("80", "75", "120+PTX"), ("80", "75+PTX", "120"), ["75,code=[sm_80,sm_75,compute_75,sm_120]"]),
        (("90+PTX", "80+PTX"), ("90", "80+PTX"), ["80,code=[sm_90,sm_80,compute_80]"]),
        (("80", "90"), ("80", "90"), ["80,code=[sm_80,sm_90]"]),
        (("90", "100a+PTX"), ("90", "100a+PTX"), ["90,code=[sm_90]", "100a,code=[sm_100a,compute_100a]"]),
        (("90a",), ("90a",), ["90a,code=[sm_90a]"]),
        ((), (), []),
    ],
)
def test_all_machine_code_from_one_ptx(enabled, by_one, flags):
    choice = ArchitectureChoice("a list", enabled, ()).by_one_ptx()
    assert choice.enabled == by_one
    assert choice.nvcc_flags() == [f"-gencode=arch=compute_{words}" for words in flags]


def test_visible_gpus_are_built_for(monkeypatch):
    monkeypatch.setattr(cuda_architectures, "visible_gpus", lambda: ("80", "90"))
    assert choose_architectures(NVCC) == ArchitectureChoice("the visible GPUs", ("80", "90+PTX"), ())
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", "all")
    assert len(choose_architectures(NVCC).enabled) == 6


def test_native_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", "native")
    with pytest.raises(ValueError, match="ADAMOPS_CUDA_ARCHS=native asks for the GPUs of this machine, but"):
        choose_architectures(NVCC)


def test_gpus_are_asked_of_nvidia_smi(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\nN/A\\n'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.undo()  # the patched visible_gpus()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cuda_architectures.visible_gpus.cache_clear()
    try:
        assert cuda_architectures.visible_gpus() == ("80", "90")
    finally:
        cuda_architectures.visible_gpus.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "runs", "how"),
    [
        ("80", True, "compiled for it"),
        ("86", True, "compiled for an older one of its kind"),
        ("89", True, "compiled for an older one of its kind"),
        ("120", True, "from PTX, which the driver compiles at first use"),
        ("90", True, "compiled for it"),
        ("91", False, "it is in none of the architectures; build with ADAMOPS_CUDA_ARCHS"),
        ("75", False, "it is in none of the architectures; build with ADAMOPS_CUDA_ARCHS"),
        ("110", True, "compiled for it"),
        ("113", True, "compiled for an older one of its kind"),
    ],
)
def test_coverage_of_a_gpu(gpu, runs, how):
    assert coverage(["80", "90a", "100+PTX", "110f"], gpu) == (runs, how)


def test_the_report_says_which_gpus_a_build_covers(monkeypatch):
    class Builder(FusedAdamBuilder):
        is_prebuilt = staticmethod(lambda: False)
        compatibility = staticmethod(lambda: op_builder.Compatibility(False, "no nvcc"))
        build_record = staticmethod(
            lambda: {
                "built": True,
                "compiler": "g++",
                "machine": "x86_64",
                "flags": [],
                "nvcc": "13.0",
                "architectures_requested": "the list of the wheel",
                "architectures": ["80", "100+PTX"],
                "architectures_dropped": {},
            }
        )

    for module in (_op_facts, cuda):
        monkeypatch.setattr(module, "visible_gpus", lambda: ("86", "90"))
    entry = _op_facts.describe(op_builder.RegisteredOp("fused_adam", "built-in", Builder()))
    assert entry["gpus"] == {
        "sm_86": {"runs": True, "how": "compiled for an older one of its kind"},
        "sm_90": {"runs": False, "how": "it is in none of the architectures; build with ADAMOPS_CUDA_ARCHS"},
    }
    rows = {row.label: row for row in report.rows_of_op(entry)}
    assert rows["GPU sm_86"] == ("GPU sm_86", "yes: compiled for an older one of its kind")
    assert rows["GPU sm_90"].text.startswith("no: it is in none")
    assert rows["can be built here"].text == "no: no nvcc"


def test_nvcc_of_cuda_home_is_taken_and_described(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda")))
    nvcc = Nvcc.find()
    assert (nvcc.version, nvcc.known) == ("12.4", ("80", "90"))
    assert nvcc.static_runtime() == str(tmp_path / "cuda" / "lib64")
    builder = FusedAdamBuilder()
    assert builder.compatibility().reason.startswith("nvcc 12.4 on ")
    (unit,) = [unit for unit in builder.compile_units() if unit.command]
    assert unit.command[0] == nvcc.path
    assert {"-fmad=false", "-gencode=arch=compute_80,code=[sm_80,compute_80,sm_90]"} <= set(unit.flags)
    assert "-lcudart_static" in builder.extra_ldflags()


def test_reasons_why_the_op_cannot_be_built(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert FusedAdamBuilder().compatibility().reason == f"no nvcc that runs was found in CUDA_HOME={tmp_path}"
    for i, name in enumerate(("lib64/libcudart_static.a", "include/cuda_fp16.h", "include/nv/target")):
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / f"b{i}", without=name)))
        reason = FusedAdamBuilder().compatibility().reason
        assert reason.startswith(f"nvcc 12.4 has no {name.partition('/')[2]} (install ")
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "c", version="not a compiler")))
    assert "no nvcc that runs" in FusedAdamBuilder().compatibility().reason
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "d", gpu_code="sm_52")))
    assert (
        FusedAdamBuilder().compatibility().reason
        == "nvcc 12.4 does not know 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0 (the list of the wheel)"
    )
    with pytest.raises(op_builder.BuildError, match="must|nvcc|failed"):
        compile_op(FusedAdamBuilder(), tmp_path / "op.so")


def test_a_cuda_op_is_not_missed_where_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert report.main(["--json"]) == 0
    (op,) = [op for op in json.loads(capsys.readouterr().out)["ops"] if op["name"] == "fused_adam"]
    assert op["not_applicable_reason"] == "this machine has no NVIDIA GPU"
    assert op["ok"]


@needs_nvcc
def test_the_op_is_compiled_by_nvcc_and_imports_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", "8.0;9.0+PTX")
    builds = []
    for name in ("first", "second"):
        shutil.copytree(cuda_emulation.CSRC, tmp_path / name / "csrc")
        monkeypatch.setattr(FusedAdamBuilder, "source_root", lambda self, name=name: tmp_path / name / "csrc")
        output = tmp_path / name / "fused_adam.so"
        record = compile_op(FusedAdamBuilder(), output)
        builds.append(output.read_bytes())
    assert record["architectures"] == ["80+PTX", "90"]
    assert record["architectures_requested"] == "ADAMOPS_CUDA_ARCHS=8.0;9.0+PTX"
    assert record["from_one_ptx"] is True
    assert builds[0] == builds[1], "the same sources gave other bytes"
    assert str(tmp_path) not in json.dumps(record)
    code = f"import sys; sys.path[:0] = [{str(output.parent)!r}]; import fused_adam, json;"
    code += "print(json.dumps(fused_adam.status()))"
    status = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert status["runtime_version"] >= 12000
    assert status["devices"] > 0 or status["problem"]


@needs_nvcc
def test_the_check_of_roots_and_quotients_compiles(tmp_path):
    """tests/test_gpu.py runs it."""
    subprocess.run(cuda_emulation.rounding_check(tmp_path / "check", "-arch=sm_90"), check=True)


@needs_nvcc
def test_without_a_prebuilt_extension_the_op_is_built_at_first_use_and_kept(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")  # which nvcc compiles for, and does not list
    monkeypatch.setenv("ADAMOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(FusedAdamBuilder, "MODULE", "adamops._native.no_such.fused_adam")
    module = FusedAdamBuilder().load()
    assert "building fused_adam for this machine, once" in capfd.readouterr().err
    (built,) = tmp_path.glob("*/fused_adam*.so")
    assert module.__file__ == str(built)
    assert json.loads(built.with_name("fused_adam.build.json").read_text())["architectures"] == ["90a"]
    status = module.status()
    if not status["devices"]:
        assert status["problem"] in module.problem(0)
    assert FusedAdamBuilder().load().__file__ == module.__file__
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("ADAMOPS_CUDA_ARCHS", "8.0")
    assert FusedAdamBuilder().load().__file__ != module.__file__, "another architecture is another build"


def test_a_gpu_that_the_build_cannot_use_is_an_error_in_the_report(monkeypatch):
    class Module:
        @staticmethod
        def status():
            problem = "the NVIDIA driver supports CUDA 12.8, and this build needs 13.0"
            return {"runtime_version": 13000, "driver_version": 12080, "devices": 0, "problem": problem}

    class Builder(FusedAdamBuilder):
        is_prebuilt = staticmethod(lambda: True)
        load_prebuilt = staticmethod(lambda: Module)
        build_record = staticmethod(lambda: {"built": False})

    without = _op_facts._describe_builder(Builder())
    assert without["ok"] and without["not_applicable_reason"]
    monkeypatch.setattr(cuda, "visible_gpus", lambda: ("90",))
    found = _op_facts._describe_builder(Builder())
    assert not found["ok"]
    assert found["error"] == Module.status()["problem"]
    assert found["in_use"] == "a build at first use, else torch_adam (pure PyTorch)"

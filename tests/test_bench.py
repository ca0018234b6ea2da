"""The benchmark runs, and its table and JSON hold what they promise. Says nothing of how fast anything is."""

import json
import os
import subprocess
import sys

import pytest
import torch
from plugins import offer_installation, python_path

from adamops import _limits, bench, op_builder
from adamops._bench_models import MODELS

CASES = [
    "fp32",
    "bf16-params",
    "bf16",
    "bf16-grads",
    "many-tensors",
    "8bit",
    "clip",
    "functional",
    "avx2",
    "import",
    "first-step",
]
TORCH = ["torch fused", "torch foreach"]


def run_bench(cwd, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "adamops.bench", *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """All cases, on a machine whose DeepSpeed is broken: its build takes a minute where it is not."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text("raise RuntimeError('no such accelerator')\n")
    done = run_bench(
        folder, "--elements", "10000", "--repeat", "2", "--json", "times.json", PYTHONPATH=python_path(folder)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "times.json").read_text())


def test_json_has_all_times_medians_and_ratios(small_run):
    _, report = small_run
    assert list(report["cases"]) == CASES
    for name, case in report["cases"].items():
        ours = case["implementations"].get(case["ours"])
        assert ours or name == "avx2" and case["skipped"], name
        for implementation in case["implementations"].values():
            times = implementation["times_ms"]
            assert len(times) == 2 and min(times) > 0
            assert implementation["min_ms"] == min(times)
            assert implementation["median_ms"] == pytest.approx(sum(times) / 2)
            ratios = [theirs / own for theirs, own in zip(times, ours["times_ms"], strict=True)]
            assert implementation["adamops_speed"] == pytest.approx(sum(ratios) / 2)


def test_every_implementation_is_timed(small_run):
    cases = small_run[1]["cases"]
    for name in ("fp32", "bf16", "many-tensors"):
        assert list(cases[name]["implementations"]) == ["adamops", *TORCH, "bandwidth probe"]
    assert list(cases["bf16-params"]["implementations"]) == ["adamops", "bandwidth probe"]
    widening = ["adamops after widening", "torch fused after widening", "torch foreach after widening"]
    assert list(cases["bf16-grads"]["implementations"]) == ["adamops", *widening, "bandwidth probe"]
    assert list(cases["import"]["implementations"]) == ["adamops"]
    assert list(cases["functional"]["implementations"]) == ["adamops.functional", "adamops step"]
    assert list(cases["first-step"]["implementations"]) == ["adamops", *TORCH]


def test_who_does_not_take_part_is_named_with_the_reason(small_run):
    text, report = small_run
    assert set(report["cases"]["bf16-params"]["skipped"]) == {*TORCH, "DeepSpeed"}
    for name in ("fp32", "first-step"):
        assert "no such accelerator" in report["cases"][name]["skipped"]["DeepSpeed"]
    words = " ".join(text.split())
    assert words.count("DeepSpeed: cannot be imported: RuntimeError: no such accelerator") == 1


def test_touch_speed_is_that_of_the_best_prefetch_distance(small_run):
    case = small_run[1]["cases"]["fp32"]
    variants = case["probe_times_ms_by_prefetch_bytes"]
    assert [int(distance) for distance in variants] == list(bench.PREFETCH_BYTES)
    assert case["implementations"]["bandwidth probe"]["median_ms"] == pytest.approx(
        min(map(sum, variants.values())) / 2
    )


def test_table_in_a_pipe_is_plain_text(small_run):
    text, report = small_run
    assert text.isascii() and "\x1b" not in text
    assert report["environment"]["cpu"] in text
    assert report["environment"]["simd_target"] in text
    for case in report["cases"].values():
        assert case["title"] in text
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in text.splitlines())  # a long path stays whole
    assert "cases: about" in text and "GB of memory" in text  # before the first case
    assert text.index("GB of memory") < text.index("10000, fp32")


def test_an_unknown_case_is_an_error_that_names_the_valid_ones(tmp_path):
    done = run_bench(tmp_path, "--cases", "fp32", "fp64")
    assert done.returncode == 2
    assert "fp64" in done.stderr
    for name in CASES:
        assert name in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_count_that_is_none_is_an_error(tmp_path, value):
    done = run_bench(tmp_path, f"--elements={value}")
    assert done.returncode == 2
    assert f"{value!r} is not a positive integer" in done.stderr


@pytest.mark.parametrize("text, value", [("100M", 10**8), ("3k", 3000), ("2G", 2 * 10**9), ("17", 17)])
def test_counts_with_a_letter(text, value):
    assert bench.count(text) == value


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path, option):
    done = run_bench(tmp_path, option, "nowhere/file")
    assert done.returncode == 2 and not done.stdout
    assert "nowhere/file cannot be written: No such file or directory" in done.stderr


def test_a_wrong_variable_is_a_line(tmp_path):
    done = run_bench(tmp_path, "--cases=fp32", ADAMOPS_SIMD="mmx")
    assert done.returncode == 1 and "ADAMOPS_SIMD='mmx' is not valid" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chart_without_peers_is_an_error(tmp_path):
    done = run_bench(tmp_path, "--no-peers", "--plot=chart.png")
    assert done.returncode == 2 and "--no-peers leaves them out" in done.stderr


@pytest.mark.parametrize("name", ["x.foo", "x.png.gz"])
def test_a_chart_that_matplotlib_does_not_write_is_an_error_before_anything_runs(tmp_path, name):
    done = run_bench(tmp_path, f"--plot={name}")
    suffix = name[name.rindex(".") :]
    message = f"argument --plot: {name}: matplotlib does not write {suffix}; use .png, .svg or .pdf"
    assert done.returncode == 2 and not done.stdout and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.PNG", "x.svg", "x.pdf", "x"])
def test_charts_that_matplotlib_writes(tmp_path, name):
    assert bench.chart_file(str(tmp_path / name)) == tmp_path / name


def test_more_threads_than_cores_are_an_error(tmp_path):
    done = run_bench(tmp_path, "--threads=99999")
    assert done.returncode == 2 and not done.stdout
    assert "argument --threads: 99999 is too many: this process has " in done.stderr
    assert bench.threads(str(_limits.cores())) == _limits.cores()


def test_more_memory_than_there_is_is_an_error_before_anything_runs(tmp_path):
    if _limits.free_memory() is None:
        pytest.skip("the system does not say how much memory is free")
    done = run_bench(tmp_path, "--cases=fp32", "--elements=99999999999")
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert "error: needs 2800.5 GB of memory, and " in last and last.endswith(" GB are free: use a smaller --elements")


@pytest.mark.parametrize(
    ("arguments", "free", "reason"),
    [
        (["--cases=fp32", "--elements=1G"], 29e9, None),
        (["--cases=fp32", "--elements=1G"], 28e9, "28.5 GB of memory, and 28.0 GB are free: use a smaller --elements"),
        (["--cases=bf16", "--elements=1G", "--no-peers"], 9e9, None),
        (["--models=gpt2"], 2e9, "needs 4.0 GB of memory, and 2.0 GB are free: leave out --models gpt2"),
        (["--elements=1000G"], None, None),
    ],
)
def test_memory_that_is_needed_and_free(monkeypatch, capsys, arguments, free, reason):
    monkeypatch.setattr(bench, "free_memory", lambda: free)
    if reason is None:
        bench.parse(arguments)
    else:
        with pytest.raises(SystemExit, match="2"):
            bench.parse(arguments)
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cases", "peers", "deepspeed", "compiles"),
    [
        (["fp32"], True, "0.19", True),
        (["clip", "mlp"], True, "0.19", True),
        (["clip", "8bit", "functional", "avx2", "import"], True, "0.19", False),
        (["fp32"], False, "0.19", False),
        (["fp32"], True, None, False),
    ],
)
def test_deepspeeds_build_is_announced_where_there_is_one(cases, peers, deepspeed, compiles):
    text = bench.plan(cases, bench.Options(elements=1000, repeat=1, threads=1, peers=peers), deepspeed)
    assert ("DeepSpeed compiles its op first" in text) is compiles
    assert text.startswith("1 case: " if len(cases) == 1 else f"{len(cases)} cases: ")


def test_a_copy_that_hides_an_installation_is_named(tmp_path):
    offer_installation(tmp_path / "site")
    path = os.pathsep.join([*sys.path, str(tmp_path / "site")])
    done = run_bench(tmp_path, "--cases=avx2", "--elements=10", "--repeat=1", PYTHONPATH=path)
    said = " ".join(done.stdout.split())
    assert f"which hides the adamops installed in {tmp_path / 'site'}: start Python in another folder" in said
    assert "\n! Python imports " in done.stdout


def test_what_is_finished_is_kept_at_ctrl_c(tmp_path):
    code = """
from adamops import bench
def interrupted(options):
    raise KeyboardInterrupt
bench.CASES = {"clip": bench.clip_step_and_zero, "avx2": interrupted, "8bit": interrupted}
raise SystemExit(bench.main(["--elements=1000", "--repeat=1", "--json=times.json", "--no-peers"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and "Interrupted after 1 of 3 cases." in done.stdout, done.stderr
    assert list(json.loads((tmp_path / "times.json").read_text())["cases"]) == ["clip"]


def test_models(tmp_path):
    """The published numbers of params."""
    totals = {name: sum(sizes()) for name, sizes in MODELS.items()}
    assert totals == {
        "gpt2": 124_439_808,
        "llama-0.5b": 494_032_768,
        "resnet50": 25_557_032,
        "lora-8b": 41_943_040,
        "mlp": 669_706,
    }
    done = run_bench(tmp_path, "--models", "mlp", "--repeat=1", "--plot=chart.png")
    assert "mlp: 6 tensors, 0.67 M, fp32" in done.stdout and "--models mlp" in done.stdout, done.stderr
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_no_peers_and_threads(tmp_path):
    done = run_bench(tmp_path, "--cases=fp32", "--elements=100", "--repeat=1", "--threads=1", "--no-peers")
    assert done.returncode == 0, done.stderr
    assert "torch fused" not in done.stdout
    assert "; 1 thread\n" in done.stdout and "\n1 case: about" in done.stdout


@pytest.mark.parametrize(("dtype", "state_dtype"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("target", op_builder.get("cpu_adam").load().supported_targets())
def test_touching_changes_nothing(cpu_adam, dtype, state_dtype, target):
    cpu_adam.use_target(target)
    params = bench.new_params([1, 32, 70_001], dtype)
    optimizer = bench.adamops_optimizer(params, state_dtype)
    optimizer.step()
    tensors = [
        tensor
        for param in params
        for tensor in (param.data, param.grad, optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"])
    ]
    before = [tensor.clone() for tensor in tensors]
    probe = bench.BandwidthProbe(optimizer)
    for distance in bench.PREFETCH_BYTES:
        probe(distance)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_the_simd_target_is_put_back(cpu_adam):
    before = cpu_adam.target()
    bench.forced_avx2(bench.Options(elements=100, repeat=1, threads=1, peers=False))
    assert cpu_adam.target() == before

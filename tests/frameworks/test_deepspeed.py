"""DeepSpeed's engine on CPUs: ZeRO, offload, checkpoints; with our optimizers, and with its own on our ops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from frameworks.deepspeed_training import (
    CASES,
    FURTHER,
    curves,
    eight_bit_curves,
    further_curves,
    prepared_by_accelerate,
    refusals,
    resumed_curves,
    superoffload_steps,
)
from frameworks.pages import script_of
from frameworks.processes import run_on_ranks

import adamops

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]

# DeepSpeed's own op takes a minute to compile where it is not in its cache, on a machine with nothing else to do.
WITH_OWN = os.environ.get("ADAMOPS_TEST_DEEPSPEEDS_OP", "") == "1"
own = pytest.param("own", marks=pytest.mark.skipif(not WITH_OWN, reason="without ADAMOPS_TEST_DEEPSPEEDS_OP=1"))

# Masters are float32 in all cases, so losses differ by the rounding of float32; in bf16, by a unit of the last place of
# a param where that makes it round to the other side.
RTOL = {"fp32": 1e-5, "bf16": 1e-2}

NAMES = {(stage, offload, dtype): f"zero{stage}{'-offload' * offload}-{dtype}" for stage, offload, dtype in CASES}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request):
    return run_on_ranks(curves, request.param, WITH_OWN)


@pytest.mark.parametrize("case", CASES, ids=NAMES.get)
@pytest.mark.parametrize("optimizer", ["ours", "ours-fused", "patched", own])
def test_losses_are_those_of_torch(ranks, case, optimizer):
    if case[1] and optimizer == "ours-fused":
        pytest.skip("offloaded states are for the CPU optimizer")
    for by_case in ranks:
        losses, _ = by_case[(*case, optimizer)]
        reference, _ = by_case[(*case, "torch")]
        assert losses == pytest.approx(reference, rel=RTOL[case[2]])
        assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


@pytest.mark.parametrize("case", CASES, ids=NAMES.get)
def test_ours_and_the_patched_are_the_same_to_the_bit(ranks, case):
    for by_case in ranks:
        assert by_case[(*case, "patched")][0] == by_case[(*case, "ours")][0]


@pytest.mark.parametrize("case", CASES, ids=NAMES.get)
def test_the_patched_config_makes_deepspeeds_classes(ranks, case):
    expected = "DeepSpeedCPUAdam" if case[1] else "FusedAdam"
    assert {by_case[(*case, "patched")][1] for by_case in ranks} == {expected}


PAIRS = [("ours", "ours"), ("torch", "ours"), ("ours", "torch"), ("ours", "patched"), ("patched", "ours")]
OWN_PAIRS = [("own", "ours"), ("ours", "own"), ("own", "patched"), ("patched", "own")]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(OWN_PAIRS, marks=own.marks)], ids=["", "own"])
def test_checkpoints_continue_with_any_of_the_optimizers(tmp_path, world_size, pairs):
    cases = [(0, False, "fp32"), (1, False, "bf16"), (2, True, "bf16"), (3, False, "fp32"), (3, True, "bf16")]
    tasks = [(case, *pair) for case in cases for pair in pairs]
    for found in run_on_ranks(resumed_curves, world_size, tasks, str(tmp_path)):
        for (case, before, after), (start, unbroken, resumed) in zip(tasks, found, strict=True):
            where = f"{NAMES[case]}, {before} to {after}"
            assert resumed == pytest.approx(unbroken, rel=RTOL[case[2]]), where
            assert sum(resumed) < sum(start), where
            if {before, after} <= {"ours", "patched"}:
                assert resumed == unbroken, where


def run_script(tmp_path, script, *command, **environment):
    """Runs a script where there is no compiler, and where nothing was compiled before."""
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "extensions").mkdir()
    env = {
        key: value for key, value in os.environ.items() if key not in ("CXX", "CC", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=env
        | {
            "PATH": str(tmp_path / "bin"),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


def _root():
    """The folder that adamops is imported from."""
    return Path(adamops.__file__).parents[1]


# A process that ends right after a step is aborted now and then: a thread of gloo still holds the last reference to one
# of the step's tensors, and needs the GIL, which Python no longer gives (pytorch/pytorch#190489). DeepSpeed keeps the
# process groups, so destroying them would not wait for that thread. A second without the GIL lets it finish.
END = "\nimport time\n\ntime.sleep(1)\n"

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize("has_compiler", [False, True])
def test_the_pages_script_compiles_nothing(tmp_path, has_compiler):
    path = {"PATH": os.environ["PATH"]} if has_compiler else {}
    done = run_script(tmp_path, script_of("deepspeed") + END, *LAUNCHER, "train.py", **path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) >= 10 and losses[-1] < 0.7 * losses[0]
    assert not list((tmp_path / "extensions").rglob("*.so")) and not list((tmp_path / "extensions").rglob("*.ninja"))


def without_patch():
    script = script_of("deepspeed")
    lines = [line for line in script.splitlines() if "adamops" not in line]
    assert len(lines) == len(script.splitlines()) - 2
    return "\n".join(lines)


def test_a_script_that_knows_nothing_of_adamops_runs_through_the_module(tmp_path):
    done = run_script(tmp_path, without_patch() + END, *LAUNCHER, "-m", "adamops.deepspeed", "train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 0" in done.stdout


def test_without_the_patch_it_would_have_needed_a_compiler(tmp_path):
    done = run_script(tmp_path, without_patch(), *LAUNCHER, "train.py")
    assert done.returncode != 0 and "ninja" in done.stderr.lower()


def test_subgroups_partial_offload_and_bfloat16_masters():
    (found,) = run_on_ranks(further_curves, 1)
    assert found.keys() == FURTHER.keys()
    for name, (losses, reference) in found.items():
        assert losses == pytest.approx(reference, rel=RTOL["bf16"]), name


def test_what_deepspeed_says_to_our_class_as_a_client_optimizer():
    (found,) = run_on_ranks(refusals, 1)
    assert "untested ZeRO Optimizer" in found["untested"]
    assert '"zero_force_ds_cpu_optimizer": false' in found["offload"]
    assert "Master weights feature requires ZeRO-2 Offload with DeepSpeedCPUAdam" in found["masters"]
    assert found["patched"].startswith("adamops.") and found["patched, offloaded"].startswith("adamops.")


ALLOWED = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}


@pytest.mark.parametrize("cls", ["DeepSpeedCPUAdam", "FusedAdam"])
@pytest.mark.parametrize(("patched", "keys"), [(True, {}), (False, ALLOWED)], ids=["patched", "by the config"])
def test_accelerate_keeps_the_optimizer(cls, patched, keys):
    pytest.importorskip("accelerate")
    ((is_kept, dtypes, losses),) = run_on_ranks(prepared_by_accelerate, 1, cls, patched, keys)
    assert is_kept and dtypes == {torch.int8}
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


@pytest.mark.parametrize("cls", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_accelerate_does_not_replace_the_optimizer_unasked(cls):
    pytest.importorskip("accelerate")
    (message,) = run_on_ranks(prepared_by_accelerate, 1, cls, False, {})
    assert f"adamops.{cls} by DeepSpeed's DeepSpeedCPUAdam" in message
    assert "decoupled weight decay, precision of states and params" in message and "patch()" in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_8_bit_states_train_and_continue(tmp_path, world_size):
    for by_stage in run_on_ranks(eight_bit_curves, world_size, str(tmp_path)):
        for losses, resumed, reference, by_config in by_stage.values():
            assert resumed == losses[4:]
            assert by_config == losses
            assert losses == pytest.approx(reference, rel=0.02)
            assert losses != reference


def test_superoffloads_process_needs_no_compiler(tmp_path):
    (found,) = run_on_ranks(superoffload_steps, 1, str(tmp_path))
    for theirs, ours in found[:3]:
        assert torch.equal(theirs, ours)
    theirs, ours = found[3]
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theirs, found[1][0], rtol=1e-5, atol=1e-6)
    assert not any(tmp_path.iterdir())

"""adamops.deepspeed.patch(): what it changes, that it can be undone, and what it says where it cannot do it."""

import builtins
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

import adamops
import adamops.deepspeed
from adamops.deepspeed import TESTED_VERSION, UnknownDeepSpeedError, patch, unpatch

pytestmark = pytest.mark.frameworks


@pytest.fixture(autouse=True)
def nothing_patched():
    """Each test begins and ends with DeepSpeed as it is."""
    unpatch()
    with pytest.MonkeyPatch.context() as changed:
        changed.setitem(deepspeed.ops.__dict__, "__compatible_ops__", {})  # found by running compilers, for a long time
        before = everything()
        yield
        unpatch()
        assert everything() == before


def everything():
    """What patch() may change."""
    return (
        dict(CPUAdamBuilder._loaded_ops),
        list(ZERO_SUPPORTED_OPTIMIZERS),
        DeepSpeedEngine.zero_force_ds_cpu_optimizer,
        DeepSpeedEngine.get_optimizer_configuration,
        ZeROOptimizer._configure_master_weights,
        ds_to_universal.main,
        dict(multiprocessing.current_process()._config).keys(),
        dict(deepspeed.ops.__compatible_ops__),
    )


def test_builders_load_our_ops_until_it_is_undone():
    handle = patch()
    assert handle.replaced == ["cpu_adam", "fused_adam"] and handle.left == {}
    assert isinstance(CPUAdamBuilder().load(), adamops.deepspeed.CPUAdamOp)
    assert isinstance(FusedAdamBuilder().load(), adamops.deepspeed.FusedAdamOp)
    handle.undo()
    assert "cpu_adam" not in CPUAdamBuilder._loaded_ops


def test_a_second_patch_changes_nothing_and_undoing_it_neither():
    patch()
    before = everything()
    with patch() as second:
        assert second.replaced == []
        assert everything() == before
    assert everything() == before
    unpatch()
    unpatch()


def test_it_lasts_for_a_with_block_and_may_be_done_again():
    for _ in range(2):
        with patch():
            assert "cpu_adam" in CPUAdamBuilder._loaded_ops
        assert "cpu_adam" not in CPUAdamBuilder._loaded_ops


def test_an_op_that_deepspeed_has_loaded_comes_back(monkeypatch):
    monkeypatch.setitem(CPUAdamBuilder._loaded_ops, "cpu_adam", "DeepSpeed's own")
    with patch():
        assert CPUAdamBuilder().load() != "DeepSpeed's own"
    assert CPUAdamBuilder().load() == "DeepSpeed's own"


@pytest.mark.parametrize("ours", [adamops.DeepSpeedCPUAdam, adamops.FusedAdam])
def test_zero_knows_our_classes(ours):
    assert ours not in ZERO_SUPPORTED_OPTIMIZERS
    with patch():
        assert ours in ZERO_SUPPORTED_OPTIMIZERS


@pytest.mark.parametrize(("arguments", "left"), [({"shm_comm": True}, True), ({}, False)])
def test_the_op_for_shared_memory_is_compiled_only_if_wanted(monkeypatch, arguments, left):
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    with patch(**arguments):
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is left


class Engine:
    """What get_optimizer_configuration() asks of an engine."""

    zenflow = False

    def __init__(self, offloaded=True, stage=0, bf16=False, masters=False, states=False, grads=torch.bfloat16):
        self.offloaded, self.stage, self.bf16 = offloaded, stage, bf16
        self.masters, self.states, self.grads = masters, states, grads

    def zero_use_cpu_optimizer(self):
        return self.offloaded

    def zero_cpu_offload(self):
        return self.offloaded

    def zero_optimization(self):
        return self.stage > 0

    def zero_optimization_stage(self):
        return self.stage

    def get_data_types(self):
        return torch.bfloat16, self.grads

    def bfloat16_enabled(self):
        return self.bf16

    def fp16_enabled(self):
        return False

    def bf16_master_weights_and_gradients(self):
        return self.masters

    def bf16_optimizer_states(self):
        return self.states


def configured(engine, **parameters):
    """The optimizer that an engine makes of the params of a config's optimizer."""
    cls, settings = DeepSpeedEngine.get_optimizer_configuration(engine, parameters, True)
    return cls([torch.nn.Parameter(torch.ones(5000))], **parameters, **settings)


@pytest.mark.parametrize("offloaded, cls", [(True, adamops.DeepSpeedCPUAdam), (False, adamops.FusedAdam)])
@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16", "torch.bfloat16", "fp32"])
def test_a_config_with_our_settings_makes_our_classes(offloaded, cls, state_dtype):
    with patch():
        optimizer = configured(Engine(offloaded), lr=0.1, state_dtype=state_dtype, weight_decay=0.5)
        assert type(optimizer) is cls and optimizer.adam_w_mode
        assert optimizer.defaults["lr"] == 0.1 and optimizer.defaults["weight_decay"] == 0.5
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.ones(5000)
        optimizer.step()
        expected = {"8bit": torch.int8, "fp32": torch.float32}.get(state_dtype, torch.bfloat16)
        assert optimizer.state[param]["exp_avg"].dtype == expected
        assert type(configured(Engine(offloaded), lr=0.1)).__module__.startswith("deepspeed.")
        assert configured(Engine(offloaded), master_weight_bits=24)._precision.master.dtype == torch.int8


def test_settings_without_effect_or_without_sense_are_refused():
    with patch():
        has_bf16_optimizer = Engine(offloaded=False, stage=1, bf16=True, masters=True, grads=torch.float32)
        for engine in (Engine(stage=2), Engine(bf16=True), has_bf16_optimizer):
            with pytest.raises(ValueError, match="'master_weight_bits', for 16-bit params, .* leave it out"):
                configured(engine, master_weight_bits=24)
            configured(engine, state_dtype="8bit", stochastic_rounding=False)
        with pytest.raises(ValueError, match="Invalid state_dtype: float8; expected"):
            configured(Engine(), state_dtype="float8")


@pytest.mark.parametrize("offloaded", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_bfloat16_masters_take_our_settings(offloaded, states):
    with patch():
        engine = Engine(offloaded, stage=2, bf16=True, masters=True, states=states)
        precision = configured(engine, master_weight_bits=24)._precision
        assert precision.master.dtype == torch.int8
        assert precision.state_dtype == (torch.bfloat16 if states else torch.float32)
        assert configured(engine, state_dtype="8bit", stochastic_rounding=True)._precision.state_dtype == "8bit"


def test_a_config_that_asks_for_torchs_class_gets_it():
    with patch():
        assert type(configured(Engine(), torch_adam=True, amsgrad=True)) is torch.optim.AdamW


def test_functions_that_we_lack_are_those_of_deepspeeds_op(monkeypatch):
    """ZenFlow's worker is such a function."""

    class Own:
        zenflow_adam_ctrl_size = staticmethod(lambda: 128)

    monkeypatch.setattr(CPUAdamBuilder, "jit_load", lambda self, verbose=False: Own)
    with patch():
        op = CPUAdamBuilder().load()
        assert op.zenflow_adam_ctrl_size() == 128
        assert CPUAdamBuilder().load() is op
        with pytest.raises(AttributeError):
            op._not_there  # noqa: B018
    assert op.zenflow_adam_ctrl_size() == 128  # an optimizer may keep our op after the patch has been undone
    assert CPUAdamBuilder().load() is Own


def test_ours_stays_in_place_if_deepspeeds_op_cannot_be_built(monkeypatch):
    def fails(self, verbose=False):
        raise RuntimeError("no ninja")

    monkeypatch.setattr(CPUAdamBuilder, "jit_load", fails)
    with patch():
        op = CPUAdamBuilder().load()
        with pytest.raises(RuntimeError, match="no ninja"):
            op.zenflow_adam_create(0, [0])
        assert CPUAdamBuilder().load() is op


CHILD = """\
import multiprocessing, sys
import torch

def train():
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = DeepSpeedCPUAdam([param])
    optimizer.step()
    print(type(optimizer.ds_opt_adam).__module__, param[0].item() < 1)

if __name__ == "__main__":
    process = multiprocessing.get_context("METHOD").Process(target=train)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("by_call", [True, False], ids=["patch()", "the command"])
def test_children_need_no_compiler_either(tmp_path, method, by_call):
    lines = CHILD.replace("METHOD", method)
    if by_call:
        main = 'if __name__ == "__main__":\n'
        lines = lines.replace(main, f"{main}    import adamops.deepspeed\n    adamops.deepspeed.patch()\n")
    (tmp_path / "train.py").write_text(lines)
    command = ["train.py"] if by_call else ["-m", "adamops.deepspeed", "train.py"]
    done = run_python(*command, cwd=tmp_path, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "adamops.deepspeed True", done.stdout + done.stderr
    assert not (tmp_path / "built").exists()


# Errors ------------------------------------------------------------------------------------------------------------


def test_without_deepspeed_it_says_so(monkeypatch):
    real = builtins.__import__

    def fails(name, *args, **kwargs):
        if name.split(".")[0] == "deepspeed" and not (len(args) > 3 and args[3]):
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(ImportError, match=r"needs DeepSpeed.*No module named 'deepspeed'.*pip install deepspeed"):
        patch()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("_loaded_ops", None), ("NAME", "another"), ("load", lambda self, verbose=False: "another")],
)
def test_another_deepspeed_is_refused_and_left_as_it_is(monkeypatch, attribute, value):
    with monkeypatch.context() as changed:
        changed.setattr(CPUAdamBuilder, attribute, value)
        with pytest.raises(UnknownDeepSpeedError, match=rf"DeepSpeed {deepspeed.__version__} .*{TESTED_VERSION}"):
            patch()
    with patch():  # nothing has been left half done
        pass


def test_other_arguments_of_another_deepspeed_are_an_error_before_anything_is_written():
    with patch():
        cpu_adam, fused_adam = CPUAdamBuilder().load(), FusedAdamBuilder().load()
    for call, count in ((cpu_adam.create_adam, 9), (cpu_adam.adam_update, 13), (cpu_adam.adam_rollback, 11)):
        with pytest.raises(UnknownDeepSpeedError, match=rf"with {count} arguments.*unpatch\(\)"):
            call(*range(count))
    with pytest.raises(UnknownDeepSpeedError, match="multi_tensor_adam"):
        fused_adam.multi_tensor_adam(1)


def test_a_gpu_without_the_cuda_op_leaves_fused_adam_to_deepspeed(monkeypatch):
    accelerator = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(type(accelerator), "device_name", lambda self, index=None: "xpu")
    with patch() as handle:
        assert handle.replaced == ["cpu_adam"]
        assert handle.left == {"fused_adam": "adamops has no op for xpu"}


# The module as a command -------------------------------------------------------------------------------------------


def run_python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(adamops.__file__).parents[1])} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def run(*arguments, cwd):
    return run_python("-m", "adamops.deepspeed", *arguments, cwd=cwd)


def test_the_command_runs_a_script_with_its_own_arguments(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("value = 5\n")
    (tmp_path / "folder" / "train.py").write_text(
        "import sys, beside\n"
        "from deepspeed.ops.op_builder import CPUAdamBuilder\n"
        "print(sys.argv, __name__, beside.value, type(CPUAdamBuilder().load()).__module__)\n"
    )
    done = run("--local_rank=0", "folder/train.py", "--lr", "1", cwd=tmp_path)  # as DeepSpeed's launcher puts it
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "['folder/train.py', '--local_rank=0', '--lr', '1'] __main__ 5 adamops.deepspeed"


def test_the_command_runs_a_module_of_a_package_from_deepspeeds_launcher(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(
        "import sys\n"
        "from deepspeed.ops.op_builder import CPUAdamBuilder\n"
        "print(sys.argv[1:], __name__, __package__, type(CPUAdamBuilder().load()).__module__)\n"
    )
    done = run("--local_rank=0", "-m", "package.train", "--lr", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['--local_rank=0', '--lr', '1'] __main__ package adamops.deepspeed"


def test_the_command_without_a_script_says_how_it_is_used(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 1 and "usage: python -m adamops.deepspeed SCRIPT" in done.stderr


@pytest.mark.slow
def test_ds_report_says_what_it_said_before(capsys):
    from deepspeed.env_report import op_report

    reports = []
    for _ in range(2):
        op_report(verbose=False)
        reports.append(capsys.readouterr().out)
        patch()
    assert reports[0] == reports[1]
    assert "cpu_adam" in reports[0]

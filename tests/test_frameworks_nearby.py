"""Hooks for modules that others import, children that multiprocessing spawns, and the command line of the runner."""

import importlib.util
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adamops
from adamops import _deepspeed_expected
from adamops._deepspeed_children import PatchedChildren
from adamops._deepspeed_runner import Command, parse
from adamops._import_hooks import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and is not."""
    (tmp_path / "some_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "some_module"
    sys.modules.pop("some_module", None)
    assert sys.meta_path == finders, "nothing stays behind"


def test_an_action_waits_for_an_import(module):
    seen = []
    when_imported(module, lambda: seen.append(sys.modules[module].value))
    assert importlib.util.find_spec(module) is not None and not seen, "to ask for a module is not to import it"
    imported = importlib.import_module(module)
    assert seen == [3]
    assert type(imported.__spec__.loader) is type(imported.__loader__) is importlib.machinery.SourceFileLoader
    importlib.reload(imported)
    assert seen == [3]


def test_an_action_is_done_at_once_for_what_is_imported(module):
    importlib.import_module(module)
    seen = []
    when_imported(module, lambda: seen.append(1))
    assert seen == [1]


def test_several_wait_for_one_module_and_one_withdraws(module):
    seen = []
    withdraws = [when_imported(module, lambda i=i: seen.append(i)) for i in range(3)]
    withdraws[1]()
    importlib.import_module(module)
    assert sorted(seen) == [0, 2]


def test_a_module_that_is_not_there_stays_so():
    withdraw = when_imported("no_such_module", lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            importlib.import_module("no_such_module")
    finally:
        withdraw()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_children_inherit_the_patch(tmp_path, method):
    """A stand-in for DeepSpeed is imported in a grandchild, and not before."""
    (tmp_path / "deepspeed.py").write_text("")
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, sys\n"
        "def grandchild():\n"
        "    import adamops.deepspeed as ours\n"
        "    ours.patch = lambda shm_comm: print('patched', shm_comm, flush=True)\n"
        "    import deepspeed\n"
        "def child():\n"
        "    assert 'deepspeed' not in sys.modules and 'torch' not in sys.modules\n"
        f"    process = multiprocessing.get_context('{method}').Process(target=grandchild)\n"
        "    process.start(); process.join(); assert process.exitcode == 0\n"
        "if __name__ == '__main__':\n"
        "    from adamops._deepspeed_children import PatchedChildren\n"
        "    PatchedChildren('adamops.deepspeed', shm_comm=False).enable()\n"
        f"    process = multiprocessing.get_context('{method}').Process(target=child)\n"
        "    process.start(); process.join(); sys.exit(process.exitcode)\n"
    )
    done = run_python("parent.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "patched False\n", done.stderr


def test_no_child_inherits_what_is_disabled():
    settings = multiprocessing.current_process()._config
    before = dict(settings)
    patches = PatchedChildren("adamops.deepspeed", shm_comm=False)
    patches.enable()
    assert settings != before
    patches.disable()
    assert settings == before


def test_a_child_that_cannot_be_patched_says_so_and_goes_on(monkeypatch):
    def fails(shm_comm):
        raise RuntimeError("no op here")

    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    monkeypatch.setitem(sys.modules, "adamops.deepspeed", type(sys)("adamops.deepspeed"))
    monkeypatch.setattr(sys.modules["adamops.deepspeed"], "patch", fails, raising=False)
    monkeypatch.setattr(adamops, "deepspeed", sys.modules["adamops.deepspeed"], raising=False)
    with pytest.warns(UserWarning, match="cannot patch DeepSpeed in this child process: no op here"):
        pickle.loads(pickle.dumps(PatchedChildren("adamops.deepspeed", shm_comm=False)))


# The optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [adamops.DeepSpeedCPUAdam, adamops.FusedAdam])
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_deepspeed_is_waited_for_by_optimizers_of_8_bit_states(cls, state_dtype, monkeypatch):
    monkeypatch.setattr(_deepspeed_expected, "_expecting", False)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    waited_for = []
    monkeypatch.setattr(_deepspeed_expected, "when_imported", lambda name, action: waited_for.append(name))
    for _ in range(2):
        cls([torch.nn.Parameter(torch.zeros(3))], state_dtype=state_dtype)
    assert waited_for == (["deepspeed"] if state_dtype else [])


def map_pytorch_optim_to_deepspeed(optimizer):
    """As Accelerate's function of that name begins."""
    return {key: value for key, value in optimizer.defaults.items() if key in ("lr", "weight_decay")}


MODES = {adamops.DeepSpeedCPUAdam: "adamw_mode", adamops.FusedAdam: "adam_w_mode"}
LOST = [
    ({"weight_decay": 0.1}, "decoupled weight decay"),
    ({"state_dtype": "8bit"}, "precision of states and params"),
    ({"master_weight_bits": 24}, "precision of states and params"),
    ({"stochastic_rounding": True}, "precision of states and params"),
    ({"maximize": True}, "maximize"),
]


@pytest.mark.parametrize("cls", MODES)
@pytest.mark.parametrize(("settings", "lost"), LOST, ids=str)
def test_an_optimizer_is_not_replaced_by_one_that_computes_something_else(cls, settings, lost):
    optimizer = cls([torch.nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))], **settings)
    with pytest.raises(RuntimeError, match=rf"adamops.{cls.__name__} .*does not have its {lost}.*patch\(\)"):
        map_pytorch_optim_to_deepspeed(optimizer)
    assert optimizer.defaults["lr"] == 1e-3  # for others


@pytest.mark.parametrize("cls", MODES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_replacement_that_computes_the_same_is_warned_of(cls, decay):
    optimizer = cls([torch.nn.Parameter(torch.zeros(5))], weight_decay=decay, **{MODES[cls]: not decay})
    with pytest.warns(UserWarning, match='zero_force_ds_cpu_optimizer": false'):
        assert map_pytorch_optim_to_deepspeed(optimizer) == {"lr": 1e-3, "weight_decay": decay}


@pytest.mark.parametrize("cls", MODES)
def test_defaults_survive_pickling_and_can_be_set(cls):
    optimizer = cls([torch.nn.Parameter(torch.zeros(5))], lr=0.5)
    copy = pickle.loads(pickle.dumps(optimizer))
    assert copy.defaults == {**optimizer.defaults, "differentiable": False}, "which torch adds"
    copy.defaults = {**copy.defaults, "lr": 0.25}
    assert copy.defaults["lr"] == 0.25


# The command line ---------------------------------------------------------------------------------------------------

LINES = {
    "train.py --x 1": Command("train.py", False, ["--x", "1"]),
    "--local_rank=1 train.py --x 1": Command("train.py", False, ["--local_rank=1", "--x", "1"]),
    "--local_rank 1 train.py --x 1": Command("train.py", False, ["--local_rank", "1", "--x", "1"]),
    "--local-rank 1 train.py": Command("train.py", False, ["--local-rank", "1"]),
    "train.py --local_rank=1 -m x": Command("train.py", False, ["--local_rank=1", "-m", "x"]),
    "-m package.module --x 1": Command("package.module", True, ["--x", "1"]),
    "-mpackage.module --x 1": Command("package.module", True, ["--x", "1"]),
    "--local_rank=1 -m package.module --x 1": Command("package.module", True, ["--local_rank=1", "--x", "1"]),
    "--local_rank 1 -m package.module": Command("package.module", True, ["--local_rank", "1"]),
    "-m package.module --local_rank=1": Command("package.module", True, ["--local_rank=1"]),
    "": None,
    "-m": None,
    "--local_rank=1": None,
    "--local_rank": None,
    "--help": None,
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_names_what_to_run(line):
    assert parse(line.split()) == LINES[line]


def run_python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(Path(adamops.__file__).parents[1]), "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def run(*arguments, cwd, **environment):
    return run_python("-m", "adamops.deepspeed", *arguments, cwd=cwd, **environment)


@pytest.mark.parametrize("before", [[], ["--local_rank=3"], ["--local_rank", "3"]], ids=str)
def test_a_module_of_a_package_runs(tmp_path, before):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "beside.py").write_text("value = 5\n")
    (tmp_path / "package" / "train.py").write_text(
        "import sys\nfrom .beside import value\nprint(sys.argv, __name__, __package__, value)\n"
        "assert sys.modules['__main__'].value == 5\n"
    )
    done = run(*before, "-m", "package.train", "--x", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = str(tmp_path / "package" / "train.py")
    assert done.stdout == f"{[path, *before, '--x', '1']} __main__ package 5\n"


def test_a_console_script_runs(tmp_path):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "some-trainer"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint('ran', sys.argv[1:], __name__)\n")
    script.chmod(0o755)
    done = run("some-trainer", "--x", "1", cwd=tmp_path, PATH=str(script.parent))
    assert done.returncode == 0 and done.stdout == "ran ['--x', '1'] __main__\n", done.stderr


def test_a_script_that_is_not_there_is_named(tmp_path):
    done = run("package.train", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no script 'package.train'" in done.stderr and "-m package.train" in done.stderr


def test_help_is_no_failure(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m adamops.deepspeed SCRIPT")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_script_may_set_the_environment_that_deepspeed_reads(tmp_path):
    """DeepSpeed chooses its accelerator when it is imported, so that must not happen before the script begins."""
    (tmp_path / "deepspeed.py").write_text("import os\nprint(os.environ['DS_ACCELERATOR'])\n")
    (tmp_path / "train.py").write_text("import os\nos.environ['DS_ACCELERATOR'] = 'cpu'\nimport deepspeed\n")
    done = run("train.py", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{Path(adamops.__file__).parents[1]}")
    assert done.stdout == "cpu\n"
    assert "ImportError" in done.stderr, "the stand-in lacks what patch() needs, which is said"

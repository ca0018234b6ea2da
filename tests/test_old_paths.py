"""What was saved or imported before modules moved still works."""

import importlib
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adamops

# Two steps of each class, made by adamops 0.1 when all modules were in adamops/ops/adam; and the params after a third.
SAVED = torch.load(Path(__file__).parent / "saved" / "optimizers_0.1.pt", weights_only=True)


def check_third_step(optimizer, saved):
    (group,) = optimizer.param_groups
    generator = torch.Generator().manual_seed(2)
    for param in group["params"]:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16()
    optimizer.step()
    assert all(map(torch.equal, group["params"], saved["after"]))


@pytest.mark.parametrize("name", SAVED)
def test_a_pickled_optimizer_of_before_goes_on_to_the_same_bits(name):
    check_third_step(pickle.loads(SAVED[name]["pickle"]), SAVED[name])


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_before_goes_on_to_the_same_bits(name):
    saved = SAVED[name]
    params = [torch.nn.Parameter(value.clone()) for value in saved["params"]]
    optimizer = getattr(adamops, name)(params, **saved["arguments"])
    optimizer.load_state_dict(torch.load(io.BytesIO(saved["checkpoint"]), weights_only=True))
    check_third_step(optimizer, saved)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("adamops", ("CPUAdam", "DeepSpeedCPUAdam", "FusedAdam", "portable_state_dicts", "step_in_backward")),
        ("adamops.ops.adam", ("CPUAdam", "DeepSpeedCPUAdam", "FusedAdam")),
        ("adamops.ops.adam.cpu_adam", ("CPUAdam", "DeepSpeedCPUAdam")),
        ("adamops.ops.adam.fused_adam", ("FusedAdam",)),
        ("adamops.in_backward", ("step_in_backward",)),
        ("adamops.deepspeed", ("patch",)),
    ],
)
def test_public_import_paths_stay(module, names):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in names)


MODULES = sorted(
    ".".join(("adamops", *path.relative_to(Path(adamops.__file__).parent).with_suffix("").parts))
    for path in Path(adamops.__file__).parent.rglob("*.py")
    if path.stem not in ("__init__", "plugin_process") and "_native" not in path.parts and "csrc" not in path.parts
)


def test_every_module_can_be_the_first_to_be_imported():
    """Each in a child of a process that has imported torch, which would take most of the time."""
    code = """if True:
        import importlib, os, sys, torch
        for module in sys.argv[1:]:
            child = os.fork()
            if not child:
                importlib.import_module(module)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                print(module)
    """
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr

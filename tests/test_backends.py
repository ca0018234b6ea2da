"""Backends by type of device: other packages bring devices as entry points, and a broken one costs a warning."""

import json
import subprocess
import sys

import pytest
from plugins import offer

GROUP = "adamops.backends"
META = """
from adamops.optim.backends.torch import TorchBackend

class MetaBackend(TorchBackend):
    name = "of_the_plugin"

def make(rule, device):
    return MetaBackend() if device.type == "meta" else None
"""
TRAIN = """
import sys, warnings
import os
import torch
import adamops

if "WITHOUT_OP" in os.environ:
    adamops.op_builder.get("cpu_adam").MODULE = "adamops._native.missing"

def train(cls, device, **settings):
    param = torch.nn.Parameter(torch.ones(5000, device=device))
    optimizer = cls([param], **settings)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    (state,) = optimizer.state.values()
    return optimizer._backends[param.device].name, state["step"], state["exp_avg"].device.type

for cls in (adamops.DeepSpeedCPUAdam, adamops.FusedAdam):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for device in sys.argv[1:]:
            try:
                print(*train(cls, device))
            except ValueError as error:
                print("ValueError", error)
    for warning in seen:
        print(warning.message, "|", warning.filename)
"""


def run(environment, *devices):
    command = [sys.executable, "-c", TRAIN, *devices]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_plugin_brings_a_device_to_both_classes(tmp_path):
    environment = offer(tmp_path, "meta", META, "meta_plugin:make", group=GROUP)
    assert run(environment, "meta", "cpu") == ["of_the_plugin 2 meta", "cpu_adam 2 cpu"] * 2


@pytest.mark.parametrize("op", ["cpu_adam", "of_the_plugin"])
def test_a_plugin_comes_after_the_op_of_a_device_and_before_pure_pytorch(tmp_path, op):
    code = META.replace('"meta"', '"cpu"')
    environment = offer(tmp_path, "other", code, "cpu_plugin:make", group=GROUP)
    if op == "of_the_plugin":
        environment |= {"WITHOUT_OP": "1", "PATH": "/nonexistent", "ADAMOPS_CACHE_DIR": str(tmp_path / "cache")}
    assert run(environment, "cpu") == [f"{op} 2 cpu"] * 2


def test_without_a_plugin_the_classes_do_as_before(tmp_path):
    refused, *fused = run(offer(tmp_path, "none", "def make(*_): return None", "no_plugin:make", group=GROUP), "meta")
    assert refused.startswith("ValueError param group 0, param 0") and "is not on the CPU" in refused
    assert fused[0] == "torch_adam 2 meta"
    assert fused[1:] == [
        "adamops falls back to pure PyTorch, which is slow. No op is compiled for params on meta. | <string>"
    ]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("make = 3", "TypeError: bad_plugin:make is a int; expected a function"),
        ("def make(rule, device): raise KeyError('key')", "KeyError: 'key'"),
        ("def make(rule, device): return 3", "TypeError: what bad_plugin:make returned is no backend: it has no "),
    ],
)
def test_a_broken_plugin_costs_a_warning(tmp_path, code, error):
    environment = offer(tmp_path, "bad", code, "bad_plugin:make", group=GROUP)
    lines = run(environment, "meta", "cpu")
    assert lines.count("cpu_adam 2 cpu") == 2 and "torch_adam 2 meta" in lines
    (warning,) = {line for line in lines if "ignores" in line}
    assert warning.startswith(f"adamops ignores the backend 'bad' of fake-ops: {error}")


def test_a_plugin_says_why_it_cannot_work_here(tmp_path):
    code = """
from adamops.op_builder import OpUnavailableError

def make(rule, device):
    if device.type == "meta":
        raise OpUnavailableError("The driver of meta is too old.")
"""
    environment = offer(tmp_path, "meta", code, "meta_plugin:make", group=GROUP)
    *_, trained, warning = run(environment, "meta")
    assert trained == "torch_adam 2 meta"
    assert warning.startswith("adamops falls back to pure PyTorch, which is slow. The driver of meta is too old. |")


def test_the_report_lists_backends_of_plugins_and_loads_none(tmp_path):
    environment = offer(tmp_path, "meta", "raise RuntimeError", "meta_plugin:make", group=GROUP)
    command = [sys.executable, "-m", "adamops.report", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout)["machine"]["backends"] == ["meta of fake-ops"]

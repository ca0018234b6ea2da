"""What the tests share: a fresh random seed for each test, printed when it fails, and every SIMD target of this CPU."""

import importlib.util
import os
import random
import secrets
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
import torch.distributed as dist
from offload_twins import DEVICES, new_device
from optimizers import MAKERS, PATHS, STATES, EmulatedFusedAdam
from torch.distributed.device_mesh import init_device_mesh

from adamops import op_builder

if not importlib.util.find_spec("hypothesis"):
    sys.path.append(str(Path(__file__).parent / "stand_ins"))

# What some files of tests need besides torch and pytest; without it (ci/gpu.sh) the others run all the same.
NEEDS = {
    "test_bench.py": ["matplotlib"],
    "test_packaging.py": ["setuptools", "build", "pybind11", "cpuinfo", "platformdirs"],
    "test_op_builder.py": ["setuptools", "cpuinfo", "platformdirs"],
    "test_bits.py": ["numpy"],
    "test_layers.py": ["grimp", "importlinter"],
    "test_workflows.py": ["check_jsonschema"],  # which brings ruamel.yaml
    "test_docs_site.py": ["sphinx", "myst_parser", "furo"],  # the extra `docs`
}
MISSING = {file: [name for name in needed if not importlib.util.find_spec(name)] for file, needed in NEEDS.items()}
LEFT_OUT = {file: names for file, names in MISSING.items() if names}
collect_ignore = list(LEFT_OUT)


def pytest_ignore_collect(collection_path, config):
    """Leaves out files without a smoke test: collecting all would take a third of the time of `pytest -m smoke`."""
    if config.option.markexpr == "smoke" and collection_path.suffix == ".py":
        return True if "mark.smoke" not in collection_path.read_text() else None
    return None


def pytest_terminal_summary(terminalreporter):
    for name, missing in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {name}, as {', '.join(missing)} cannot be imported")


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds all generators. Set ADAMOPS_TEST_SEED to repeat a failure."""
    value = int(os.environ.get("ADAMOPS_TEST_SEED") or secrets.randbits(32))
    torch.manual_seed(value)
    random.seed(value)
    request.node.user_properties.append(("seed", value))
    print(f"ADAMOPS_TEST_SEED={value}")  # pytest shows it with a failure
    return value


@pytest.fixture(scope="session")
def cuda_op():
    """The emulated CUDA op; its device addresses are host addresses."""
    module = cuda_emulation.load(cuda_emulation.build_op())
    EmulatedFusedAdam.module = module
    return module


@pytest.fixture(scope="session", params=list(MAKERS))
def Adam(request):  # noqa: N802
    """Makes an optimizer from DeepSpeedCPUAdam's arguments: each class in turn, on each op."""
    if "CUDA" in request.param:
        request.getfixturevalue("cuda_op")
    return MAKERS[request.param]


@pytest.fixture(scope="session", params=list(PATHS))
def PathAdam(request):  # noqa: N802
    """As Adam, by each path: the fast one, the slow one, and pure PyTorch."""
    if "CUDA" in request.param:
        request.getfixturevalue("cuda_op")
    return PATHS[request.param]


@pytest.fixture(params=list(STATES))
def states(request):
    """The settings for a kind of states, and the dtype of the params that have it."""
    return STATES[request.param]


@pytest.fixture
def cpu_adam():
    """The extension module, put back to its best target and torch to its threads afterwards."""
    module = op_builder.get("cpu_adam").load()
    target, threads = module.target(), torch.get_num_threads()
    yield module
    module.use_target(target)
    torch.set_num_threads(threads)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=DEVICES)
def device(request, seed):
    """A device to offload from, of each kind, on which no copy goes wrong."""
    device = new_device(request.param, seed)
    yield device
    assert not getattr(device, "faults", [])

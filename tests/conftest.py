"""What the tests share: a fresh random seed for each test, printed when it fails, and every SIMD target of this CPU."""

import os
import random
import secrets

import pytest
import torch

from adamops import op_builder


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds all generators. Set ADAMOPS_TEST_SEED to repeat a failure."""
    value = int(os.environ.get("ADAMOPS_TEST_SEED") or secrets.randbits(32))
    torch.manual_seed(value)
    random.seed(value)
    request.node.user_properties.append(("seed", value))
    print(f"ADAMOPS_TEST_SEED={value}")  # pytest shows it with a failure
    return value


@pytest.fixture
def cpu_adam():
    """The extension module, put back to its best target and torch to its threads afterwards."""
    module = op_builder.get("cpu_adam").load()
    target, threads = module.target(), torch.get_num_threads()
    yield module
    module.use_target(target)
    torch.set_num_threads(threads)

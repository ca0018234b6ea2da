"""The fuzzer finds injected faults; and what it found first. Long runs are for ci/fuzz.py and ci/sanitize.sh."""

import contextlib
import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import STATES

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.optim import optimizer as optimizer_module

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent.parent / "ci" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz"] = fuzz
spec.loader.exec_module(fuzz)

CLASSES = pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])


def stepped(cls, **settings):
    param = torch.nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    optimizer = cls([param], lr=0.1, **settings)
    optimizer.step()
    return optimizer, param


def freed(value):
    value.untyped_storage().resize_(0)
    return value


def test_finds_a_half_step(seed, monkeypatch):
    commit = optimizer_module.commit

    def write_then_raise(states, steps, background):
        commit(states, steps)
        raise ValueError("injected after the step has been written")

    monkeypatch.setattr(optimizer_module, "commit", write_then_raise)
    with pytest.raises(fuzz.Finding, match="seed"):
        for i in range(20):
            fuzz.run_session(seed + i)


@CLASSES
def test_refuses_numbers_whose_storage_was_freed(cls):
    optimizer, param = stepped(cls)
    before = param.detach().clone()
    optimizer.state[param]["step"] = freed(torch.tensor(1.0))
    with pytest.raises(ValueError, match="step count.*freed or shortened"):
        optimizer.step()
    optimizer.state[param]["step"] = 1
    optimizer.param_groups[0]["lr"] = freed(torch.tensor(0.1))
    with pytest.raises(ValueError, match="lr.*freed or shortened"):
        optimizer.step()
    assert torch.equal(param, before)


@CLASSES
def test_refuses_to_zero_grads_whose_storage_was_freed(cls):
    optimizer, param = stepped(cls)
    freed(param.grad)
    with pytest.raises(ValueError, match="freed or shortened"):
        optimizer.zero_grad(set_to_none=False)


@CLASSES
def test_refuses_all_values_if_one_cannot_be_copied(cls):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = cls(params)
    with pytest.raises(ValueError, match="freed or shortened"):
        optimizer.load_fp32_params([torch.zeros(8), freed(torch.zeros(8))])
    assert all(torch.equal(param, torch.ones(8)) for param in params)


@CLASSES
def test_steps_params_whose_data_was_made_in_inference_mode(cls):
    with torch.inference_mode():
        values = torch.ones(8)
    param, plain = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.ones(8))
    param.data = values
    param.grad, plain.grad = torch.ones(8), torch.ones(8)
    cls([param]).step()
    cls([plain]).step()
    assert torch.equal(param, plain)


def test_a_short_run_finds_nothing(seed):
    """In processes of its own, as a crash is a finding."""
    assert fuzz.main(["--first-seed", str(seed), "--calls", "300", "--threads", "1"]) == 0


@pytest.mark.filterwarnings("ignore")  # of torch, of its own kinds of tensors
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_the_ops_reader_takes_the_checks_in_python_take(data):
    """On tensors of all kinds, for params, grads, states, scales, remainders and masters."""
    name = data.draw(st.sampled_from(list(STATES)), "states")
    arguments, dtype = STATES[name]
    numel = data.draw(st.sampled_from([0, 1, 5, 4096, 4353]), "numel")
    r = random.Random(data.draw(st.integers(0, 2**32), "seed"))
    params = [torch.nn.Parameter(torch.randn(numel).to(dtype)) for _ in range(2)]
    optimizer = DeepSpeedCPUAdam(params, **arguments)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert fuzz.check_what_cpp_takes(optimizer) == (2 if optimizer._backends[fuzz.HOST]._reader else 0)
    keys = [key for key in optimizer.state[params[0]] if key != "step"]
    for _ in range(data.draw(st.integers(1, 2), "how many change")):
        key = data.draw(st.sampled_from(["param", "grad", *keys]), "what changes")
        kinds = {**fuzz.HARMLESS, **fuzz.HARMFUL}
        kind = data.draw(st.sampled_from([k for k in kinds if k != "functional"]), "what becomes of it")
        param = params[data.draw(st.integers(0, 1), "of which param")]
        state = optimizer.state[param]
        with contextlib.suppress(*fuzz.IN_WORDS, NotImplementedError, IndexError):  # torch cannot do it
            if key == "param":
                param.data = kinds[kind](fuzz.readable(param), r)
            elif key == "grad":
                param.grad = kinds[kind](fuzz.readable(param.grad), r)
            else:
                state[key] = kinds[kind](fuzz.readable(state[key]), r)
    fuzz.check_what_cpp_takes(optimizer)

"""What is loaded: states of other kinds and other optimizers, masters of other kinds, what was lost, and its memory."""

import copy
import io
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from adamops import AdamW, DeepSpeedCPUAdam, FusedAdam, portable_state_dicts
from adamops.ops.adam.adam import AdamRule
from adamops.optim.state.precision import SCALES, names_of

AVERAGES = names_of(AdamRule.states)
CLASSES = [DeepSpeedCPUAdam, FusedAdam]
HALVES = [torch.bfloat16, torch.float16]
SIZE = 5000


def trained(cls, params, steps=3, **settings):
    """Params, as copies, after some steps; and the optimizer."""
    params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = cls(params, lr=1e-2, **settings)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()
    return params, optimizer


def clones(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# 8-bit states are nobody else's numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file, lambda x: pickle.loads(pickle.dumps(x))])
def test_eight_bit_states_are_saved_by_names_of_their_own(cls, amsgrad, way):
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit", amsgrad=amsgrad)
    saved = way(optimizer.state_dict())
    assert saved["state"][0].keys().isdisjoint(AVERAGES)
    held = optimizer.state[param]
    assert held.keys() >= {"exp_avg", "exp_avg_sq", SCALES}  # in memory they have the names that users know
    other = cls(clones([param]), state_dtype="8bit")
    other.load_state_dict(saved)
    (loaded,) = other.state.values()
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[key], held[key]) for key in held.keys() - {"step"})
    for peer in (torch.optim.AdamW, torch.optim.Adam):
        theirs = peer(clones([param]), amsgrad=amsgrad)
        with pytest.raises(KeyError, match="exp_avg"):
            theirs.load_state_dict(way(optimizer.state_dict()))
            theirs.param_groups[0]["params"][0].grad = torch.ones(SIZE)
            theirs.step()
    theirs.load_state_dict(optimizer.state_dict(dequantize=True))
    theirs.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dicts_from_before_have_codes_by_the_names_of_averages(cls):
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit")
    old = {**optimizer.state_dict(), "state": {0: dict(optimizer.state[param])}}
    other = cls(clones([param]), state_dtype="8bit")
    other.load_state_dict(copy.deepcopy(old))
    (loaded,) = other.state.values()
    assert all(torch.equal(loaded[key], optimizer.state[param][key]) for key in ("exp_avg", "exp_avg_sq", SCALES))
    both = copy.deepcopy(old)
    both["state"][0]["quantized_exp_avg"] = both["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match="param group 0, param 0 has 'exp_avg' and 'quantized_exp_avg'.*8bit"):
        other.load_state_dict(both)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_saved_state_that_is_put_into_the_optimizer_by_hand_goes_on(cls):
    """As ZeroRedundancyOptimizer does, which loads the states of its shards itself."""
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit")
    (twin,) = clones([param])
    other = cls([twin], lr=1e-2, state_dtype="8bit")
    other.state[twin] = copy.deepcopy(optimizer.state_dict())["state"][0]
    assert other.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()
    param.grad = torch.randn(SIZE)
    twin.grad = param.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(param, twin) and other.state[twin]["step"] == 4


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size", [4096, SIZE, 8192])
@pytest.mark.parametrize("name", AVERAGES[:2])
def test_codes_that_became_floats_are_refused(cls, size, name):
    (param,), optimizer = trained(cls, [torch.randn(size)], state_dtype="8bit")
    broken = copy.deepcopy(optimizer.state[param])
    for key in AVERAGES[:2]:
        broken[key] = broken[key].float()
    grown = torch.nn.Parameter(torch.randn(size + 3000))
    for changed, state in ((param, broken), (grown, {**broken, name: broken[name], "step": 3})):
        if changed is grown:
            state = {k: torch.cat((v, torch.zeros(3000))) if k in AVERAGES else v for k, v in state.items()}
        optimizer.state.clear()
        optimizer.param_groups[0]["params"][0] = changed
        optimizer.state[changed] = state
        before = changed.detach().clone()
        changed.grad = torch.ones_like(changed)
        with pytest.raises(ValueError, match="param 0 .* float states beside 'block_scales'.*8bit"):
            optimizer.step()
        assert torch.equal(changed, before)
        saved = {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
        with pytest.raises(ValueError, match="float states beside 'block_scales'.*8bit"):
            cls([changed], state_dtype="8bit").load_state_dict(saved)


@pytest.mark.parametrize("cls", CLASSES)
def test_codes_that_grew_without_their_scales_are_refused(cls):
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit")
    state = {k: torch.cat((v, v.new_zeros(3000))) if k in AVERAGES else v for k, v in optimizer.state[param].items()}
    grown = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.randn(SIZE + 3000))
    optimizer.state[grown] = state
    grown.grad = torch.ones_like(grown)
    with pytest.raises(ValueError, match="8-bit states without the 'block_scales'.*8bit"):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_float_states_given_to_an_eight_bit_optimizer_stay_floats(cls):
    """As code that grows params makes them, without scales left over."""
    param = torch.nn.Parameter(torch.randn(4, SIZE).t())  # also where C++ does not read it
    optimizer = cls([param], state_dtype="8bit")
    optimizer.state[param] = {"step": 1, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32 and SCALES not in optimizer.state[param]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("columns", [1, 4])
def test_scales_of_other_columns_are_refused_when_loaded(cls, columns):
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit")
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0][SCALES] = torch.ones(20, columns, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="20 rows, one for each quantization block, and a column for each state"):
        optimizer.load_state_dict(broken)


@pytest.mark.parametrize("target", ["8bit", torch.float32, torch.bfloat16])
def test_states_whose_amsgrad_was_switched_off_load(target):
    (param,), optimizer = trained(DeepSpeedCPUAdam, [torch.randn(SIZE)], state_dtype="8bit", amsgrad=True)
    optimizer.param_groups[0]["amsgrad"] = False
    other = DeepSpeedCPUAdam(clones([param]), state_dtype=target)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (a,), (b,) = (o.state_dict(dequantize=True)["state"].values() for o in (optimizer, other))
    for name in AVERAGES:
        torch.testing.assert_close(b[name], a[name], rtol=0.01 if target == torch.bfloat16 else 0, atol=0)
    two_columns = copy.deepcopy(optimizer.state_dict())
    two_columns["state"][0][SCALES] = two_columns["state"][0][SCALES][:, :2].contiguous()
    other.load_state_dict(two_columns)  # a state that a step has cut
    assert torch.equal(other.state_dict(dequantize=True)["state"][0]["exp_avg"], b["exp_avg"])


# Masters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "relative"), [(24, 2.0**-15), (32, 2.0**-23)])
@pytest.mark.parametrize("params_first", [True, False])
def test_float32_masters_become_remainders(dtype, bits, relative, params_first):
    (param,), optimizer = trained(FusedAdam, [torch.randn(SIZE).to(dtype)], master_weights=True)
    (master,) = optimizer.fp32_params()
    twin = torch.nn.Parameter(param.detach().clone() if params_first else torch.zeros(SIZE, dtype=dtype))
    other = DeepSpeedCPUAdam([twin], master_weight_bits=bits)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert params_first or not twin.any()  # loading writes no param
    with torch.no_grad():
        twin.copy_(param)
    absolute = 2.0**-40 if dtype == torch.float16 and bits == 32 else 2.0**-32 if dtype == torch.float16 else 0
    assert ((other.fp32_params()[0] - master).abs() <= relative * master.abs() + absolute).all()
    if bits == 32 and dtype == torch.bfloat16:
        tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(other.fp32_params()[0][~tie], master[~tie])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("params_first", [True, False])
@pytest.mark.parametrize("made_portable", [True, False])
def test_remainders_become_float32_masters(dtype, bits, params_first, made_portable):
    (param,), optimizer = trained(FusedAdam, [torch.randn(SIZE).to(dtype)], master_weight_bits=bits)
    if made_portable:
        portable_state_dicts(optimizer)
    (master,) = optimizer.fp32_params()
    twin = torch.nn.Parameter(param.detach().clone() if params_first else torch.zeros(SIZE, dtype=dtype))
    other = FusedAdam([twin], master_weights=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        twin.copy_(param)
    assert torch.equal(other.fp32_params()[0], master)
    again = FusedAdam(clones([twin]), master_weight_bits=bits)
    again.load_state_dict(copy.deepcopy(other.state_dict()))  # before a step it is a remainder still
    assert torch.equal(again.fp32_params()[0], master)
    twin.grad, other.param_groups[0]["lr"] = torch.ones(SIZE, dtype=dtype), 0.0
    other.step()
    assert torch.equal(other.state[twin]["master_param"], master) and "param_remainder" not in other.state[twin]


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
def test_masters_of_params_that_have_none_here_are_left_out(settings):
    (param,), optimizer = trained(FusedAdam, [torch.randn(SIZE).bfloat16()], master_weights=True)
    for twin in (param.detach().clone(), param.detach().float()):
        other = FusedAdam([torch.nn.Parameter(twin)], **settings)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert "master_param" not in other.state_dict()["state"][0]


@pytest.mark.parametrize("settings", [{"master_weights": True}, {"master_weight_bits": 24}, {"master_weight_bits": 32}])
@pytest.mark.parametrize("stepped", [True, False])
def test_params_from_float32_are_all_loaded_or_none(settings, stepped):
    params, optimizer = trained(FusedAdam, [torch.randn(SIZE).bfloat16() for _ in range(2)], int(stepped), **settings)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    good = torch.randn(SIZE)
    for bad, error, message in [
        (torch.zeros(3), ValueError, r"param 1 has shape \(5000,\), and \(3,\) was given"),
        (torch.zeros(SIZE, dtype=torch.complex64), TypeError, "param 1 is of torch.bfloat16, and torch.complex64"),
        (torch.zeros(SIZE).to_sparse(), TypeError, "param 1 .*sparse_coo was given"),
        (torch.zeros(SIZE, device="meta"), ValueError, "param 1: what was given is on the device meta"),
        ([0.0] * SIZE, TypeError, "param 1: a list was given"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.load_fp32_params([good, bad])
        assert all(map(torch.equal, params, before))
        now = optimizer.state_dict()["state"]
        assert now.keys() == state.keys()
        assert all(torch.equal(now[k][n], v) for k in state for n, v in state[k].items() if isinstance(v, torch.Tensor))
    optimizer.load_fp32_params([good, good.double()])
    first, second = optimizer.fp32_params()
    assert torch.equal(first, second)
    assert (first - good).abs().max() < (1e-4 if settings.get("master_weight_bits") == 24 else 1e-7)
    if not stepped:  # masters are kept from before the first step on, in checkpoints too
        other = FusedAdam(clones(params), **settings)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert torch.equal(other.fp32_params()[0], first)


# States that are not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}, {"master_weight_bits": 24}])
@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step", SCALES])
def test_a_state_that_lost_a_tensor_is_not_begun_anew(cls, settings, lost):
    if lost == SCALES and "state_dtype" not in settings:
        return
    params, optimizer = trained(cls, [torch.randn(SIZE).bfloat16() for _ in range(2)], **settings)
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer.state[params[1]][lost]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=f"param group 0, param 1 .*'{lost}'"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and optimizer.state[params[0]]["step"] == 3
    saved["state"][1].pop(lost, None)
    saved["state"][1].pop("quantized_" + lost, None)
    with pytest.raises(ValueError, match=f"param group 0, param 1 .*'{lost}'"):
        cls(clones(params), **settings).load_state_dict(saved)


@pytest.mark.parametrize("settings", [{"master_weights": True}, {"master_weight_bits": 24}, {"master_weight_bits": 32}])
@pytest.mark.parametrize("step", [None, 0, torch.tensor(0.0)])
def test_a_param_that_never_had_a_grad_may_have_a_master_only(settings, step):
    params = [torch.nn.Parameter(torch.randn(SIZE).bfloat16()) for _ in range(2)]
    optimizer = FusedAdam(params, **settings)
    values = [torch.randn(SIZE) for _ in params]
    optimizer.load_fp32_params(values)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if step is not None:
        saved["state"][1]["step"] = step
    other = FusedAdam(clones(params), **settings)
    other.load_state_dict(saved)
    assert torch.equal(other.fp32_params()[1], optimizer.fp32_params()[1])
    for chosen in (optimizer, other):
        last = chosen.param_groups[0]["params"][1]
        last.grad = torch.ones_like(last)
        chosen.param_groups[0]["params"][0].grad = None
        chosen.step()
    assert torch.equal(other.fp32_params()[1], optimizer.fp32_params()[1])
    theirs = torch.optim.AdamW(clones(params))
    theirs.load_state_dict(FusedAdam(params, **settings).state_dict(dequantize=True))


# Other optimizers ---------------------------------------------------------------------------------------------------


def group_of(**settings):
    return {"params": [0], "lr": 1e-3, "weight_decay": 0.0, **settings}


OTHERS = {
    "SGD": lambda p: torch.optim.SGD([p], momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad([p]),
    "Adadelta": lambda p: torch.optim.Adadelta([p]),
    "RMSprop": lambda p: torch.optim.RMSprop([p]),
    "Rprop": lambda p: torch.optim.Rprop([p]),
    "ASGD": lambda p: torch.optim.ASGD([p]),
    "LBFGS": lambda p: torch.optim.LBFGS([p]),
    "Adafactor": lambda p: torch.optim.Adafactor([p]),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("stepped", [True, False])
def test_checkpoints_of_torchs_other_optimizers_are_refused_by_name(cls, name, stepped):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    param = torch.nn.Parameter(torch.randn(4, 4))
    source = OTHERS[name](param)
    if stepped and name != "LBFGS":
        param.grad = torch.randn(4, 4)
        source.step()
    optimizer = cls([param])
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=f"not the state of an Adam optimizer, but looks like that of .*{name}"):
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    assert not optimizer.state and [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]


@pytest.mark.smoke
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("state", "group", "message"),
    [
        ({}, {"betas": (0.9, 0.99)}, "has no eps; this is not the state of an Adam optimizer, but looks .* of Lion"),
        ({"exp_avg": torch.zeros(8)}, {"betas": (0.9, 0.99)}, "has no 'step', 'exp_avg_sq'.* of Lion"),
        ({}, {"clip_threshold": 1.0, "eps": (1e-30, 1e-3)}, "has no betas.* of Adafactor"),
        ({"step": 3, "exp_avg_sq_row": torch.zeros(8)}, {"clip_threshold": 1.0}, "'exp_avg_sq_row'.* of Adafactor"),
        ({}, {"momentum": 0.95, "nesterov": True, "ns_steps": 5}, "has no betas.* of Muon"),
        ({"step": 3, "state1": torch.zeros(8), "state2": torch.zeros(8)}, {}, "of an optimizer of bitsandbytes"),
        ({"step": 3, "exp_avg": torch.zeros(8), "exp_inf": torch.zeros(8)}, {}, "has no 'exp_avg_sq'.* of Adamax"),
    ],
)
def test_checkpoints_of_other_optimizers_are_refused_by_name(cls, state, group, message):
    optimizer = cls([torch.nn.Parameter(torch.randn(8))])
    saved = {"state": {0: state} if state else {}, "param_groups": [group_of(**group)]}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert not optimizer.state and optimizer.param_groups[0]["eps"] == 1e-8


@pytest.mark.parametrize("cls", [*CLASSES, AdamW])
@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        ({}, ValueError, "a state dict has no 'state', but nothing; this is not"),
        ({"model": {}, "optimizer": {}}, ValueError, "has no 'state', but 'model', 'optimizer'; this is not"),
        ({"state": {}}, ValueError, "has no 'param_groups', but 'state'"),
        ({"state": [], "param_groups": []}, TypeError, "has a list as 'state'"),
        ({"state": {}, "param_groups": 3}, TypeError, "has a int as 'param_groups'"),
        ({"state": {}, "param_groups": [{}]}, ValueError, "param group 0 has no params"),
        ({"state": {}, "param_groups": [{"params": 3}]}, ValueError, "param group 0 has no params"),
        ({"state": {}, "param_groups": [[0]]}, ValueError, "param group 0 has no params"),
        (None, TypeError, "Invalid state dict: a NoneType; expected a dict"),
        ([], TypeError, "Invalid state dict: a list; expected a dict"),
    ],
    ids=str,
)
def test_what_is_no_state_dict_of_an_optimizer_is_refused(cls, saved, error, message):
    optimizer = cls([torch.nn.Parameter(torch.ones(3))], lr=0.25)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, "param group 0, param 0 has the step count -1"),
        (float("nan"), ValueError, "param group 0, param 0 has the step count nan"),
        (torch.tensor(float("inf")), ValueError, "param group 0, param 0 has the step count inf"),
        ("7", TypeError, "param group 0, param 0 has a str as step count"),
        (torch.ones(2), ValueError, r"param group 0, param 0 has a step count of shape \(2,\)"),
        (torch.ones((), device="meta"), ValueError, "param group 0, param 0 has a step count on the device meta"),
    ],
)
def test_step_counts_that_are_none_are_refused_when_loaded(cls, step, error, message):
    _, optimizer = trained(cls, [torch.randn(8)])
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["step"] = step
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("cls", CLASSES)
def test_step_counts_in_shared_memory_stay_there(cls):
    """Several processes count on them; others become ints."""
    (param,), optimizer = trained(cls, [torch.randn(8)])
    saved = copy.deepcopy(optimizer.state_dict())
    count = saved["state"][0]["step"] = torch.tensor(3.0).share_memory_()
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"] is count
    optimizer.step()
    assert optimizer.state[param]["step"] is count and count == 4
    saved["state"][0]["step"] = torch.tensor(3.0)
    optimizer.load_state_dict(saved)
    assert type(optimizer.state[param]["step"]) is int


# Frozen params, shared memory, defaults, hooks ----------------------------------------------------------------------


def frozen_params():
    return [
        torch.nn.Parameter(value, requires_grad=False)
        for value in (
            torch.arange(8, dtype=torch.uint8),
            torch.ones(3, 3, dtype=torch.int8),
            torch.ones(3, dtype=torch.float64),
            torch.ones(3, dtype=torch.complex64),
            torch.ones(2, 2).to_sparse(),
            torch.ones(1, dtype=torch.bfloat16).expand(5),
            torch.ones(4, 6)[:, ::2],
            torch.ones(3, device="meta"),
        )
    ]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit", "master_weight_bits": 24}])
@pytest.mark.parametrize("first", [True, False])
def test_frozen_params_of_any_kind_are_taken(cls, settings, first):
    frozen, trains = frozen_params(), torch.nn.Parameter(torch.randn(SIZE).bfloat16())
    params = [*frozen, trains] if first else [trains, *frozen]
    optimizer = cls(params, **settings)
    optimizer.add_param_group({"params": frozen_params()})
    assert optimizer.clip_grad_norm_(1.0) == 0.0
    for _ in range(2):
        trains.grad = torch.ones_like(trains)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.state) == 1
    values = optimizer.fp32_params()
    for param, value in zip([*params, *optimizer.param_groups[1]["params"]], values, strict=True):
        assert value.dtype == (torch.float32 if param.is_floating_point() and not param.is_sparse else param.dtype)
    optimizer.load_fp32_params(values)
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict({**theirs.state_dict(), "state": optimizer.state_dict(dequantize=True)["state"]})


@pytest.mark.parametrize("cls", CLASSES)
def test_a_frozen_param_is_checked_once_it_has_a_grad(cls):
    frozen, trains = torch.nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False), torch.ones(3)
    trains = torch.nn.Parameter(trains)
    optimizer = cls([trains, frozen])
    frozen.requires_grad_()
    frozen.grad, trains.grad = torch.ones(3, dtype=torch.float64), torch.ones(3)
    with pytest.raises(TypeError, match=r"param group 0, param 1 .*torch.float64.*dtype is not supported"):
        optimizer.step()
    assert (trains == 1).all()


class Quantized(torch.Tensor):
    """A subclass, as bitsandbytes has for params of 4 bits."""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch reads no tensors for C++")
def test_frozen_params_of_subclasses_leave_the_fast_path(cpu_adam):
    subclass = torch.ones(8, dtype=torch.uint8).as_subclass(Quantized)
    frozen, trains = torch.nn.Parameter(subclass, requires_grad=False), torch.nn.Parameter(torch.ones(8))
    optimizer = DeepSpeedCPUAdam([frozen, trains])
    trains.grad = torch.ones(8)
    optimizer.step()
    group, backend = optimizer.param_groups[0], optimizer._backends[torch.device("cpu")]
    settings = optimizer._step_settings(group, "")
    assert backend.prepare_group("", settings, group["params"], optimizer.state) is not None


@pytest.mark.parametrize("cls", CLASSES)
def test_params_that_share_memory_are_found_after_loading(cls):
    apart, source = trained(cls, [torch.zeros(60), torch.zeros(60)])
    base = torch.zeros(100)
    params = [torch.nn.Parameter(base[:60]), torch.nn.Parameter(base[40:])]
    optimizer = cls(params)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(ValueError, match="param group 0, param 0 and param group 0, param 1 share memory"):
            optimizer.step()
    assert not params[0].any()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", [
    {}, {"state_dtype": "8bit", "amsgrad": True}, {"state_dtype": torch.bfloat16}, {"master_weight_bits": 24},
    {"master_weight_bits": 32}, {"stochastic_rounding": True},
])  # fmt: skip
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"])
@pytest.mark.parametrize("kind", ["plain", "portable", "dequantized"])
def test_defaults_of_torch_do_not_count(cls, settings, default, kind):
    """Step counts are exact, and tensors lie where the params do, whatever new tensors are by default."""

    def run():
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float32,
                                               device="cpu").bfloat16())  # fmt: skip
        optimizer = cls([param], lr=1e-2, **settings)
        if kind == "portable":
            portable_state_dicts(optimizer)
        for i in range(3):
            param.grad = (param.detach().float() * (i + 1)).bfloat16()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        optimizer.state[param]["step"] = 257
        saved = optimizer.state_dict(dequantize=kind == "dequantized")
        other = cls([torch.nn.Parameter(param.detach().clone())], **settings)
        other.load_state_dict(copy.deepcopy(saved))
        other.load_fp32_params(optimizer.fp32_params())
        (state,) = other.state.values()
        assert state["step"] == 257 and float(saved["state"][0]["step"]) == 257
        return [*other.fp32_params(), *(state[key] for key in state if key != "step")]

    expected = run()
    if default == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(a.dtype == b.dtype and torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dequantize", [False, True])
def test_hooks_see_and_change_what_is_saved(cls, dequantize):
    (param,), optimizer = trained(cls, [torch.randn(SIZE)], state_dtype="8bit")
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(set(saved["state"][0])))
    optimizer.register_state_dict_post_hook(lambda _, saved: {"all of it": saved})
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: loaded["all of it"])
    saved = optimizer.state_dict(dequantize=dequantize)
    assert list(saved) == ["all of it"]
    averages = {"exp_avg", "exp_avg_sq"} if dequantize else {"quantized_exp_avg", "quantized_exp_avg_sq", SCALES}
    assert seen == [{"step"} | averages]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.state[param]["exp_avg"].dtype == torch.int8
    assert len(optimizer._optimizer_state_dict_post_hooks) == 2
    optimizer.register_state_dict_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.state_dict()
    assert len(optimizer._optimizer_state_dict_post_hooks) == 3


# Memory -------------------------------------------------------------------------------------------------------------

CONVERSIONS = {
    "float32 to 8bit": ({}, {"state_dtype": "8bit"}, "load"),
    "8bit to float32": ({"state_dtype": "8bit"}, {}, "load"),
    "8bit to bfloat16": ({"state_dtype": "8bit"}, {"state_dtype": torch.bfloat16}, "load"),
    "float32 to bfloat16": ({}, {"state_dtype": torch.bfloat16}, "load"),
    "float32 masters to 24 bits": ({"master_weights": True}, {"master_weight_bits": 24}, "load"),
    "32 bits to 24 bits": ({"master_weight_bits": 32}, {"master_weight_bits": 24}, "load"),
    "dequantize": ({"state_dtype": "8bit"}, None, lambda o: o.state_dict(dequantize=True)),
    "fp32_params": ({"master_weight_bits": 24}, None, lambda o: o.fp32_params()),
    "fp32_params without masters": ({}, None, lambda o: o.fp32_params()),
}


SCRIPT = """
    import json
    import torch
    from pathlib import Path
    from test_loading import CONVERSIONS
    from adamops import FusedAdam

    n = 12_000_000

    def made(settings):
        param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        return param, FusedAdam([param], **settings)

    def memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name)) / n

    def measured(source, target, call):
        param, optimizer = made(source)
        param.grad = torch.ones_like(param)
        optimizer.step()
        saved = optimizer.state_dict()
        other = made(target)[1] if target is not None else None
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        base = memory("VmRSS")
        kept = other.load_state_dict(saved) if call == "load" else call(optimizer)
        return memory("VmHWM") - base, memory("VmRSS") - base

    print(json.dumps({name: measured(*conversion) for name, conversion in CONVERSIONS.items()}))
"""


@pytest.fixture(scope="module")
def memory_of_conversions():
    """Of each in turn, in one process: its resident memory at the peak, and afterwards, in bytes a param."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_take_little_memory_besides_what_is_kept(memory_of_conversions, name):
    """What is computed on the way needs some 45 MB in all, however many params there are."""
    most, kept = memory_of_conversions[name]
    assert most - kept < 5, f"{most:.1f} bytes a param at the peak, {kept:.1f} kept"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("key", ["param_remainder", "step"])
def test_what_torch_cannot_read_is_refused_when_loaded(cls, key):
    param = torch.nn.Parameter(torch.randn(8).bfloat16())
    optimizer = cls([param], master_weight_bits=24)
    param.grad = torch.randn_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    value = torch.zeros(8 if key == "param_remainder" else (), dtype=torch.int32)
    value.untyped_storage().resize_(0)
    saved["state"][0][key] = value
    with pytest.raises(ValueError, match="param group 0.*freed or shortened"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("settings", [{}, {"master_weight_bits": 32}])
def test_params_with_data_of_inference_mode_load_all_or_none(cls, settings):
    params = [torch.nn.Parameter(torch.ones(8).bfloat16()) for _ in range(2)]
    with torch.inference_mode():
        params[1].data = torch.ones(8).bfloat16()
    optimizer = cls(params, **settings)
    with pytest.raises(ValueError, match="param 1 is a tensor of inference mode"):
        optimizer.load_fp32_params([torch.zeros(8)] * 2)
    assert torch.equal(params[0], torch.ones(8).bfloat16()) and not optimizer.state
    with torch.inference_mode():
        optimizer.load_fp32_params([torch.zeros(8)] * 2)
    assert not params[0].any() and not params[1].any()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scales", [None, 1.5, torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(17, 2)])
def test_states_whose_scales_are_lost_are_not_dequantized(cls, scales):
    param = torch.nn.Parameter(torch.randn(4353))
    optimizer = cls([param], state_dtype="8bit")
    param.grad = torch.randn_like(param)
    optimizer.step()
    if scales is None:
        del optimizer.state[param][SCALES]
    else:
        optimizer.state[param][SCALES] = scales
    with pytest.raises((TypeError, ValueError), match=SCALES):
        optimizer.state_dict(dequantize=True)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
def test_float_states_of_any_dtypes_are_loaded(cls, dtypes, state_dtype):
    values = [torch.rand(SIZE).to(dtype) for dtype in dtypes]
    state = {"step": torch.tensor(3.0), "exp_avg": values[0], "exp_avg_sq": values[1]}
    loaded = []
    for given in (state, {**state, "exp_avg": values[0].float(), "exp_avg_sq": values[1].float()}):
        given = copy.deepcopy(given)  # a tensor that fits is kept, and updated
        param = torch.nn.Parameter(torch.zeros(SIZE))
        optimizer = cls([param], state_dtype=state_dtype)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: given}})
        param.grad = torch.ones(SIZE)
        optimizer.step()
        loaded.append(param.detach())
    assert torch.equal(*loaded)


@pytest.mark.smoke
@pytest.mark.parametrize("entry", [None, [1, 2], "state"])
def test_a_state_that_is_no_dict_is_refused(entry):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = DeepSpeedCPUAdam([param])
    with pytest.raises(TypeError, match=r"param group 0, param 0 has a \w+ as its state; expected a dict"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
    param.grad = torch.ones(3)
    optimizer.state[param] = entry
    with pytest.raises(TypeError, match=r"param 0 has a \w+ as its state; expected a dict"):
        optimizer.step()


def test_an_interrupted_load_does_not_affect_later_ones(monkeypatch):
    _, optimizer = trained(DeepSpeedCPUAdam, [torch.randn(SIZE)])
    saved = copy.deepcopy(optimizer.state_dict())
    register = optimizer.register_load_state_dict_pre_hook

    def interrupted(hook, prepend=False):
        handle = register(hook, prepend)
        monkeypatch.undo()
        raise KeyboardInterrupt(handle)

    monkeypatch.setattr(optimizer, "register_load_state_dict_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)


def test_state_dicts_asked_for_during_another_are_their_own():
    """As by a signal handler that saves a checkpoint, or by another thread."""
    params, optimizer = trained(FusedAdam, [torch.randn(SIZE).bfloat16()], state_dtype="8bit", master_weight_bits=24)
    inner = []
    optimizer.register_state_dict_pre_hook(lambda o: inner or inner.append(0) or inner.append(o.state_dict()))
    optimizer.register_state_dict_post_hook(lambda o, saved: None)
    outer = optimizer.state_dict(dequantize=True)
    assert outer["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert {"param_remainder", "block_scales"} <= inner[1]["state"][0].keys()
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, saved: seen.append((o is optimizer, saved["state"][0].keys())))
    assert optimizer.state_dict(dequantize=True)["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert seen == [(True, {"step", "exp_avg", "exp_avg_sq"})]  # hooks see what is saved

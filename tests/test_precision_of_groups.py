"""Settings of precision in param groups: each group has its own states, masters and rounding."""

import copy
import pickle

import pytest
import torch

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.optim.backends.torch import TorchBackend

CLASSES = [DeepSpeedCPUAdam, FusedAdam]
SIZE = 5000


def new_params(count, dtype=torch.bfloat16):
    return [torch.nn.Parameter(torch.randn(SIZE).to(dtype)) for _ in range(count)]


def twins(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def same_bits(a, b):
    return torch.equal(a.view(torch.int16) if a.itemsize == 2 else a, b.view(torch.int16) if b.itemsize == 2 else b)


SETTINGS = [
    ({"state_dtype": "8bit"}, {"state_dtype": torch.float32}),
    ({"state_dtype": torch.float32}, {"state_dtype": "8bit"}),
    ({}, {"state_dtype": torch.bfloat16}),
    ({}, {"fp32_optimizer_states": False}),
    ({"state_dtype": "8bit"}, {"fp32_optimizer_states": False}),
    ({}, {"master_weight_bits": 24}),
    ({"master_weight_bits": 32}, {"master_weight_bits": None}),
    ({"master_weight_bits": 24, "state_dtype": "8bit"}, {"master_weights": True, "state_dtype": torch.float32}),
    ({"master_weight_bits": 32}, {"master_weight_bits": 24, "stochastic_rounding": False}),
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("whole", "own"), SETTINGS)
@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
def test_a_group_is_updated_as_by_an_optimizer_with_its_settings(cls, whole, own, later):
    params = new_params(2)
    alone = twins(params)
    optimizer = cls([params[0]] if later else [{"params": [params[0]]}, {"params": [params[1]], **own}], **whole)
    if later:
        optimizer.add_param_group({"params": [params[1]], **own})
    masters = {"master_weight_bits", "master_weights"}
    inherited = {k: v for k, v in whole.items() if not (k in masters and masters & own.keys()) and k not in own}
    if "fp32_optimizer_states" in own:
        inherited.pop("state_dtype", None)
    taker = FusedAdam if "master_weights" in own else DeepSpeedCPUAdam  # the bits of both are the same
    apart = [cls([alone[0]], **whole), taker([alone[1]], **{**inherited, **own})]
    for i in range(3):
        step(optimizer, params, i)
        generator = torch.Generator().manual_seed(i)
        for single, param in zip(apart, alone, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            single.step()
    for param, single, other in zip(params, apart, alone, strict=True):
        assert same_bits(param.detach(), other.detach())
        assert optimizer.state[param].keys() == single.state[other].keys()
        for key, value in single.state[other].items():
            assert torch.equal(torch.as_tensor(optimizer.state[param][key]), torch.as_tensor(value)), key
    for ours, theirs in zip(optimizer.fp32_params(), [s.fp32_params()[0] for s in apart], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_stochastic_rounding_of_one_group_counts_there_only(cls):
    params = [torch.nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = cls([{"params": [params[0]]}, {"params": [params[1]], "stochastic_rounding": True}], lr=1e-4)
    assert "stochastic_rounding_seed" not in optimizer.param_groups[0]
    for _ in range(100):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert (params[0] == 1).all()  # updates smaller than half of the last place are lost
    assert params[1].float().mean().item() == pytest.approx(0.99, abs=0.001)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_precision_of_each_group(cls, copied):
    params = new_params(2)
    optimizer = cls([{"params": [params[0]], "state_dtype": "8bit"}, {"params": [params[1]]}], master_weight_bits=24)
    step(optimizer, params, 0)
    twin = copied(optimizer)
    own = [param for group in twin.param_groups for param in group["params"]]
    step(optimizer, params, 1)
    step(twin, own, 1)
    for a, b in zip(params, own, strict=True):
        assert same_bits(a.detach(), b.detach())
        assert optimizer.state[a]["exp_avg"].dtype == twin.state[b]["exp_avg"].dtype


@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoints_leave_each_group_its_precision(cls, tmp_path):
    """As of the optimizer's own settings; the checkpoint's states are converted."""

    def grouped(params, first, second):
        return cls([{"params": [params[0]], **first}, {"params": [params[1]], **second}])

    params = new_params(2, torch.float32)
    saved = grouped(params, {"state_dtype": "8bit"}, {})
    step(saved, params, 0)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    assert all("state_dtype" not in group for group in saved.state_dict()["param_groups"])
    other = twins(params)
    loaded = grouped(other, {}, {"state_dtype": "8bit"})
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [loaded.state[param]["exp_avg"].dtype for param in other] == [torch.float32, torch.int8]
    assert "state_dtype" not in loaded.param_groups[0] and loaded.param_groups[1]["state_dtype"] == "8bit"
    step(loaded, other, 1)
    assert [loaded.state[param]["step"] for param in other] == [2, 2]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("before", [{}, {"state_dtype": torch.float32}])
def test_a_change_in_the_middle_of_training_takes_effect_by_loading_only(cls, before):
    params = new_params(2, torch.float32)
    optimizer = cls([{"params": [params[0]]}, {"params": [params[1]], **before}])
    step(optimizer, params, 0)
    optimizer.param_groups[1]["state_dtype"] = "8bit"
    values = twins(params)
    with pytest.raises(ValueError, match="precision of param group 1 was set to .*8bit.*load_state_dict"):
        step(optimizer, params, 1)
    assert all(map(torch.equal, params, values)) and optimizer.state[params[0]]["step"] == 1
    del optimizer.param_groups[1]["state_dtype"]
    if before:
        with pytest.raises(ValueError, match="precision of param group 1"):
            step(optimizer, params, 1)
    optimizer.param_groups[1]["state_dtype"] = "8bit"
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, params, 1)
    assert [optimizer.state[param]["exp_avg"].dtype for param in params] == [torch.float32, torch.int8]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("whole", "own", "error", "message"),
    [
        ({}, {"state_dtype": "4bit"}, ValueError, "param group 1: Invalid state_dtype: 4bit; expected torch.float32"),
        ({}, {"master_weight_bits": 16}, ValueError, "param group 1: Invalid master_weight_bits: 16; expected None"),
        ({}, {"stochastic_rounding": "yes"}, TypeError, "param group 1: Invalid stochastic_rounding: 'yes'"),
        ({}, {"master_weights": True, "state_dtype": "8bit"}, ValueError, "goes with float32 states, not 8bit"),
        ({"state_dtype": "8bit"}, {"master_weights": True}, ValueError, "goes with float32 states, not 8bit"),
        ({"stochastic_rounding": True}, {"master_weight_bits": 32}, ValueError, "wider ones lose nothing"),
        ({}, {"state_dtype": "8bit", "fp32_optimizer_states": False}, ValueError, "give one of them"),
        ({}, {"master_weights": True, "master_weight_bits": 24}, ValueError, "give one of them"),
        ({}, {"master_weights": True, "fp32_optimizer_states": False}, ValueError, "those of the params' dtype"),
    ],
)
def test_settings_that_cannot_be(cls, whole, own, error, message):
    a, b = new_params(2)
    with pytest.raises(error, match=message):
        cls([{"params": [a]}, {"params": [b], **own}], **whole)
    optimizer = cls([a], **whole)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [b], **own})
    assert len(optimizer.param_groups) == 1


def test_the_torch_calls_keep_to_the_settings_of_groups():
    params = new_params(2)
    optimizer = DeepSpeedCPUAdam([{"params": [params[0]]}, {"params": [params[1]], "state_dtype": "8bit"}])
    optimizer._backends = {torch.device("cpu"): TorchBackend()}
    step(optimizer, params, 0)
    assert [optimizer.state[param]["exp_avg"].dtype for param in params] == [torch.float32, torch.int8]

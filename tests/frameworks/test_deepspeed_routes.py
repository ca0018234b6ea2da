"""The table of docs/frameworks/deepspeed.md: which class DeepSpeed's engine holds and which op steps, for each stage of
ZeRO and each way to ask for it; and where master weights of adamops take effect."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from frameworks.deepspeed_routes import (
    FLOAT32_MASTERS,
    MASTERS,
    STAGES,
    WAYS,
    clients_with_16_bit_masters,
    loaded_universal,
    what_ran,
    where_masters_are_float32,
    with_16_bit_masters,
    without_zero,
)
from frameworks.deepspeed_training import config
from frameworks.processes import run_on_ranks

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]

NAMES = {(stage, offload): f"zero{stage}{'-offload' * offload}" for stage, offload in STAGES}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def ran(request):
    (found,) = run_on_ranks(what_ran, 1, request.param)
    return found


@pytest.mark.parametrize("stage", STAGES, ids=NAMES.get)
@pytest.mark.parametrize(("way", "keys"), WAYS, ids=lambda each: each or "no keys")
def test_what_ran(ran, stage, way, keys):
    found = ran[(*stage, way, keys)]
    package = "deepspeed" if (way, keys) == ("config", "") else "adamops"
    assert found["class"] == f"{package}.{'DeepSpeedCPUAdam' if stage[1] else 'FusedAdam'}"
    for files in found["ops"]:  # in each of the steps
        (file,) = map(Path, files)
        assert file.parent.parts[-2:] == ("adamops", "_native") and file.name.startswith("cpu_adam.")
    assert (("exp_avg", torch.int8) in found["states"]) is (keys == "8bit")
    assert any(key == "max_exp_avg_sq" for key, _ in found["states"]) is (keys == "amsgrad")


@pytest.mark.parametrize("stage", STAGES, ids=NAMES.get)
@pytest.mark.parametrize("keys", ["8bit", "amsgrad"])
def test_a_key_in_the_config_is_the_same_as_a_client_optimizer(ran, stage, keys):
    losses = ran[(*stage, "config", keys)]["losses"]
    assert losses == ran[(*stage, "client", keys)]["losses"]
    assert losses != ran[(*stage, "config", "")]["losses"] and losses[-1] < losses[0]


# Master weights ----------------------------------------------------------------------------------------------------


def assert_same_bits(found, expected):
    (param, state), (other, others_state) = found, expected
    assert torch.equal(param, other) and state.keys() == others_state.keys()
    for key, tensor in state.items():
        assert tensor.dtype == others_state[key].dtype and torch.equal(tensor, others_state[key]), key


REMAINDERS = [
    ({"master_weight_bits": 32}, torch.float32, torch.int16),
    ({"master_weight_bits": 24, "state_dtype": "8bit"}, torch.int8, torch.int8),
    ({"master_weight_bits": 24, "bf16 states": True}, torch.bfloat16, torch.int8),
    ({"stochastic_rounding": True, "stochastic_rounding_seed": 5, "bf16 states": True}, torch.bfloat16, None),
]


@pytest.mark.parametrize("stage", STAGES[1:], ids=NAMES.get)
@pytest.mark.parametrize(
    ("world_size", "params", "state", "remainder"),
    [*((1, *case) for case in REMAINDERS), (2, *REMAINDERS[1])],
    ids=["32", "24, 8-bit states", "24, bfloat16 states", "stochastic rounding", "24, 8-bit states, 2 ranks"],
)
def test_bfloat16_masters_of_deepspeed_get_our_remainders(tmp_path, stage, world_size, params, state, remainder):
    """With "bf16_master_weights_and_grads"."""
    for found in run_on_ranks(with_16_bit_masters, world_size, *stage, params, str(tmp_path)):
        assert found["class"] == ("DeepSpeedCPUAdam" if stage[1] else "FusedAdam")
        param, tensors = found["engine"]
        assert param.dtype == torch.bfloat16 and tensors["exp_avg"].dtype == state
        if remainder:
            assert tensors["param_remainder"].dtype == remainder and tensors["param_remainder"].any()
        assert_same_bits(found["engine"], found["plain"])
        assert_same_bits(found["engine"], found["resumed"])
        assert found["losses"][0] == found["losses"][1]


@pytest.mark.parametrize("params", [{"master_weight_bits": 32}, {"master_weight_bits": 24, "state_dtype": "8bit"}])
def test_without_zero_a_bfloat16_model_gets_them(params):
    (found,) = run_on_ranks(without_zero, 1, params)
    for by_engine, plain in found:
        assert by_engine[0].dtype == torch.bfloat16 and by_engine[1]["param_remainder"].any()
        assert_same_bits(by_engine, plain)


def test_where_deepspeed_has_float32_masters_they_are_refused():
    """A client optimizer shows that they would have no effect: it steps float32 params, without remainders."""
    (found,) = run_on_ranks(where_masters_are_float32, 1)
    assert found.keys() == FLOAT32_MASTERS.keys()
    for name, (said, dtypes, states) in found.items():
        assert "'master_weight_bits', for 16-bit params, which get DeepSpeed's own float32" in said, name
        assert dtypes == {torch.float32} and "param_remainder" not in states and "exp_avg" in states, name


def test_client_optimizers_get_bfloat16_masters_too_but_float32_states_are_refused_where_bfloat16_is_asked_for():
    (found,) = run_on_ranks(clients_with_16_bit_masters, 1)
    for said, _ in found[:2]:
        assert '"bf16_optimizer_states" asks for bfloat16 states, and the optimizer has float32' in said
    ((said, states),) = found[2:]
    assert said == "" and "param_remainder" in states


# Universal checkpoints ---------------------------------------------------------------------------------------------

ENGINES = [(1, ""), (1, "fp32 grads"), (2, ""), (3, "")]
engines = pytest.mark.parametrize(("stage", "kind"), ENGINES, ids=["zero1", "bf16_optimizer", "zero2", "zero3"])


@engines
def test_universal_checkpoints_are_not_loaded_with_amsgrad(tmp_path, stage, kind):
    """Saved with amsgrad, they can be loaded without."""
    settings = config(stage, False, "bf16") | ({"data_types": {"grad_accum_dtype": "fp32"}} if kind else {})
    (found,) = run_on_ranks(loaded_universal, 1, settings, {"amsgrad": True}, str(tmp_path))
    assert "do not hold max_exp_avg_sq, so they cannot be loaded with amsgrad=True" in found["said"]
    assert torch.equal(found["loaded"], found["saved"])


PADDING = 32 * 301 // 2 + 301 // 2  # between params, in the second rank's partition of ZeRO-3; DeepSpeed never sets it


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [*((stage, 1) for stage in STAGES[1:]), ((2, False), 2), ((3, False), 2)],
    ids=lambda each: NAMES.get(each, f"{each} ranks"),
)
def test_universal_checkpoints_have_whole_masters_but_are_not_loaded_into_split_ones(tmp_path, stage, world_size):
    settings = config(*stage, "bf16") | {"bf16": MASTERS}
    ranks = run_on_ranks(loaded_universal, world_size, settings, {"master_weight_bits": 32}, str(tmp_path))
    for rank, found in enumerate(ranks):
        assert "do not hold remainders, so they cannot be loaded with master_weight_bits" in found["said"]
        saved, loaded = found["saved"], found["loaded"]
        if stage[0] == 3 and rank == 1:
            saved[PADDING] = loaded[PADDING]
        assert loaded.dtype == torch.float32 and torch.equal(loaded, saved)
        assert not torch.equal(saved, saved.bfloat16().float())

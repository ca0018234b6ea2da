"""What DeepSpeed does with states by their names: 8-bit ones are read, set, moved and converted as what they mean."""

import pytest
import torch

pytest.importorskip("deepspeed")

from frameworks.deepspeed_states import (
    CLASSES,
    convert,
    elastic_checkpoint,
    moved_states,
    resume_converted,
    save_for_conversion,
    states_read_and_set,
)
from frameworks.processes import run_on_ranks

from adamops import DeepSpeedCPUAdam
from adamops._deepspeed_states import read_piece, write_piece
from adamops.ops.adam.adam import AdamRule

pytestmark = [pytest.mark.frameworks]

QUANTIZED = {torch.int8, torch.uint8}
ENGINES = [(1, ""), (1, "fp32 grads"), (2, ""), (3, "")]
engines = pytest.mark.parametrize(("stage", "kind"), ENGINES, ids=["zero1", "bf16_optimizer", "zero2", "zero3"])
classes = pytest.mark.parametrize("cls", CLASSES)


# A piece of a state ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["", "amsgrad"])
def state(request):
    """The 8-bit state of a flat param of 20 blocks and a piece."""
    param = torch.nn.Parameter(torch.zeros(5203))
    optimizer = DeepSpeedCPUAdam([param], state_dtype="8bit", amsgrad=request.param)
    for _ in range(3):
        param.grad = torch.randn(5203)
        optimizer.step()
    whole = optimizer.state_dict(dequantize=True)["state"][0]
    return optimizer.state[param], {key: whole[key] for key in ("exp_avg", "exp_avg_sq")}


PIECES = [(0, 5203), (0, 1), (255, 2), (256, 256), (300, 700), (5202, 1), (5120, 83), (17, 0), (5203, 0)]


@pytest.mark.parametrize(("start", "numel"), PIECES)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_piece_is_read_as_the_whole_is(state, key, start, numel):
    quantized, whole = state
    piece = read_piece(quantized, AdamRule.states, key, start, numel)
    assert piece.dtype == torch.float32 and torch.equal(piece, whole[key][start : start + numel])


@pytest.mark.parametrize(("start", "numel"), PIECES)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_piece_is_written_and_nothing_beside_it(state, key, start, numel):
    quantized, whole = state
    values = whole[key][start : start + numel].flip(0)  # of one block's magnitude, so its scale stays
    before = {name: tensor.clone() for name, tensor in quantized.items() if isinstance(tensor, torch.Tensor)}
    write_piece(quantized, AdamRule.states, key, start, values)
    written = read_piece(quantized, AdamRule.states, key, start, numel)
    torch.testing.assert_close(written, values, rtol=0.05, atol=float(whole[key].abs().max()) * 2e-3)
    for name in before:
        if name not in (key, "block_scales"):
            assert torch.equal(quantized[name], before[name]), name
    first, last = start // 256 * 256, -(-(start + numel) // 256) * 256
    outside = torch.ones(5203, dtype=torch.bool)
    outside[first:last] = numel == 0
    assert torch.equal(quantized[key][outside], before[key][outside])


def test_what_is_read_can_be_written_back(state):
    quantized, _ = state
    before = {name: tensor.clone() for name, tensor in quantized.items() if isinstance(tensor, torch.Tensor)}
    for key in ("exp_avg", "exp_avg_sq"):
        write_piece(quantized, AdamRule.states, key, 100, read_piece(quantized, AdamRule.states, key, 100, 3000))
    for name, tensor in before.items():
        assert torch.equal(quantized[name], tensor), name


# Under an engine ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@engines
@classes
def test_deepspeeds_helpers_read_and_set_numbers(world_size, stage, kind, cls):
    for found in run_on_ranks(states_read_and_set, world_size, stage, cls, kind):
        assert found["dtypes"] == QUANTIZED
        for place, expected in found["float32"].items():
            assert found["8-bit"][place].dtype == torch.float32
            scale = float(expected.abs().max())
            torch.testing.assert_close(found["8-bit"][place], expected, rtol=0.1, atol=0.05 * scale)
        set_to = found["set to"]
        near = 0.02 * float(set_to.abs().max())
        torch.testing.assert_close(found["after"]["2.weight", "exp_avg"], set_to, rtol=0.05, atol=near)
        for place, before in found["8-bit"].items():
            if place != ("2.weight", "exp_avg"):
                scale = float(before.abs().max())  # a block that two params share may get another scale
                torch.testing.assert_close(found["after"][place], before, rtol=0.05, atol=0.02 * scale)
        if "local" in found:
            before, after = found["local"]
            torch.testing.assert_close(after, 4 * before, rtol=0.05, atol=0.02 * float(after.max()))
        assert sum(found["losses after"][-3:]) < 0.5 * sum(found["losses before"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "cls"),
    [(1, 1, "FusedAdam"), *((*ranks, "DeepSpeedCPUAdam") for ranks in [(1, 1), (2, 2), (2, 1), (1, 2)])],
)
@engines
def test_converted_checkpoints_continue(tmp_path, before, after, cls, stage, kind):
    unbroken = run_on_ranks(save_for_conversion, before, stage, cls, kind, str(tmp_path))
    converted = convert(tmp_path, "-m", "adamops.deepspeed")
    assert converted.returncode == 0, converted.stderr
    for rank, found in enumerate(run_on_ranks(resume_converted, after, stage, cls, kind, str(tmp_path))):
        norms = [norm for *_, norm in found.values()]
        cut = 1e-3 if before == after else 1e-2  # other ranks cut quantization blocks elsewhere, with other scales
        assert norms[1:] == pytest.approx(norms[:1] * 2, rel=cut) and norms[0] < 1
        for name, (dtypes, losses, _) in found.items():
            assert dtypes == (QUANTIZED if "8-bit" in name else {torch.float32})
            if before != after:  # then steps take other data, and a rank that is new has data never seen before
                assert losses == pytest.approx(found["float32"][1], rel=0.05), name
                assert losses[0] < 0.9 or rank >= before, name
            elif name == "8-bit" and before == 1:
                assert losses == unbroken[rank], "the same codes, cut as they were"
            else:
                assert losses == pytest.approx(unbroken[rank], rel=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_converter_alone_does_not_take_8_bit_states_for_numbers(tmp_path, stage):
    run_on_ranks(save_for_conversion, 1, stage, "DeepSpeedCPUAdam", "", str(tmp_path))
    converted = convert(tmp_path)
    # It misses the averages by their names, or before that fails to cut padding off the scales, which have two columns.
    assert converted.returncode != 0
    assert "'exp_avg'" in converted.stderr or "exceeds dimension size" in converted.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@classes
def test_states_can_be_moved(tmp_path, stage, cls):
    (found,) = run_on_ranks(moved_states, 1, stage, cls, str(tmp_path))
    for (unmoved, moved, resumed, dtypes), expected in zip(found, [{torch.float32}, QUANTIZED], strict=True):
        assert moved == unmoved and resumed == unmoved[6:]
        assert dtypes == expected


@pytest.mark.slow
@classes
@pytest.mark.parametrize("state_dtype", ["8bit", torch.float32])
def test_elastic_checkpoints_are_refused(tmp_path, cls, state_dtype):
    (message,) = run_on_ranks(elastic_checkpoint, 1, cls, state_dtype, str(tmp_path))
    assert '"elastic_checkpoint"' in message and "ds_to_universal" in message

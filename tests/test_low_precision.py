"""8-bit states, split master weights, rounding at random: the bits of their definitions, and what they are good for."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamops import DeepSpeedCPUAdam, FusedAdam, op_builder, portable_state_dicts
from adamops.ops.adam.adam import AdamRule
from adamops.optim.backends.torch import TorchBackend
from adamops.optim.state import quantization, remainders
from adamops.optim.state.precision import SCALES
from adamops.optim.state.quantized_states import dequantized_states, quantized_states

TARGETS = op_builder.get("cpu_adam").load().supported_targets()
HALVES = [torch.bfloat16, torch.float16]
STATES = AdamRule.states
FORMATS = {state.name: quantization.format_of(state) for state in STATES}


def bits(x):
    """As integers, with one and the same NaN."""
    if not x.is_floating_point():
        return x
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.itemsize]
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(integers)


def assert_same(ours, theirs, what):
    wrong = (bits(ours) != bits(theirs)).flatten().nonzero().flatten()[:5].tolist()
    assert not wrong, f"{what} differs at {wrong}: {ours.flatten()[wrong]} and {theirs.flatten()[wrong]}"


def wide_range(size):
    """Grads over many decades, as sparse layers have them; zeros and subnormals among them."""
    x = torch.randn(size) * 10.0 ** (torch.rand(size) * 8 - 7)
    special = torch.tensor([0.0, -0.0, 1e-40, 1e-30, -1e-20, 1e4])
    return torch.where(torch.rand(size) < 0.1, special[torch.randint(len(special), (size,))], x)


def trained(params, steps, seed, **arguments):
    """Params, as copies, after steps under grads that depend on the seed only; and the optimizer."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = DeepSpeedCPUAdam(params, lr=1e-2, weight_decay=0.01, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer


# Quantized states


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("size", [4096, 5000, 70_001])
def test_codes_are_those_of_the_definition(cpu_adam, target, amsgrad, size, seed):
    """A step on codes is a step on the floats that they stand for, quantized again."""
    cpu_adam.use_target(target)
    coded, plain = (torch.nn.Parameter(torch.randn(size)) for _ in range(2))
    plain.data.copy_(coded.data)
    ours = DeepSpeedCPUAdam([coded], amsgrad=amsgrad, state_dtype="8bit")
    floats = DeepSpeedCPUAdam([plain], amsgrad=amsgrad)
    for step in range(1, 6):
        coded.grad = wide_range(size)
        plain.grad = coded.grad.clone()
        if step > 1:
            floats.state[plain] = {"step": step - 1, **dequantized_states(ours.state[coded], STATES)}
        ours.step()
        floats.step()
        assert_same(coded.detach(), plain.detach(), "param")
        state = {name: value for name, value in floats.state[plain].items() if name != "step"}
        for name, expected in quantized_states(state, STATES, step).items():
            assert_same(ours.state[coded][name], expected, f"{name} at step {step}")


def near_the_largest_float(size):
    """Numbers of either sign from 0.98 of the largest float, 3.4e38, to itself."""
    factors = 1 - 0.02 * torch.rand(size) * (torch.rand(size) < 0.9)
    return torch.finfo(torch.float32).max * factors * torch.randn(size).sign()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("noise", [0, 0x8000, 0xFFFF])
def test_no_magnitude_is_beyond_the_top_code(name, noise, seed):
    code = FORMATS[name]
    values = near_the_largest_float(4096)
    values = values if code is quantization.SIGNED else values.abs()
    codes, scales = quantization.quantize(values, code, noise)
    assert codes.int().abs().max() <= code.top
    dequantized = quantization.dequantize(codes, scales, code)
    assert ((dequantized / values - 1).abs() < 0.05).all()
    for again, first in zip(quantization.requantize(dequantized, code), (codes, scales), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("target", TARGETS)
def test_squares_beyond_the_largest_scale(cpu_adam, target, seed):
    """They must not be taken for small ones, or the next step would divide by little but eps."""
    cpu_adam.use_target(target)
    param = torch.nn.Parameter(torch.zeros(5000))
    optimizer = DeepSpeedCPUAdam([param], betas=(0.5, 0.0), amsgrad=True, state_dtype="8bit")
    for step in range(1, 6):
        param.grad = near_the_largest_float(5000).abs().sqrt().clamp(max=1.8446743e19)  # whose square is finite
        optimizer.step()
        expected, _ = quantization.quantize(
            param.grad**2, quantization.UNSIGNED, quantization.noise_of(torch.arange(5000), step, quantization.UNSIGNED)
        )
        assert_same(optimizer.state[param]["exp_avg_sq"], expected, f"exp_avg_sq at step {step}")
        assert optimizer.state[param]["max_exp_avg_sq"].min() > 240
        assert param.isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_inverses_of_scales_are_rounded_once(name):
    code = FORMATS[name]
    scales = torch.arange(quantization._LEAST_SCALE, quantization._MOST_SCALE, dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(
        quantization._inverse(scales, code), (torch.full((1,), code.top_expanded).double() / scales.double()).float()
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_codes_do_not_depend_on_threads_or_targets(data):
    module = op_builder.get("cpu_adam").load()
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    sizes = data.draw(st.lists(st.integers(4096, 40_000), min_size=1, max_size=4), "sizes")
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES]), "dtype")
    bits_of_master = data.draw(st.sampled_from([None, 24, 32]), "master_weight_bits")
    random = bits_of_master != 32 and data.draw(st.booleans(), "stochastic_rounding")
    params = [torch.randn(size).to(dtype) for size in sizes]
    results = []
    threads, target = torch.get_num_threads(), module.target()
    try:
        for count, simd in ((1, TARGETS[0]), (data.draw(st.integers(2, 8)), data.draw(st.sampled_from(TARGETS)))):
            torch.manual_seed(1)
            torch.set_num_threads(count)
            module.use_target(simd)
            arguments = {"master_weight_bits": bits_of_master, "stochastic_rounding": random}
            results.append(trained(params, 3, 5, state_dtype="8bit", **arguments))
    finally:
        torch.set_num_threads(threads)
        module.use_target(target)
    (first, a), (second, b) = results
    for x, y in zip(first, second, strict=True):
        assert_same(x, y, "param")
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        for name in x.keys() - {"step"}:
            assert_same(x[name], y[name], name)


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_error(name, seed):
    """The bound that docs/low-precision.md states, for magnitudes of a block relative to its largest."""
    code = FORMATS[name]
    values = torch.rand(256 * 400) ** 6
    if code is quantization.SIGNED:
        values *= torch.randn(len(values)).sign()
    dequantized = quantization.dequantize(*quantization.quantize(values, code), code)
    largest = values.abs().view(-1, 256).amax(1).repeat_interleave(256)
    relative = values.abs() / largest
    error = (dequantized - values).abs() / largest
    # Half a step of a root with 127 or 255 levels, that of the scale included; a piecewise linear root is 6 % off.
    bound = 1.45 / 127 * relative.sqrt() + 1e-4 if code is quantization.SIGNED else 3.4 / 255 * relative**0.75 + 1e-9
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_makes_up_for_itself(name, seed):
    """Over the steps the mean of what is stored is what was to be stored: an average can change by less than a code."""
    code = FORMATS[name]
    values = torch.rand(1024) + 0.01
    values[::256] = 1.05
    total = torch.zeros(1024, dtype=torch.float64)
    steps = 1000
    for step in range(steps):
        noise = quantization.noise_of(torch.arange(1024), step, code)
        total += quantization.dequantize(*quantization.quantize(values, code, noise), code)
    # Codes are not a linear scale, so the mean may lie a little above: the scale is convex between two codes.
    assert ((total / steps - values).abs() <= 2e-3 * values).all()


@pytest.mark.parametrize("target", TARGETS)
def test_worst_cases_of_blocks(cpu_adam, target, seed):
    cpu_adam.use_target(target)
    param = torch.nn.Parameter(torch.zeros(4096))
    optimizer = DeepSpeedCPUAdam([param], lr=1.0, betas=(0.0, 0.0), state_dtype="8bit", bias_correction=False)
    param.grad = torch.zeros(4096)
    param.grad[256:512] = 1e-6
    param.grad[300] = 1e4  # one huge value in a block
    param.grad[512:768] = 1e-20
    param.grad[768:1024] = 1e-42  # subnormal
    param.grad[1024:1280] = 1.0
    param.grad[1100], param.grad[1101], param.grad[1102] = torch.inf, -torch.inf, torch.nan
    optimizer.step()
    state = dequantized_states(optimizer.state[param], STATES)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    assert (m[:256] == 0).all() and (v[:256] == 0).all(), "a block of zeros"
    assert m[300] == pytest.approx(1e4, rel=0.02)
    assert (v[256:512] > 0).all(), "small squares beside a huge one must not become zero"
    assert m[512:768] == pytest.approx(torch.full((256,), 1e-20), rel=0.02)
    assert m.isnan().nonzero().flatten().tolist() == [1100, 1101, 1102]
    good = torch.ones(4096, dtype=torch.bool)
    good[1100:1103] = False
    assert param[good].isfinite().all() and m[good].isfinite().all() and v[good].isfinite().all()
    assert m[1024:1100] == pytest.approx(torch.ones(76), rel=0.02), "neighbours in the same block"
    before = param.detach().clone()
    param.grad = torch.ones(4096)
    optimizer.step()
    assert param.isnan().nonzero().flatten().tolist() == [1100, 1101, 1102], "NaN stays with its elements"
    assert not torch.equal(before[good], param[good])


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"master_weight_bits": 24}, {"master_weight_bits": 32}])
@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch reads no tensors for C++")
def test_quantized_states_take_the_fast_path(arguments, seed):
    """The table of a step is made in C++, as for float32 states."""
    params, optimizer = trained([torch.randn(5000).bfloat16()], 1, 1, state_dtype="8bit", **arguments)
    group = optimizer.param_groups[0]
    backend = optimizer._backends[torch.device("cpu")]
    assert backend.prepare_group("", optimizer._step_settings(group, ""), group["params"], optimizer.state) is not None


def test_small_params_keep_fp32_states(seed):
    params = [torch.nn.Parameter(torch.randn(n)) for n in (4095, 4096)]
    optimizer = DeepSpeedCPUAdam(params, state_dtype="8bit")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    small, large = (optimizer.state[p] for p in params)
    assert small["exp_avg"].dtype == torch.float32 and SCALES not in small
    assert large["exp_avg"].dtype == torch.int8 and large["exp_avg_sq"].dtype == torch.uint8
    assert large[SCALES].numel() * large[SCALES].itemsize == 4096 / 64  # bytes


@pytest.mark.parametrize("arguments", [{"state_dtype": "8bit"}, {"state_dtype": torch.bfloat16},
                                       {"fp32_optimizer_states": False}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_training_with_small_states_is_near_that_with_fp32_states(arguments, dtype, seed):
    params = [torch.randn(64, 128).to(dtype), torch.randn(10).to(dtype)]
    ours, _ = trained(params, 30, 3, **arguments)
    theirs, _ = trained(params, 30, 3)
    moved = (theirs[0].float() - params[0].float()).norm()
    assert (ours[0].float() - theirs[0].float()).norm() < 0.05 * moved


def test_strided_params_have_codes_in_the_order_of_memory(seed):
    start = torch.randn(80, 70)
    (plain,), a = trained([start.t().contiguous()], 0, 0, state_dtype="8bit")
    strided = torch.nn.Parameter(start.clone().t())
    plain = torch.nn.Parameter(start.clone())
    optimizers = [DeepSpeedCPUAdam([p], state_dtype="8bit") for p in (strided, plain)]
    for _ in range(3):
        plain.grad = torch.randn(80, 70)
        strided.grad = plain.grad.t()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(strided.detach().t(), plain.detach(), "param")


# Checkpoints


@pytest.mark.smoke
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("shape", [(5000,), (70, 61)])
def test_resumes_with_the_same_bits(tmp_path, amsgrad, shape, seed):
    arguments = {"state_dtype": "8bit", "master_weight_bits": 24, "stochastic_rounding": True, "amsgrad": amsgrad}
    start = [torch.randn(shape).bfloat16(), torch.randn(7).bfloat16()]
    params, optimizer = trained(start, 3, 1, **arguments)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = [torch.nn.Parameter(p.clone()) for p in params]
    resumed = DeepSpeedCPUAdam(again, **arguments)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        grads = [torch.randn(p.shape).bfloat16() for p in params]
        for own, chosen in ((optimizer.param_groups[0]["params"], optimizer), (again, resumed)):
            for param, grad in zip(own, grads, strict=True):
                param.grad = grad.clone()
            chosen.step()
    for x, y in zip(optimizer.param_groups[0]["params"], again, strict=True):
        assert_same(x.detach(), y.detach(), "param")


def test_states_of_every_kind_load_into_every_other(seed):
    kinds = [{"state_dtype": kind} for kind in ("8bit", torch.float32, torch.bfloat16)]
    _, reference = trained([torch.randn(5000)], 3, 1)
    (expected,) = reference.state.values()
    for first in kinds:
        _, source = trained([torch.randn(5000)], 0, 1, **first)
        source.load_state_dict(reference.state_dict())
        for second in kinds:
            _, other = trained([torch.randn(5000)], 0, 1, **second)
            other.load_state_dict(source.state_dict())
            (loaded,) = other.state_dict(dequantize=True)["state"].values()
            assert loaded["exp_avg"].dtype == torch.float32 and loaded["step"] == 3
            for name in ("exp_avg", "exp_avg_sq"):
                assert (loaded[name] - expected[name]).norm() < 0.03 * expected[name].norm()


def test_dequantized_states_load_into_torch(seed):
    arguments = {"state_dtype": "8bit", "master_weight_bits": 24}
    params, optimizer = trained([torch.randn(70, 61).bfloat16()], 3, 1, **arguments)
    plain = [torch.nn.Parameter(p.float()) for p in optimizer.fp32_params()]
    theirs = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.01)
    theirs.load_state_dict({**theirs.state_dict(), "state": optimizer.state_dict(dequantize=True)["state"]})
    grad = torch.randn(70, 61).bfloat16()
    optimizer.param_groups[0]["params"][0].grad, plain[0].grad = grad, grad.float()
    optimizer.step()
    theirs.step()
    assert (optimizer.fp32_params()[0] - plain[0]).abs().max() < 1e-4


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("steps", [1, 30])
def test_dequantized_states_load_into_the_same_codes(seed, amsgrad, steps):
    """Saved without codes, training goes on to the same bits."""
    param = torch.nn.Parameter(torch.randn(70_001))
    optimizer = DeepSpeedCPUAdam([param], state_dtype="8bit", amsgrad=amsgrad)
    sparse = torch.rand(70_001) < 0.3  # elements, and with them blocks at the end, whose grads are zero
    sparse[60_000:] = True
    for _ in range(steps):
        param.grad = wide_range(70_001).masked_fill(sparse, 0.0)
        optimizer.step()
    other = DeepSpeedCPUAdam([torch.nn.Parameter(param.detach().clone())], state_dtype="8bit", amsgrad=amsgrad)
    other.load_state_dict({**optimizer.state_dict(), "state": optimizer.state_dict(dequantize=True)["state"]})
    (state,), (loaded,) = optimizer.state.values(), other.state.values()
    for name in state.keys() - {"step"}:
        assert_same(loaded[name], state[name], name)


@pytest.mark.parametrize("bits_after", [24, 32])
@pytest.mark.parametrize("bits_before", [24, 32])
@pytest.mark.parametrize("dtype", HALVES)
def test_portable_states_load_as_those_of_the_optimizer(seed, dtype, bits_before, bits_after):
    (param,), optimizer = trained([torch.randn(5000, dtype=dtype)], 3, seed, master_weight_bits=bits_before)
    states = [copy.deepcopy(optimizer.state_dict())]
    portable_state_dicts(optimizer)
    states.append(optimizer.state_dict())
    assert states[1]["state"][0]["param_remainder"].dtype == torch.int32  # what gloo and NCCL can send
    assert states[1]["state"][0]["step"].dtype == torch.float32
    loaded = []
    for state in states:
        other = DeepSpeedCPUAdam([torch.nn.Parameter(param.clone())], master_weight_bits=bits_after)
        other.load_state_dict(state)
        loaded += other.state.values()
    for name in loaded[0].keys() - {"step"}:
        assert_same(loaded[1][name], loaded[0][name], name)
    assert loaded[0]["step"] == loaded[1]["step"] == 3


def test_a_shard_cut_anywhere_loads_from_dequantized_states(seed):
    start = torch.randn(30_000)
    (whole,), optimizer = trained([start], 3, 1, state_dtype="8bit")
    (state,) = optimizer.state_dict(dequantize=True)["state"].values()
    begin, end = 777, 23_456
    shard = torch.nn.Parameter(whole[begin:end].clone())
    part = DeepSpeedCPUAdam([shard], lr=1e-2, weight_decay=0.01, state_dtype="8bit")
    cut = {name: value[begin:end] if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    part.load_state_dict({**part.state_dict(), "state": {0: cut}})
    (whole,) = optimizer.param_groups[0]["params"]
    whole.grad = torch.randn(30_000)
    shard.grad = whole.grad[begin:end].clone()
    before = whole.detach().clone()
    optimizer.step()
    part.step()
    moved = (whole.detach() - before)[begin:end]
    assert (shard.detach() - whole.detach()[begin:end]).norm() < 0.03 * moved.norm()


# Masters


@pytest.mark.smoke
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("arguments", [{}, {"state_dtype": "8bit"}, {"amsgrad": True, "adamw_mode": False}])
def test_masters_of_32_bits_are_fp32_training(cpu_adam, target, arguments, seed):
    cpu_adam.use_target(target)
    start = torch.randn(3000).bfloat16(), torch.randn(40, 130).bfloat16()
    halves, ours = trained(start, 20, 7, master_weight_bits=32, **arguments)
    floats, _ = trained([p.float() for p in start], 20, 7, **arguments)
    for half, master, full in zip(halves, ours.fp32_params(), floats, strict=True):
        assert_same(master, full, "master")
        assert ((half.float() - full).abs() <= (torch.nextafter(half, half + 1).float() - half.float()).abs()).all()
        nearest = full.bfloat16()
        tie = (full.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(half[~tie], nearest[~tie])


@pytest.mark.parametrize("bits_of_master", [24, 32])
def test_masters_of_fp16_params(bits_of_master, seed):
    """Exact from 2^-17 on with 32 bits; otherwise within half a unit of the param's last place * 2^-8 or 2^-16."""
    start = torch.randn(6000).half()
    halves, ours = trained(start.split(6000), 20, 7, master_weight_bits=bits_of_master)
    floats, _ = trained([start.float()], 20, 7)
    (master,), (full,) = ours.fp32_params(), floats
    large = full.abs() >= 2.0**-17
    if bits_of_master == 32:
        assert_same(master[large], full[large], "master")
    assert (master - full).abs().max() < (2e-4 if bits_of_master == 24 else 1e-7)
    half = halves[0].float()
    ulp = (torch.nextafter(halves[0].abs(), torch.tensor(torch.inf).half()).float() - half.abs()).abs()
    assert ((half - master).abs() <= ulp / 2).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rest", [torch.int8, torch.int16])
def test_parts_of_masters_are_those_of_the_definition(cpu_adam, dtype, rest, seed):
    """With lr 0 and no decay, a step splits what was joined; zero states and lr show what the op makes of a master."""
    masters = wide_range(20_000)
    masters[:4] = torch.tensor([1.0, 1.00390625, -1.01171875, 3.3e38 if dtype == torch.bfloat16 else 6e4])
    param = torch.nn.Parameter(torch.zeros(20_000, dtype=dtype))
    optimizer = DeepSpeedCPUAdam([param], lr=0.0, master_weight_bits=24 if rest == torch.int8 else 32)
    optimizer.load_fp32_params([masters])
    upper, lower = remainders.split(masters, dtype, rest)
    joined = remainders.join(upper, lower)
    assert_same(optimizer.fp32_params()[0], joined, "joined")
    param.grad = torch.ones(20_000, dtype=dtype)
    optimizer.step()
    assert_same(optimizer.fp32_params()[0] + 0.0, joined + 0.0, "master after a step without change")
    relative = {torch.bfloat16: {torch.int8: 2.0**-16, torch.int16: 0.0}, torch.float16: {torch.int8: 2.0**-19,
                torch.int16: 0.0}}[dtype][rest]  # fmt: skip
    absolute = 0.0 if dtype == torch.bfloat16 else 2.0**-33 if rest == torch.int8 else 2.0**-40.9
    fits = masters.abs() > 1e-37 if dtype == torch.bfloat16 else masters.abs() < 65504
    assert ((joined - masters).abs()[fits] <= relative * masters.abs()[fits] + absolute).all()


def test_24_bits_keep_small_updates_that_bfloat16_loses(seed):
    start = [torch.full((5000,), 1.0).bfloat16()]
    grads = torch.ones(5000).bfloat16()
    ends = {}
    for name, arguments in {"none": {}, "24": {"master_weight_bits": 24}, "sr": {"stochastic_rounding": True}}.items():
        param = torch.nn.Parameter(start[0].clone())
        optimizer = DeepSpeedCPUAdam([param], lr=1e-4, **arguments)
        for _ in range(100):
            param.grad = grads
            optimizer.step()
        ends[name] = param.detach().float().mean().item()
    assert ends["none"] == 1.0
    assert ends["24"] == pytest.approx(0.99, abs=0.004)  # bfloat16 is 0.0039 apart here
    assert ends["sr"] == pytest.approx(0.99, abs=0.001)


# Rounding at random


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("target", TARGETS)
def test_stochastic_rounding_is_fair(cpu_adam, target, dtype, seed):
    """Each result is one of the two neighbours, and their frequencies are as near as the value is to each."""
    cpu_adam.use_target(target)
    count = 200_000
    for value in (1.0 + 0.3 * 2**-8, -0.7 - 0.13 * 2**-9, 3.1e-6):
        param = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
        # exp_avg = grad and exp_avg_sq = 1, so with eps = 0 the new param is -lr * grad.
        optimizer = DeepSpeedCPUAdam([param], lr=1.0, betas=(0.0, 0.0), eps=0.0, bias_correction=False,
                                     stochastic_rounding=True)  # fmt: skip
        param.grad = torch.full((count,), -math.copysign(1.0, value), dtype=dtype)
        optimizer.param_groups[0]["lr"] = abs(value)
        optimizer.step()
        wanted = float(torch.tensor(value, dtype=torch.float32))
        near = sorted(set(param.detach().float().tolist()))
        assert len(near) == 2 and near[0] < wanted < near[1], (value, near)
        mean = param.detach().double().mean().item()
        assert abs(mean - wanted) < 5 * 0.5 * (near[1] - near[0]) / math.sqrt(count)
        same = (param[1:] == param[:-1]).double().mean().item()
        share = (wanted - near[0]) / (near[1] - near[0])
        assert abs(same - (share**2 + (1 - share) ** 2)) < 0.01, "neighbours depend on each other"


def test_stochastic_rounding_keeps_what_is_not_finite(seed):
    param = torch.nn.Parameter(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]).bfloat16())
    param.grad = torch.zeros(4).bfloat16()
    DeepSpeedCPUAdam([param], stochastic_rounding=True).step()
    assert param[0] == torch.inf and param[1] == -torch.inf and param[2].isnan() and param[3] == 0


def stochastic_end(make, params, steps=2, **settings):
    """Params after some steps with the same grads."""
    params = [torch.nn.Parameter(param.clone()) for param in params]
    optimizer = make(params, lr=1e-2, stochastic_rounding=True, **settings)
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("arguments", [{}, {"state_dtype": "8bit", "master_weight_bits": 24}])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_seed_decides_and_torchs_generator_does_not(Adam, dtype, arguments):
    start = [torch.randn(5000).to(dtype)]
    ends = []
    for seed in ({}, {"stochastic_rounding_seed": 0}, {"stochastic_rounding_seed": 2**70}):
        torch.manual_seed(len(ends))  # as ranks seed it, for their data
        before = torch.get_rng_state()
        (end,) = stochastic_end(Adam, start, **seed, **arguments)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(end)
    assert torch.equal(ends[0], ends[1])
    assert arguments or not torch.equal(ends[0], ends[2])  # with masters the params hardly show it


def test_groups_have_random_bits_of_their_own_and_may_have_a_seed(Adam):
    start = torch.randn(5000).bfloat16()

    def trained_in_groups(*settings):
        params = [torch.nn.Parameter(start.clone()) for _ in settings for _ in range(2)]
        groups = [{"params": params[2 * i : 2 * i + 2], **setting} for i, setting in enumerate(settings)]
        optimizer = Adam(groups, lr=1e-2, stochastic_rounding=True)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return [param.detach() for param in params], optimizer

    (a, b, c, d), _ = trained_in_groups({}, {})
    assert not any(torch.equal(*pair) for pair in itertools.combinations((a, b, c, d), 2))
    (e, f, g, h), optimizer = trained_in_groups({}, {"stochastic_rounding_seed": 5})
    assert torch.equal(a, e) and torch.equal(b, f) and not torch.equal(c, g) and not torch.equal(d, h)
    assert [group["stochastic_rounding_seed"] for group in optimizer.state_dict()["param_groups"]] == [0, 5]


def test_random_bits_of_a_param_do_not_depend_on_which_others_have_grads(Adam):
    params = [torch.nn.Parameter(torch.randn(5000).bfloat16()) for _ in range(3)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours, theirs = Adam(params, stochastic_rounding=True), Adam(twins, stochastic_rounding=True)
    for step in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad, twin.grad = torch.ones_like(param), torch.ones_like(param)
        twins[step % 2].grad = None
        params[0].grad = params[1].grad = None
        ours.step()
        theirs.step()
        assert torch.equal(params[2], twins[2])


def test_a_resumed_training_goes_on_with_the_same_random_bits(Adam):
    param = torch.nn.Parameter(torch.randn(5000).bfloat16())
    settings = {"lr": 1e-2, "stochastic_rounding": True}
    optimizer = Adam([param], stochastic_rounding_seed=7, **settings)
    param.grad = torch.ones_like(param)
    optimizer.step()
    resumed = torch.nn.Parameter(param.detach().clone())
    other = Adam([resumed], **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["stochastic_rounding_seed"] == 7
    resumed.grad = param.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(param, resumed)


def test_a_seed_that_is_no_number_is_refused(Adam):
    param = torch.nn.Parameter(torch.ones(50).bfloat16())
    with pytest.raises(TypeError, match="Invalid stochastic_rounding_seed: 'seven'; expected an int, or None for 0"):
        Adam([param], stochastic_rounding=True, stochastic_rounding_seed="seven")
    with pytest.raises(TypeError, match="Invalid stochastic_rounding_seed: 1.5 in param group 0; expected an int"):
        Adam([{"params": [param], "stochastic_rounding_seed": 1.5}], stochastic_rounding=True)
    optimizer = Adam([param], stochastic_rounding=True)
    optimizer.param_groups[0]["stochastic_rounding_seed"] = [3]
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"Invalid stochastic_rounding_seed: \[3\] in param group 0"):
        optimizer.step()
    assert torch.equal(param, torch.ones(50).bfloat16()) and not optimizer.state


@pytest.mark.parametrize("arguments", [
    {"stochastic_rounding": True},
    {"state_dtype": "8bit", "master_weight_bits": 24},
    {"state_dtype": torch.bfloat16},
    {"amsgrad": True},
])  # fmt: skip
def test_a_default_device_or_dtype_changes_nothing(Adam, arguments):
    ends = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float64)):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                param = torch.nn.Parameter(torch.ones(5000, device="cpu", dtype=torch.bfloat16))
                optimizer = Adam([param], lr=1e-2, **arguments)
                for _ in range(2):
                    param.grad = torch.ones(5000, device="cpu", dtype=torch.bfloat16)
                    optimizer.step()
        finally:
            torch.set_default_dtype(before)
        assert all(value.device.type == "cpu" for value in optimizer.state[param].values() if torch.is_tensor(value))
        ends.append(param.detach())
    assert torch.equal(*ends)


# Elsewhere


@pytest.mark.parametrize("arguments", [{"state_dtype": "8bit"}, {"master_weight_bits": 24}, {"master_weight_bits": 32},
                                       {"state_dtype": torch.bfloat16, "amsgrad": True}])  # fmt: skip
@pytest.mark.parametrize("dtype", HALVES)
def test_torch_calls_do_nearly_the_same(arguments, dtype, seed):
    start = torch.nn.Parameter(torch.randn(5000).to(dtype))
    pair = [torch.nn.Parameter(start.detach().clone()) for _ in range(2)]
    compiled, fallback = (DeepSpeedCPUAdam([p], lr=1e-2, **arguments) for p in pair)
    fallback._backends = {torch.device("cpu"): TorchBackend()}
    for _ in range(5):
        grad = torch.randn(5000).to(dtype)
        for param, optimizer in zip(pair, (compiled, fallback), strict=True):
            param.grad = grad.clone()
            optimizer.step(zero_grads=True)
            assert not param.grad.any()
    difference = (compiled.fp32_params()[0] - fallback.fp32_params()[0]).norm()
    assert difference < 0.01 * (compiled.fp32_params()[0] - start.detach().float()).norm()


@pytest.mark.smoke
@pytest.mark.parametrize(("arguments", "message"), [
    ({"state_dtype": "4bit"}, "Invalid state_dtype: 4bit; expected torch.float32"),
    ({"state_dtype": torch.float64}, "Invalid state_dtype: torch.float64; expected torch.float32, torch.bfloat16 or"),
    ({"state_dtype": torch.float16}, r"squares of small grads .* become zero, .* use torch.bfloat16, .* or '8bit'"),
    ({"state_dtype": "8bit", "fp32_optimizer_states": False}, "give one of them"),
    ({"master_weight_bits": 16}, "Invalid master_weight_bits: 16; expected None, 24 or 32"),
    ({"master_weight_bits": 32, "stochastic_rounding": True}, "wider ones lose nothing"),
])  # fmt: skip
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedCPUAdam([torch.zeros(3, requires_grad=True)], **arguments)


def test_codes_without_their_scales_are_refused(seed):
    params, optimizer = trained([torch.randn(5000)], 1, 1, state_dtype="8bit")
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][0][SCALES]
    with pytest.raises(ValueError, match="8-bit states without the 'block_scales'"):
        optimizer.load_state_dict(broken)


def test_wrong_fp32_params_are_refused(seed):
    params, optimizer = trained([torch.randn(50).bfloat16()], 1, 1, master_weight_bits=24)
    with pytest.raises(ValueError, match="There are 1 params in this optimizer, and 2 were given"):
        optimizer.load_fp32_params([torch.zeros(50)] * 2)
    with pytest.raises(ValueError, match=r"param 0 has shape \(50,\), and \(51,\) was given"):
        optimizer.load_fp32_params([torch.zeros(51)])


def test_a_copied_optimizer_keeps_its_precision(seed):
    _, optimizer = trained([torch.randn(5000).bfloat16()], 1, 1, state_dtype="8bit", master_weight_bits=24)
    twin = copy.deepcopy(optimizer)
    (param,) = twin.param_groups[0]["params"]
    param.grad = torch.randn(5000).bfloat16()
    twin.step()
    assert twin.state[param]["exp_avg"].dtype == torch.int8
    assert twin.state[param]["param_remainder"].dtype == torch.int8


# Memory layouts ----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


def trained_with_odd_states(layout, state_dtype=torch.float32, bits=24):
    """Params and optimizer, twice: the first param has no grad, and state tensors in this memory layout.

    The second time they are contiguous, with the same values.
    """
    start = torch.randn(64, 80).bfloat16()
    pair = []
    for change in (LAYOUTS[layout], lambda t: LAYOUTS[layout](t).contiguous()):
        params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
        optimizer = DeepSpeedCPUAdam(params, lr=1e-2, state_dtype=state_dtype, master_weight_bits=bits)
        for param in params:
            param.grad = start.clone()
        optimizer.step()
        state, params[0].grad = optimizer.state[params[0]], None
        for key in ("exp_avg", "exp_avg_sq", *(["param_remainder"] if bits else [])):
            state[key] = change(state[key])
        pair.append((params, optimizer))
    return pair


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [24, 32])
def test_remainders_in_other_memory_layouts_are_read_element_by_element(cpu_adam, layout, bits, seed):
    (params, odd), (_, plain) = trained_with_odd_states(layout, bits=bits)
    assert_same(odd.fp32_params()[0], plain.fp32_params()[0], "fp32_params()")
    outs = [[torch.zeros(64, 80, dtype=torch.bfloat16) for _ in params] for _ in range(2)]
    for optimizer, copies in zip((odd, plain), outs, strict=True):
        optimizer.step(lowp_out=copies)  # the first param has no grad: its copy is written after the kernels have run
    for ours, theirs in zip(*outs, strict=True):
        assert_same(ours, theirs, "lowp_out")
    for optimizer in (odd, plain):
        portable_state_dicts(optimizer)
    ours, theirs = (optimizer.state_dict()["state"][0]["param_remainder"] for optimizer in (odd, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_master_weights_start_from_remainders_in_other_memory_layouts(cpu_adam, layout, seed):
    results = []
    for (param, _), optimizer in trained_with_odd_states(layout):
        state = optimizer.state[param]
        other = FusedAdam([param], lr=0.0, master_weights=True)
        other.state[param] = {"step": 0, "param_remainder": state["param_remainder"]}
        param.grad = torch.zeros_like(param)
        other.step()
        results.append(other.state[param]["master_param"])
    assert_same(*results, "master weights")


@pytest.mark.parametrize("layout", ["gaps", "expanded"])
def test_8bit_states_in_other_memory_layouts_are_dequantized_element_by_element(cpu_adam, layout, seed):
    (_, odd), (_, plain) = trained_with_odd_states(layout, "8bit", None)
    ours, theirs = (optimizer.state_dict(dequantize=True)["state"][0] for optimizer in (odd, plain))
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same(ours[key], theirs[key], key)


def test_a_rollback_of_states_in_another_memory_layout_is_refused(cpu_adam, seed):
    param = torch.nn.Parameter(torch.randn(64, 80))
    optimizer = DeepSpeedCPUAdam([param])
    param.grad = torch.randn(64, 80)
    optimizer.step_subgroup(0)
    before, state = param.detach().clone(), optimizer.state[0]
    state["exp_avg"] = LAYOUTS["transposed"](state["exp_avg"])
    with pytest.raises(ValueError, match="subgroup 0 has strides .* its state .exp_avg. has"):
        optimizer.rollback_subgroup(0)
    assert torch.equal(param, before) and state["step"] == 1


@pytest.mark.parametrize("settings", [{"master_weights": True}, {"master_weight_bits": 32}])
def test_master_weights_on_the_device_meta_are_refused(settings):
    params = [torch.nn.Parameter(torch.randn(50).bfloat16()) for _ in range(2)]
    optimizer = FusedAdam(params, **settings)
    for param in params:
        param.grad = torch.randn(50).bfloat16()
    optimizer.step()
    state, params[0].grad = optimizer.state[params[0]], None
    key = next(key for key in ("master_param", "param_remainder") if key in state)
    state[key] = state[key].to("meta")
    before = params[1].detach().clone()
    saved = optimizer.state_dict()
    for call in (
        lambda: optimizer.fp32_params(),
        lambda: optimizer.step(lowp_out=[torch.zeros(50, dtype=torch.bfloat16) for _ in params]),
        lambda: optimizer.load_state_dict(saved),
    ):
        with pytest.raises(ValueError, match=f"has state '{key}' on meta"):
            call()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("settings", [{"master_weights": True}, {"master_weight_bits": 24}, {"master_weight_bits": 32}])
def test_masters_of_params_that_were_float32_for_a_while_start_anew(settings):
    module = torch.nn.Linear(4, 4).bfloat16()
    optimizer = FusedAdam(module.parameters(), lr=0.1, weight_decay=0.0, **settings)

    def train(steps):
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        for _ in range(steps):
            optimizer.step()
        for param in module.parameters():
            param.grad = None
        return module.weight[0, 0].item()

    start = train(1)
    module.float()
    between = train(10)
    assert not {"master_param", "param_remainder"} & optimizer.state[module.weight].keys()
    module.bfloat16()
    assert abs(between - (start - 1.0)) < 0.01 and abs(train(1) - (start - 1.1)) < 0.02

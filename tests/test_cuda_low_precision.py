"""What test_low_precision.py asks of the CPU op, of the CUDA op: that it has the CPU op's bits. The op is emulated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import HOST, EmulatedBackend, EmulatedFusedAdam
from test_low_precision import HALVES, assert_same, near_the_largest_float, wide_range

from adamops import FusedAdam

pytestmark = pytest.mark.usefixtures("cuda_op")


def params_and_twins(sizes, dtype, offset=0):
    """Equal params; those of the first list may begin anywhere in memory."""
    twins = [torch.nn.Parameter(wide_range(size).to(dtype)) for size in sizes]
    rooms = [torch.empty(size + offset, dtype=dtype) for size in sizes]
    params = [torch.nn.Parameter(room[offset:].copy_(twin.detach())) for room, twin in zip(rooms, twins, strict=True)]
    return params, twins


def set_grads(params, twins, dtype, special):
    for param, twin in zip(params, twins, strict=True):
        twin.grad = None
        grad = wide_range(param.numel()).to(dtype)
        if special and grad.numel():
            grad[torch.randint(len(grad), (3,))] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
        if param.dtype == dtype:
            param.grad, twin.grad = grad.clone(), grad
        else:  # torch lets only a hook or .data have it otherwise
            param.grad, twin.grad = torch.zeros_like(param), torch.zeros_like(twin)
            param.grad.data, twin.grad.data = grad.clone(), grad


def assert_all_same(ours, theirs):
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert_same(param.detach(), twin.detach(), "param")
        state, other = ours.state.get(param, {}), theirs.state.get(twin, {})
        assert state.keys() == other.keys()
        for name, value in state.items():
            if name == "step":
                assert int(value) == int(other[name])
            else:
                assert_same(value, other[name], name)


SIZES = st.sampled_from([0, 1, 7, 255, 256, 4095, 4096, 4103, 8199, 20_000])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_have_the_bits_of_the_cpu_op(cuda_op, data):
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES]), "dtype")
    grad_dtype = data.draw(st.sampled_from([dtype, torch.float32]), "grad dtype")
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=4), "sizes")
    params, twins = params_and_twins(sizes, dtype, offset=data.draw(st.sampled_from([0, 0, 1, 8]), "offset"))
    state_dtype = data.draw(st.sampled_from(["8bit", "8bit", torch.float32, torch.bfloat16]), "state_dtype")
    kept = data.draw(st.sampled_from(["nothing", 24, 32, "fp32"]), "masters")
    arguments = {
        "state_dtype": None if kept == "fp32" else state_dtype,
        "master_weight_bits": kept if kept in (24, 32) else None,
        "master_weights": kept == "fp32",
        "stochastic_rounding": kept in ("nothing", 24) and data.draw(st.booleans(), "stochastic_rounding"),
        "amsgrad": data.draw(st.booleans(), "amsgrad"),
        "adam_w_mode": data.draw(st.booleans(), "adam_w_mode"),
        "weight_decay": 0.1,
        "lr": 0.01,
    }
    optimizers = []
    for own, cls in ((params, EmulatedFusedAdam), (twins, FusedAdam)):
        torch.manual_seed(seed)  # of which the seed of rounding comes
        optimizers.append(cls(own, **arguments))
    ours, theirs = optimizers
    ours.param_groups[0]["capturable"] = data.draw(st.booleans(), "capturable")
    with_copies, zero_grads = data.draw(st.booleans(), "lowp_out"), data.draw(st.booleans(), "zero_grads")
    copies = [
        [torch.empty(p.shape, dtype=HALVES[i % 2]) if i % 3 != 2 else None for i, p in enumerate(params)] for _ in "ab"
    ]
    norms = {}
    for _ in range(3):
        set_grads(params, twins, grad_dtype, data.draw(st.booleans(), "special"))
        overflow = data.draw(st.sampled_from([None, None, False, True]), "overflow")
        clip = data.draw(st.sampled_from([None, None, (0.1, 2.0), (1e9, 1.0), (0.3, float("inf"))]), "clip")
        for optimizer, own_copies in zip(optimizers, copies, strict=True):
            if clip:
                norms[optimizer] = optimizer.clip_grad_norm_(*clip)
            if overflow is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.7), torch.tensor([float(overflow)])
            optimizer.step(zero_grads=zero_grads, lowp_out=own_copies if with_copies else None)
            if overflow is not None:
                del optimizer.grad_scale, optimizer.found_inf
        if clip:
            assert_same(norms[ours], norms[theirs], "norm")
        if overflow and not theirs.state:
            for p in params:  # new states of zeros, with a count on the device, are there all the same
                ours.state.pop(p, None)
        assert_all_same(ours, theirs)
        for i in range(len(params)):
            assert_same(params[i].grad, twins[i].grad, "grad")
            if with_copies and copies[0][i] is not None:
                # If a step is skipped before there are masters, a copy of -0 may be 0, the sum of master and rest.
                assert_same(copies[0][i] + 0.0, copies[1][i] + 0.0, "copy")


def test_what_is_not_finite_stays_with_its_elements():
    params, twins = params_and_twins([4096], torch.float32)
    ours, theirs = EmulatedFusedAdam(params, state_dtype="8bit"), FusedAdam(twins, state_dtype="8bit")
    for step in range(3):
        for own in (params, twins):
            own[0].grad = torch.ones(4096)
            if step == 0:
                own[0].grad[[5, 300]] = torch.tensor([torch.inf, torch.nan])
        ours.step()
        theirs.step()
        assert_all_same(ours, theirs)
    assert params[0].isnan().nonzero().flatten().tolist() == [5, 300]


def test_squares_beyond_the_largest_scale_have_the_bits_of_the_cpu_op(seed):
    params, twins = params_and_twins([5000], torch.float32)
    arguments = {"state_dtype": "8bit", "betas": (0.5, 0.0), "amsgrad": True}
    ours, theirs = EmulatedFusedAdam(params, **arguments), FusedAdam(twins, **arguments)
    for _ in range(3):
        grad = near_the_largest_float(5000).abs().sqrt().clamp(max=1.8446743e19)
        params[0].grad, twins[0].grad = grad.clone(), grad
        ours.step()
        theirs.step()
        assert_all_same(ours, theirs)


def test_checkpoints_in_codes_go_to_the_cpu_op_and_back():
    arguments = {"state_dtype": "8bit", "master_weight_bits": 24, "stochastic_rounding": True}
    params, twins = params_and_twins([5000, 60], torch.bfloat16)
    ours, theirs = EmulatedFusedAdam(params, **arguments), FusedAdam(twins, **arguments)
    theirs.param_groups[0]["stochastic_rounding_seed"] = ours.param_groups[0]["stochastic_rounding_seed"]
    for _ in range(2):
        set_grads(params, twins, torch.bfloat16, False)
        ours.step()
        theirs.step()
        saved = ours.state_dict(), theirs.state_dict()
        ours.load_state_dict(saved[1])
        theirs.load_state_dict(saved[0])
    assert_all_same(ours, theirs)
    assert ours._backends[HOST].name == "fused_adam"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_norms_have_the_bits_of_the_cpu_op(cuda_op, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    sizes = st.integers(0, 100) | st.sampled_from([32767, 32768, 32769, 262144, 262145, 300_000])
    count = data.draw(st.sampled_from([0, 1, 3, 5000]), "count")
    grads = [wide_range(data.draw(sizes, "size")) for _ in range(min(count, 3))] * (count // 3 or 1)
    grads = [grad.to(data.draw(st.sampled_from([torch.float32, *HALVES]), "dtype")) if i < 3 else grad[:2]
             for i, grad in enumerate(grads)]  # fmt: skip
    if grads and len(grads[0]) and data.draw(st.booleans(), "special"):
        grads[0][-1] = data.draw(st.sampled_from([torch.inf, -torch.inf, torch.nan]), "value")
    norm_type = data.draw(st.sampled_from([1.0, 2.0, float("inf")]), "norm_type")
    theirs = FusedAdam([torch.nn.Parameter(torch.zeros(1))])._backends[HOST].grad_norm(grads, norm_type)
    ours = EmulatedBackend(cuda_op).grad_norm(grads, norm_type)
    assert ours.shape == () and ours.dtype == torch.float64
    assert_same(ours, torch.tensor(theirs, dtype=torch.float64), "norm")


def test_wrong_norms_are_refused(cuda_op):
    with pytest.raises(ValueError, match="norm_type must be 1, 2 or infinity"):
        cuda_op.grad_norm([], [], [], 3.0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="unknown dtype code 3"):
        cuda_op.grad_norm([0], [0], [3], 2.0, 0, 0, 0, 0)


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_clipping_waits_for_nothing_and_keeps_counts_on_the_device(norm_type):
    params, twins = params_and_twins([5000, 30], torch.float32)
    ours, theirs = EmulatedFusedAdam(params), FusedAdam(twins)
    for _ in range(2):
        set_grads(params, twins, torch.float32, False)
        for optimizer in (ours, theirs):
            optimizer.clip_grad_norm_(0.1, norm_type)
            optimizer.step()
    assert_all_same(ours, theirs)
    assert isinstance(ours.state[params[0]]["step"], torch.Tensor)
    ours.zero_grad()
    assert ours._grad_factor() == 1.0

"""clip_grad_norm_() on the optimizer, whose factor the next step applies; and grads zeroed in the step."""

import ctypes
import math
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from adamops import DeepSpeedCPUAdam, op_builder
from adamops.optim.backends.torch import TorchBackend

MODULE = op_builder.get("cpu_adam").load()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_grads(*shapes, dtype=torch.float32, scale=1.0):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn_like(param) * scale).detach()
    return params


def twins_of(params):
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for twin, param in zip(twins, params, strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
    return twins


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_norm_has_the_same_bits_everywhere_and_is_right(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    sizes = data.draw(st.lists(st.integers(0, 100_000), min_size=1, max_size=5), "sizes")
    grads = [torch.randn(n).to(data.draw(st.sampled_from(DTYPES), "dtype")) * 0.1 for n in sizes]
    norm_type = data.draw(st.sampled_from([1.0, 2.0, math.inf]), "norm_type")
    columns = [g.data_ptr() for g in grads], sizes, [DTYPES.index(g.dtype) for g in grads]
    best = MODULE.target()
    found = set()
    try:
        for target in MODULE.supported_targets():
            MODULE.use_target(target)
            for threads in (1, data.draw(st.integers(2, 8), "threads")):
                found.add(MODULE.grad_norm(*columns, norm_type, threads))
    finally:
        MODULE.use_target(best)
    (norm,) = found
    exact = torch.cat([g.double() for g in grads])
    expected = torch.linalg.vector_norm(exact, norm_type).item() if len(exact) else 0.0
    assert norm == pytest.approx(expected, rel=1e-13)


def test_many_elements_lose_nothing():
    grad = torch.full((3_000_001,), 1e-3)
    norm = MODULE.grad_norm([grad.data_ptr()], [grad.numel()], [0], 2.0, 2)
    assert norm == pytest.approx(float(grad[0]) * math.sqrt(grad.numel()), rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_what_is_not_finite_shows_in_the_norm(value, norm_type, seed):
    (param,) = with_grads(70_000)
    param.grad[torch.randint(70_000, ())] = value
    param.grad[1] = -math.inf
    optimizer = DeepSpeedCPUAdam([param])
    norm = optimizer.clip_grad_norm_(1.0, norm_type)
    assert norm.isnan() if math.isnan(value) else norm == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("backend", ["cpu_adam", "torch_adam"])
def test_clipping_is_that_of_torch(dtype, norm_type, max_norm, backend, seed):
    params = with_grads((70, 80), 10, 5000, dtype=dtype)
    twins = twins_of(params)
    ours, theirs = DeepSpeedCPUAdam(params, lr=1e-2), DeepSpeedCPUAdam(twins, lr=1e-2)
    if backend == "torch_adam":
        ours._backends = theirs._backends = {torch.device("cpu"): TorchBackend()}
    norm = ours.clip_grad_norm_(max_norm, norm_type)
    assert norm.shape == () and norm.dtype == torch.float32
    widened = [t.grad.float() for t in twins]
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, norm_type) for g in widened]), norm_type)
    assert norm == pytest.approx(float(total), rel=1e-5)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param.grad, twin.grad), "the grads were written to"
    theirs.grad_scale = 1.0 / min(1.0, max_norm / (float(total) + 1e-6))
    for optimizer in (ours, theirs):
        optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.allclose(param.float(), twin.float(), rtol=2.0**-7 if dtype != torch.float32 else 1e-5, atol=1e-6)


@pytest.mark.smoke
def test_the_factor_stays_with_the_grads_as_if_they_had_been_written(seed):
    params = with_grads(5000, scale=10)
    twins = twins_of(params)
    ours, theirs = DeepSpeedCPUAdam(params), DeepSpeedCPUAdam(twins)
    ours.clip_grad_norm_(0.1)
    torch.nn.utils.clip_grad_norm_(twins, 0.1)
    for _ in range(2):
        ours.step()
        theirs.step()
    assert torch.allclose(params[0], twins[0], rtol=1e-6, atol=1e-7)
    params[0].grad = torch.randn(5000)
    twins[0].grad = params[0].grad.clone()
    ours.step()
    theirs.step()
    assert torch.allclose(params[0], twins[0], rtol=1e-6, atol=1e-7)
    ours.clip_grad_norm_(0.1)
    ours.zero_grad()
    assert ours._grad_factor() == 1.0


def test_clipping_twice_finds_the_norm_clipped(seed):
    params = with_grads(5000)
    optimizer = DeepSpeedCPUAdam(params)
    assert optimizer.clip_grad_norm_(2.0) == pytest.approx(params[0].grad.norm().item(), rel=1e-5)
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(2.0, rel=1e-5)
    assert optimizer.clip_grad_norm_(5.0) == pytest.approx(1.0, rel=1e-5)


def test_the_norm_is_that_of_unscaled_grads(seed):
    params = with_grads(5000)
    norm = params[0].grad.norm().item()
    params[0].grad *= 1024
    optimizer = DeepSpeedCPUAdam(params)
    optimizer.grad_scale = torch.tensor(1024.0)
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(norm, rel=1e-5)


@pytest.mark.smoke
def test_error_if_nonfinite(seed):
    params = with_grads(5000)
    params[0].grad[7] = math.nan
    optimizer = DeepSpeedCPUAdam(params)
    with pytest.raises(
        RuntimeError, match="The total norm of order 2.0 of the grads is nan, so they cannot be clipped"
    ):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert optimizer._grad_factor() == 1.0


def test_without_grads_the_norm_is_zero():
    optimizer = DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(3))])
    assert optimizer.clip_grad_norm_(1.0) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_zeroing_grads_changes_nothing_else(dtype, amsgrad, seed):
    params = with_grads((70, 80), 1, 0, 300, 100_000, dtype=dtype)
    params.append(torch.nn.Parameter(torch.randn(40, 30).t().to(dtype)))
    params[-1].grad = torch.randn(30, 40).to(dtype)  # laid out otherwise, so the step takes a copy
    params.append(torch.nn.Parameter(torch.randn(5).to(dtype)))  # no grad
    twins = twins_of(params)
    ours, theirs = (DeepSpeedCPUAdam(group, amsgrad=amsgrad) for group in (params, twins))
    for _ in range(3):
        for param, twin in zip(params[:-1], twins, strict=False):
            param.grad.copy_(torch.randn(param.shape))
            twin.grad.copy_(param.grad)
        ours.step(zero_grads=True)
        theirs.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)
            assert param.grad is None or not param.grad.any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_ends_with_the_grads(cpu_adam, dtype, threads, seed):
    """Of all sizes up to some blocks, wherever they begin, and of one that several threads share."""
    torch.set_num_threads(threads)
    for size in (*range(131), 40_001):
        begin = int(torch.randint(0, 40, ()))
        room = torch.randn(size + 100).to(dtype)
        expected = room.clone()
        expected[begin : begin + size] = 0
        param = torch.nn.Parameter(torch.randn(size).to(dtype))
        param.grad = room[begin : begin + size]
        DeepSpeedCPUAdam([param]).step(zero_grads=True)
        assert torch.equal(room, expected), (size, begin)


def test_a_skipped_step_zeroes_grads_too(seed):
    params = with_grads(300)
    before = params[0].detach().clone()
    optimizer = DeepSpeedCPUAdam(params)
    optimizer.step()
    after = params[0].detach().clone()
    assert not torch.equal(before, after)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step(zero_grads=True)
    assert torch.equal(params[0].detach(), after) and not params[0].grad.any()


# Orders of calls ---------------------------------------------------------------------------------------------------


def clip_like_torch(make, change):
    """Clips, lets `change` do something to the params' grads, clips again, and steps: with ours, and with torch."""
    found = []
    for ours in (True, False):
        params = [torch.nn.Parameter(torch.zeros(6)) for _ in range(3)]
        settings = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
        optimizer = make(params, **settings) if ours else torch.optim.Adam(params, **settings)
        clip = optimizer.clip_grad_norm_ if ours else lambda m, params=params: torch.nn.utils.clip_grad_norm_(params, m)
        for i, param in enumerate(params):
            param.grad = torch.full((6,), 100.0 + i)
        clip(1.0)
        change(params)
        norm = clip(2.0)
        optimizer.step()
        found.append(torch.cat([norm.reshape(1), *(param.detach() for param in params)]))
    torch.testing.assert_close(*found)


def replace_one(params):
    params[1].grad = torch.ones(6)


def drop_one(params):
    params[2].grad = None


def write_unseen(params):
    for param in params:
        param.grad.data.copy_(torch.arange(6.0))  # torch does not count this as a write to the grad


@pytest.mark.parametrize("change", [replace_one, drop_one, write_unseen])
def test_clipping_again_sees_what_the_grads_are_now(Adam, change):
    clip_like_torch(Adam, change)


def test_a_step_does_not_clip_grads_that_were_written_unseen_since():
    param, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    optimizer = DeepSpeedCPUAdam([param, other], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    param.grad, other.grad = torch.full((4,), 100.0), torch.full((4,), 100.0)
    optimizer.clip_grad_norm_(1.0)
    param.grad.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other.grad.data.fill_(1.0)
    optimizer.step()
    assert torch.allclose(param, -torch.tensor([1.0, 2.0, 3.0, 4.0]) / torch.tensor([2.0, 3.0, 4.0, 5.0]))
    assert torch.allclose(other, torch.tensor(-0.5))


def test_a_norm_of_grads_written_through_numpy_is_the_new_one():
    numpy = pytest.importorskip("numpy")
    buffer = numpy.full(4, numpy.inf, dtype=numpy.float32)
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = DeepSpeedCPUAdam([param])
    param.grad = torch.from_numpy(buffer)
    assert optimizer.clip_grad_norm_(1.0).isinf()
    buffer[:] = 1.0
    assert optimizer.clip_grad_norm_(1.0) == 2.0


@pytest.mark.parametrize("share", [lambda grad: grad, lambda grad: grad[:], lambda grad: grad.detach()])
def test_the_factor_is_applied_once_to_grads_that_share_memory(share):
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = DeepSpeedCPUAdam(params, lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    grad = torch.full((4,), 10.0)
    params[0].grad, params[1].grad, params[2].grad = grad, share(grad), torch.zeros(4)
    norm = optimizer.clip_grad_norm_(1.0)
    params[2].grad = torch.ones(4)  # so the factor is applied to the others in memory
    optimizer.step()
    clipped = 10.0 / norm
    assert torch.allclose(params[0], -clipped / (clipped + 1)) and torch.equal(params[0], params[1])


VIEWS = {
    "one after another": lambda base: (base[:4], base[4:8]),
    "with gaps": lambda base: (base[:4], base[5:9]),
    "every other": lambda base: (base[0:8:2], base[1:8:2]),
    "overlapping": lambda base: (base[0:4], base[2:6]),
    "one in the other": lambda base: (base[:8], base[2:6]),
    "expanded": lambda base: (base[:1].expand(4), base[4:8]),
    "transposed": lambda base: (base.view(3, 3), base.view(3, 3).t()),
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_is_applied_to_each_element_of_grads_that_are_views_of_one_tensor(views, dtype):
    """As of a bucket: views of a tensor share one version counter, so a write to one looks like a write to all."""
    base = torch.full((9,), 8.0, dtype=dtype)
    grads = views(base)
    params = [torch.nn.Parameter(torch.zeros(grad.shape, dtype=dtype)) for grad in grads]
    params.append(torch.nn.Parameter(torch.zeros(2, dtype=dtype)))
    optimizer = DeepSpeedCPUAdam(params, lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    for param, grad in zip(params, grads, strict=False):
        param.grad = grad
    params[2].grad = torch.zeros(2, dtype=dtype)
    norm = float(optimizer.clip_grad_norm_(1.0))
    params[2].grad = torch.ones(2, dtype=dtype)  # so the factor is applied to the others in memory
    optimizer.step()
    (value,) = {value for grad in grads for value in grad.flatten().tolist()}
    assert value == pytest.approx(8.0 / norm, rel=1e-6 if dtype == torch.float32 else 1e-2)
    seen = torch.zeros(9)
    for grad in views(seen):
        grad.fill_(1.0) if 0 not in grad.stride() else seen[0].fill_(1.0)
    assert torch.equal(base == 8.0, seen == 0.0)


@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00])
def test_applying_the_factor_in_memory_does_not_depend_on_the_rounding_mode(mode):
    if platform.machine() != "x86_64":
        pytest.skip("rounding modes are numbered for x86-64")
    libm = ctypes.CDLL("libm.so.6")
    start, *grads = (torch.randn(3000) for _ in range(4))

    def run(mode):
        params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
        optimizer = DeepSpeedCPUAdam(params, lr=1e-2)
        params[0].grad, params[1].grad = grads[0].clone(), grads[1].clone()
        libm.fesetround(mode)
        try:
            optimizer.clip_grad_norm_(0.1)
            params[1].grad = grads[2]
            optimizer.step()
        finally:
            libm.fesetround(0)
        return params[0].detach()

    assert torch.equal(run(0), run(mode))


def test_grads_that_were_given_the_data_of_fake_tensors_are_refused(Adam):
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = Adam([param])
    param.grad = torch.ones(5)
    param.grad.data = FakeTensorMode().from_tensor(torch.ones(5))
    with pytest.raises(ValueError, match="a grad is on the device meta, and has no values"):
        optimizer.clip_grad_norm_(1.0)

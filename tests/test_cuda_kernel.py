"""The CUDA op's sources, compiled as C++ and run on the host, against the CPU op: the same bits.

What this cannot show is what nvcc and a GPU make of the sources; docs/cuda.md says what is known of that.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import kernel_check
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamops.ops.adam.adam import adam_settings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
COMBINATIONS = [
    (p, g, s) for p in DTYPES for g in dict.fromkeys([p, torch.float32]) for s in dict.fromkeys([p, torch.float32])
]

WORDS = 11  # of StepScalars: ten floats and the step


@pytest.fixture(scope="session")
def launch_plan():
    sources = [cuda_emulation.HERE / "launch_plan_module.cpp", cuda_emulation.CSRC / "cuda/launch_plan.cpp"]
    return cuda_emulation.load(cuda_emulation.build("launch_plan.so", sources))


def draw(size, dtype, offset=0, positive=False):
    """Random values over many decades, zeros and subnormals among them, `offset` elements into their memory."""
    x = torch.randn(size, dtype=torch.float64) * 10.0 ** (torch.rand(size) * 12 - 9)
    special = torch.tensor([0.0, -0.0, 1e-40, -2e-44, 6e-8, -1e-7, 65504.0, torch.inf, torch.nan])
    x = torch.where(torch.rand(size) < 0.05, special[torch.randint(len(special), (size,))].double(), x)
    room = torch.empty(size + offset, dtype=dtype)
    room[offset:].copy_(x.abs() if positive else x)
    return room[offset:]


class Tensors:
    """Tensors with grads and states, of given sizes and (param, grad, state) dtypes."""

    def __init__(self, sizes, dtypes, amsgrad=False, masters=False, offset=0):
        self.numels, self.dtypes, self.amsgrad = list(sizes), dtypes, amsgrad
        p, g, s = dtypes
        self.grads = [draw(n, g, offset) for n in sizes]
        self.exp_avgs = [draw(n, s, offset) for n in sizes]
        self.exp_avg_sqs = [draw(n, s, offset, positive=True) for n in sizes]
        self.max_exp_avg_sqs = [draw(n, s, offset, positive=True) for n in sizes] if amsgrad else None
        self.masters = [draw(n, torch.float32, offset) for n in sizes] if masters else None
        self.params = [x.to(p) for x in self.masters] if masters else [draw(n, p, offset) for n in sizes]

    def clone(self):
        twin = object.__new__(Tensors)
        twin.__dict__ = {
            k: [x.clone() for x in v] if k[-1] == "s" and _are_tensors(v) else v for k, v in vars(self).items()
        }
        return twin

    def written(self):
        return [self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs or [], self.masters or []]


def _are_tensors(value):
    return isinstance(value, list) and all(isinstance(x, torch.Tensor) for x in value)


def addresses(tensors):
    return None if tensors is None else [x.data_ptr() for x in tensors]


def cuda_step(op, t, l2, scalars, steps=None, device_scalars=0, found_inf=0, device=0):
    table = table_of(op, t, t.params, t.grads, t.dtypes, steps, t.masters)
    op.step_with_scalars(table, scalars, int(l2), device_scalars, found_inf, device, 0)


def cpu_step(op, t, l2, scalars, steps=None):
    """The same step by the CPU op; with masters, as a step of fp32 params under the widened grads."""
    params, grads, dtypes = t.params, t.grads, t.dtypes
    if t.masters:
        params, grads, dtypes = t.masters, [x.float() for x in t.grads], (torch.float32,) * 3
    op.step_with_scalars(table_of(op, t, params, grads, dtypes, steps), scalars, int(l2), 2)
    if t.masters:
        for param, master in zip(t.params, t.masters, strict=True):
            param.copy_(master)


def table_of(op, t, params, grads, dtypes, steps=None, masters=None, counts_on_device=False):
    return kernel_check.table_of(
        op,
        list(map(addresses, (params, grads, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs, masters))),
        t.numels,
        [CODE[dtype] for dtype in dtypes],
        steps or [1] * len(t.numels),
        counts_on_device=counts_on_device,
    )


def table_of_counts(op, counts):
    """A table of empty tensors whose step counts lie on the device."""
    empty = [0] * len(counts)
    steps = [counts.data_ptr() + 4 * i for i in range(len(counts))]
    return kernel_check.table_of(op, [empty] * 4, empty, (0, 0, 0), steps, counts_on_device=True)


def assert_same_bits(ours, theirs):
    for column, expected in zip(ours.written(), theirs.written(), strict=True):
        for x, y in zip(column, expected, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            assert torch.equal(x[~x.isnan()].view(bits), y[~y.isnan()].view(bits))


def hyper(l2=False, amsgrad=False, maximize=False, **changed):
    usual = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "bias_correction": True}
    return adam_settings(**{**usual, **changed}, adamw_mode=not l2, amsgrad=amsgrad, maximize=maximize)


SIZES = [0, 1, 7, 8, 9, 31, 255, 256, 1025, 4095, 4096, 4097, 8200, 100_000]


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_kernel_has_the_bits_of_the_cpu_op(cuda_op, cpu_adam, dtypes, l2, amsgrad):
    scalars = [hyper(l2, amsgrad).scalars(3)]
    for offset in (0, 1, 3):
        ours = Tensors(SIZES, dtypes, amsgrad, offset=offset)
        theirs = ours.clone()
        cuda_step(cuda_op, ours, l2, scalars)
        cpu_step(cpu_adam, theirs, l2, scalars)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("param", DTYPES[1:])
@pytest.mark.parametrize("grad", ["same", "float32"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_masters_have_the_bits_of_fp32_params(cuda_op, cpu_adam, param, grad, amsgrad):
    dtypes = (param, param if grad == "same" else torch.float32, torch.float32)
    scalars = [hyper(amsgrad=amsgrad).scalars(2)]
    for offset in (0, 1):
        ours = Tensors(SIZES, dtypes, amsgrad, masters=True, offset=offset)
        theirs = ours.clone()
        cuda_step(cuda_op, ours, False, scalars)
        cpu_step(cpu_adam, theirs, False, scalars)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 403, 5000])
def test_many_tensors_over_several_launches(cuda_op, cpu_adam, count):
    """With step counts of their own: each tensor gets the scalars of its row."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    sizes = torch.randint(0, 40, (count,), generator=generator).tolist()
    steps = torch.randint(1, 4, (count,), generator=generator).tolist()
    ours = Tensors(sizes, (torch.bfloat16, torch.bfloat16, torch.float32))
    theirs = ours.clone()
    distinct = list(dict.fromkeys(steps))
    scalars = [hyper().scalars(step) for step in distinct]
    cuda_step(cuda_op, ours, False, scalars, steps)
    cpu_step(cpu_adam, theirs, False, scalars, steps)
    assert_same_bits(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.99999)),
    weight_decay=st.floats(0, 1),
    bias_correction=st.booleans(),
    l2=st.booleans(),
    maximize=st.booleans(),
    steps=st.lists(st.integers(0, 2**24 - 2), min_size=1, max_size=20),
    loss_scale=st.sampled_from([None, 1.0, 65536.0, 3.7]),
)
def test_scalars_on_the_device_are_those_of_the_host(
    cuda_op, lr, betas, weight_decay, bias_correction, l2, maximize, steps, loss_scale
):
    counts = torch.tensor(steps, dtype=torch.float32)
    out = torch.zeros(len(steps), WORDS)
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    cuda_op.count_steps(
        table_of_counts(cuda_op, counts),
        out.data_ptr(),
        (lr, *betas, 1e-8, weight_decay, bias_correction, not l2),
        maximize,
        0,
        0,
        0 if scale is None else scale.data_ptr(),
        0,
        0,
        0,
        0,
    )
    assert counts.tolist() == [step + 1 for step in steps]
    group = adam_settings(lr, *betas, 1e-8, weight_decay, bias_correction, not l2, maximize=maximize)
    expected = torch.tensor([group.scalars(step + 1) for step in steps], dtype=torch.float64)
    expected[:, 0] /= 1.0 if scale is None else scale.double()
    assert torch.equal(out[:, :10], expected.float())
    assert out[:, 10].contiguous().view(torch.int32).tolist() == [step + 1 for step in steps]


def test_learning_rate_and_scalars_from_the_device(cuda_op, cpu_adam):
    ours = Tensors([5000, 3, 17], (torch.float32,) * 3)
    theirs = ours.clone()
    counts, out = torch.tensor([0.0, 4.0, 9.0]), torch.zeros(3, WORDS)
    for lr, where in ((torch.tensor(0.01), (1, 0)), (torch.tensor(0.02, dtype=torch.float64), (0, 1))):
        pointers = [lr.data_ptr() * w for w in where]
        numbers = (0.5, 0.9, 0.999, 1e-8, 0.01, True, True)
        cuda_op.count_steps(table_of_counts(cuda_op, counts), out.data_ptr(), numbers, False, *pointers, 0, 0, 0, 0, 0)
        cuda_step(cuda_op, ours, False, [], device_scalars=out.data_ptr())
        scalars = [hyper(lr=float(lr)).scalars(int(step)) for step in counts]
        cpu_step(cpu_adam, theirs, False, scalars, counts.int().tolist())
    assert counts.tolist() == [2, 6, 11]
    assert_same_bits(ours, theirs)


def test_found_inf_skips_the_step_on_the_device(cuda_op):
    ours = Tensors([5000, 3], (torch.bfloat16, torch.float32, torch.float32), masters=True)
    before = ours.clone()
    counts, out, found_inf = torch.tensor([1.0, 2.0]), torch.full((2, WORDS), 7.0), torch.tensor([1.0])
    numbers, rest = (0.5, 0.9, 0.999, 1e-8, 0.01, True, True), (0, 0, 0, 0, found_inf.data_ptr(), 0, 0)
    cuda_op.count_steps(table_of_counts(cuda_op, counts), out.data_ptr(), numbers, False, *rest)
    cuda_step(cuda_op, ours, False, [], device_scalars=out.data_ptr(), found_inf=found_inf.data_ptr())
    assert counts.tolist() == [1, 2]
    assert out.eq(7).all()
    assert_same_bits(ours, before)


def test_more_step_counts_than_one_launch_holds(cuda_op):
    counts, out = torch.zeros(10_000), torch.zeros(10_000, WORDS)
    numbers = (0.5, 0.9, 0.999, 1e-8, 0.0, True, True)
    cuda_op.count_steps(table_of_counts(cuda_op, counts), out.data_ptr(), numbers, False, 0, 0, 0, 0, 0, 0, 0)
    assert counts.eq(1).all()
    assert out.eq(out[0]).all()
    assert out[0, 1] == torch.tensor(0.9)


def test_errors_name_the_launch_the_tensor_and_the_device(cuda_op, monkeypatch):
    t = Tensors([10, 20], (torch.float32,) * 3)
    before = t.clone()
    scalars = [hyper().scalars(1)]
    with pytest.raises(RuntimeError, match="choosing device 7: CUDA error"):
        cuda_step(cuda_op, t, False, scalars, device=7)
    monkeypatch.setenv("EMULATED_CUDA_ERROR", "1")
    with pytest.raises(
        RuntimeError, match=r"fused_adam: launch 1 of 1 \(2 tensors from tensor 0 on, device 1\): CUDA error"
    ):
        cuda_step(cuda_op, t, False, scalars, device=1)
    with pytest.raises(ValueError, match="tensor 0: no kernel for these dtypes of param, grad, state and master"):
        wrong = Tensors([10], (torch.bfloat16, torch.bfloat16, torch.float32))
        wrong.dtypes = (torch.bfloat16, torch.float16, torch.float32)
        cuda_step(cuda_op, wrong, False, scalars)
    with pytest.raises(ValueError, match="scalars has 1 rows, expected 2, one for each of the table's steps"):
        cuda_step(cuda_op, t, False, scalars, steps=[1, 2])
    assert_same_bits(t, before)


@settings(max_examples=200, deadline=None)
@given(
    tensors=st.lists(st.tuples(st.integers(0, 100) | st.integers(0, 10_000), st.integers(0, 3)), max_size=60),
    most_tensors=st.integers(1, 9),
    chunk=st.integers(1, 300),
    most_blocks=st.integers(10_000, 12_000),
)
def test_every_element_is_in_one_launch(launch_plan, tensors, most_tensors, chunk, most_blocks):
    covered = {}
    for kind, indices, first_block in launch_plan.plan_launches(tensors, most_tensors, chunk, most_blocks):
        assert 1 <= len(indices) <= most_tensors
        assert first_block[0] == 0
        assert first_block[-1] <= most_blocks
        for i, begin, end in zip(indices, first_block[:-1], first_block[1:], strict=True):
            assert tensors[i][1] == kind
            assert i not in covered
            covered[i] = (end - begin) * chunk
    for i, (numel, _) in enumerate(tensors):
        assert numel <= covered.get(i, 0) < numel + chunk or (numel == 0 and i not in covered)


def test_a_tensor_too_large_for_a_launch_is_an_error(launch_plan):
    with pytest.raises(ValueError, match="tensor 1 has 101 elements, which is more than one launch can cover"):
        launch_plan.plan_launches([(100, 0), (101, 0)], 9, 10, 10)


def test_no_access_is_out_of_range(cpu_adam):
    """The address sanitizer watches a run in a process of its own, in which each array is a block of its own."""
    asan = cuda_emulation.asan_library()
    if not asan:
        pytest.skip("the compiler has no address sanitizer")
    module = cuda_emulation.build_op("-fsanitize=address,undefined", "-fno-sanitize=vptr")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "cuda_check.py"), str(module), cpu_adam.__file__],
        env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
        | {"UBSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout

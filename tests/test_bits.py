"""The same bits on every SIMD target, for any number of threads and any way of cutting tensors; and the right bits."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_check import table_of
from reference import exact, float64, narrow_average, widen

from adamops import op_builder
from adamops.ops.adam.adam import AdamRule, adam_settings
from adamops.optim.rule import integer_power
from adamops.optim.state.average_rounding import store_rounded

MODULE = op_builder.get("cpu_adam").load()
TARGETS = MODULE.supported_targets()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODE = {name: code for code, name in enumerate(DTYPES)}
COMBINATIONS = [("float32",) * 3] + [
    (p, g, s) for p in ("bfloat16", "float16") for g in (p, "float32") for s in (p, "float32")
]
# Those of the kernel in blocks: of other dtypes than the param's, in which only 8-bit states and these are new ones.
BLOCK_COMBINATIONS = [("float32", "float32", "bfloat16")] + [
    ("float16", grad, "bfloat16") for grad in ("float16", "float32")
]
NAMES = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MODES = list(itertools.product((False, True), (False, True)))  # l2, amsgrad


def draw(size, dtype, decades=12, positive=False):
    """Random values over many decades, with zeros, subnormals and, for a few, infinities."""
    x = torch.randn(size, dtype=torch.float64) * 10.0 ** (torch.rand(size) * decades - decades * 0.8)
    special = torch.tensor([0.0, -0.0, 1e-40, -2e-44, 6e-8, -1e-7, 65504.0])
    x = torch.where(torch.rand(size) < 0.05, special[torch.randint(len(special), (size,))].double(), x)
    return (x.abs() if positive else x).to(DTYPES[dtype])


class Case:
    """One tensor with its grad and states, and the mode of the step."""

    def __init__(self, size, dtypes, l2=False, amsgrad=False, maximize=False, step=3):
        self.dtypes, self.l2, self.amsgrad, self.size, self.step = dtypes, l2, amsgrad, size, step
        param, grad, state = dtypes
        self.data = [
            draw(size, param),
            draw(size, grad),
            draw(size, state),
            draw(size, state, decades=20, positive=True),
            draw(size, state, decades=20, positive=True),
        ]
        hyper = adam_settings(1e-3, 0.9, 0.999, 1e-8, 0.01, True, not l2, amsgrad, maximize=maximize)
        self.scalars = hyper.scalars(step)

    def run(self, target, threads=1, cuts=(), offset=0):
        """New (param, exp_avg, exp_avg_sq, max_exp_avg_sq) after a step on copies, cut into views at `cuts`."""
        MODULE.use_target(target)
        copies = []
        for x in self.data:
            room = torch.empty(self.size + offset, dtype=x.dtype)
            room[offset:].copy_(x)
            copies.append(room[offset:])
        edges = [0, *sorted(cuts), self.size]
        pieces = [list(x.tensor_split(edges[1:-1])) for x in copies]
        columns = [[piece.data_ptr() for piece in column] for column in pieces]
        count = len(edges) - 1
        numels = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        columns = [*columns[:4], columns[4] if self.amsgrad else None]
        table = table_of(MODULE, columns, numels, [CODE[d] for d in self.dtypes], [self.step] * count)
        assert len(table) == count
        MODULE.step_with_scalars(table, [self.scalars], int(self.l2), threads)
        assert torch.equal(copies[1].nan_to_num(), self.data[1].nan_to_num()), "the grad was written to"
        return [copies[0], *copies[2:]]

    def stored(self):
        return [x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in self.data]

    def expected_bits(self):
        """The same of the reference as they are stored."""
        param, _, state = self.dtypes
        expected = [
            torch.from_numpy(narrow_average(x, kind, name, self.step)).view(DTYPES[kind])
            for x, name, kind in zip(self.expected(exact), NAMES, (param, state, state, state), strict=True)
        ]
        return expected if self.amsgrad else [*expected[:3], self.data[4]]

    def expected(self, rule):
        """New (param, exp_avg, exp_avg_sq, max_exp_avg_sq) of the reference, unrounded (float32 or float64)."""
        param, grad, state = self.dtypes
        kinds = (param, grad, state, state, state)
        p, g, m, v, max_v = (widen(x, kind) for x, kind in zip(self.stored(), kinds, strict=True))
        return rule(p, g, m, v, max_v, self.scalars, self.l2, self.amsgrad)


def bits(x):
    """The bits of a tensor as a tensor of ints, with one and the same NaN."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(ours, theirs, context):
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        wrong = (bits(a) != bits(b)).nonzero().flatten().tolist()
        assert not wrong, f"{context}: {name} differs at {wrong[:5]} of {len(a)}: {a[wrong[:5]]} and {b[wrong[:5]]}"


@pytest.fixture(autouse=True)
def restore(cpu_adam):
    return cpu_adam


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", COMBINATIONS + BLOCK_COMBINATIONS, ids="-".join)
@pytest.mark.parametrize(("l2", "amsgrad"), MODES)
def test_every_target_gives_the_bits_of_the_rule(target, dtypes, l2, amsgrad):
    step = int(torch.randint(1, 2**20, ()))
    case = Case(20_000, dtypes, l2, amsgrad, maximize=bool(torch.rand(1) < 0.5), step=step)
    assert_same_bits(case.run(target), case.expected_bits(), f"{target} against the reference, step {step}")


@pytest.mark.parametrize("dtypes", COMBINATIONS + BLOCK_COMBINATIONS, ids="-".join)
def test_tails_of_every_length(dtypes):
    for size in range(131):
        case = Case(size, dtypes, l2=size % 2 == 1, amsgrad=size % 3 == 1)
        whole = case.run(TARGETS[0])
        for target in TARGETS[1:]:
            assert_same_bits(case.run(target), whole, f"{target}, {size} elements")
        alone = case.run(TARGETS[0], cuts=range(1, size))
        assert_same_bits(alone, whole, f"each of {size} elements by itself")


@pytest.mark.smoke
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", range(1, 9))
def test_every_number_of_threads(target, threads):
    combinations = COMBINATIONS + BLOCK_COMBINATIONS
    case = Case(150_001, combinations[threads % len(combinations)], amsgrad=threads % 2 == 0)
    assert_same_bits(case.run(target, threads), case.run(TARGETS[0]), f"{target} on {threads} threads")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_way_of_cutting(data):
    size = data.draw(st.integers(0, 70_000), "size")
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    dtypes = data.draw(st.sampled_from(COMBINATIONS + BLOCK_COMBINATIONS), "dtypes")
    l2, amsgrad = data.draw(st.sampled_from(MODES), "mode")
    cuts = data.draw(st.lists(st.integers(0, size), max_size=40), "cuts")
    case = Case(size, dtypes, l2, amsgrad)
    whole = case.run(TARGETS[0])
    cut = case.run(
        data.draw(st.sampled_from(TARGETS), "target"),
        threads=data.draw(st.integers(1, 8), "threads"),
        cuts=cuts,
        offset=data.draw(st.integers(0, 40), "offset"),
    )
    assert_same_bits(cut, whole, "cut")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_all_16_bit_values_survive_widening_and_narrowing(target, name):
    """With lr = 0 and no decay a param goes through the kernel unchanged, so all 65536 values must come back."""
    case = Case(2**16, (name,) * 3)
    case.data[0] = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[name])
    case.scalars = adam_settings(0.0, 0.9, 0.999, 1e-8, 0.0).scalars(1)
    case.data[1:] = [torch.ones_like(x) for x in case.data[1:]]
    before = case.data[0]
    after = case.run(target)[0]
    # -0 * 1 / d is -0 in -lr * m / d: adding it to +0 gives +0, so nothing changes but the payload of NaNs.
    assert torch.equal(bits(after), bits(before))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrowing_rounds_ties_to_even(target, name):
    """With a denominator of 1 and a param of 0 the new param is the fp32 grad itself, as any fp32 value is rounded."""
    patterns = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    half_ulp = 0x8000 if name == "bfloat16" else 0x1000
    ties = (patterns // (2 * half_ulp)) * (2 * half_ulp) + half_ulp
    grads = torch.cat([patterns, ties, ties + 1, ties - 1]).view(torch.float32)
    grads = torch.cat(
        [grads, torch.tensor([65504.0, 65519.99, 65520.0, -65520.0, 2**-24, 2**-25, 1.5 * 2**-25, 3.4e38])]
    )
    grads = grads[~grads.isinf()]
    case = Case(len(grads), (name, "float32", "float32"))
    case.data = [torch.zeros_like(x) for x in case.data]
    case.data[1] = grads
    case.scalars = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)  # exp_avg is the grad, exp_avg_sq 0, eps 1
    param = case.run(target)[0]
    zero = torch.tensor(0.0)  # fma(0, 0, grad) turns a grad of -0 into +0
    assert torch.equal(bits(param), bits(torch.where(grads == 0, zero, grads).to(DTYPES[name])))


AVERAGES_OF_BFLOAT16 = [d for d in COMBINATIONS + BLOCK_COMBINATIONS if d[2] == "bfloat16"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", AVERAGES_OF_BFLOAT16, ids="-".join)
def test_bfloat16_averages_are_rounded_away_from_zero_as_often_as_they_should(target, dtypes):
    """Over the period of the noise, 65536 steps, of which every 128th is taken: as often as the lower half says."""
    steps = range(0, 65536, 128)
    case = Case(64, dtypes)
    exact_bits = [torch.from_numpy(x.view(np.int32)) for x in case.expected(exact)[1:3]]
    times_up = [torch.zeros(64, dtype=torch.int64) for _ in exact_bits]
    for case.step in steps:
        for up, stored, fp32 in zip(times_up, case.run(target)[1:3], exact_bits, strict=True):
            up += (stored.view(torch.int16).int() & 0xFFFF) - (fp32 >> 16 & 0xFFFF)
    for name, up, fp32 in zip(NAMES[1:3], times_up, exact_bits, strict=True):
        error = (up - (fp32 & 0xFFFF) * len(steps) / 65536).abs()
        if name == "exp_avg_sq":
            error[fp32 < 0x10000] = 0.0  # these do not become zero: see below
        assert (error <= 3).all(), f"{name}: {error.max()}"


@pytest.mark.parametrize("state", AdamRule.states, ids=NAMES[1:])
def test_averages_in_torch_calls_are_stored_with_the_same_bits(state):
    name = state.name
    x = torch.cat([torch.randint(-(2**31), 2**31, (50_000,)).int().view(torch.float32), draw(50_000, "float32")])
    x = x.abs() if name != "exp_avg" else x
    for step in (1, 2, 77, 65535, 65536, 2**31 + 5):
        expected = torch.from_numpy(narrow_average(x.numpy(), "bfloat16", name, step)).view(torch.bfloat16)
        stored = torch.empty_like(x, dtype=torch.bfloat16)
        store_rounded(stored, state, x, step)
        assert torch.equal(bits(stored), bits(expected))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", AVERAGES_OF_BFLOAT16, ids="-".join)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_squares_in_bfloat16_become_zero_only_where_they_are(target, dtypes, amsgrad):
    """With eps = 0 a square that is rounded to zero makes the param infinite."""
    case = Case(1000, dtypes, amsgrad=amsgrad)
    case.data = [torch.zeros_like(x) for x in case.data]
    case.data[3] = torch.tensor([0.0, 2.0**-133, 2.0**-132, 1e-30]).repeat(250).to(case.data[3].dtype)
    case.scalars = adam_settings(0.0, 0.9, 0.9, 1e-8, 0.0, amsgrad=amsgrad).scalars(1)
    was_zero = case.data[3] == 0
    for case.step in range(1, 200):
        exp_avg_sq = case.run(target)[2]
        assert torch.equal(exp_avg_sq == 0, was_zero), f"step {case.step}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", AVERAGES_OF_BFLOAT16, ids="-".join)
def test_the_largest_square_in_bfloat16_does_not_grow_by_rounding(target, dtypes):
    """exp_avg_sq stays a little above max_exp_avg_sq, by less than half of its last place, for many steps."""
    case = Case(1000, dtypes, amsgrad=True)
    case.data = [torch.zeros_like(x) for x in case.data]
    case.data[3], case.data[4] = torch.ones_like(case.data[3]), torch.ones_like(case.data[4])
    case.scalars = (1.0, 0.9, 0.1, 1.0 + 2.0**-9, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)  # exp_avg_sq becomes 1 + 2**-9
    for case.step in range(1, 200):
        case.data[4] = case.run(target)[3]
        assert (case.data[4] == 1.0).all(), f"step {case.step}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", COMBINATIONS + BLOCK_COMBINATIONS, ids="-".join)
def test_nan_and_inf_stay_with_their_elements(target, dtypes):
    case = Case(1000, dtypes, amsgrad=True)
    clean = case.run(target)
    for index, value in ((5, float("nan")), (100, float("inf")), (999, float("-inf"))):
        case.data[1][index] = value
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = case.run(target)
    assert param[[5, 100, 999]].isnan().all()
    assert exp_avg[5].isnan() and exp_avg_sq[5].isnan() and max_exp_avg_sq[5].isnan()
    assert exp_avg[100] == float("inf") and exp_avg[999] == float("-inf")
    assert (exp_avg_sq[[100, 999]] == float("inf")).all()
    others = torch.ones(1000, dtype=torch.bool)
    others[[5, 100, 999]] = False
    assert_same_bits(
        [x[others] for x in (param, exp_avg, exp_avg_sq, max_exp_avg_sq)], [x[others] for x in clean], "rest"
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", [d for d in COMBINATIONS if d[0] != d[2]], ids="-".join)
def test_every_nan_of_fp32_states_survives_rounding(target, dtypes):
    """Were a bit added to the largest of them, it would become a zero."""
    case = Case(1000, dtypes)
    clean = case.run(target)[0]
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FFF8001, -0x7FFF, 0x7FC08001, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    places = torch.randperm(1000)[: len(nans)]
    case.data[2][places] = nans.view(torch.float32)
    param = case.run(target)[0]
    assert param[places].isnan().all()
    clean[places] = float("nan")
    assert torch.equal(bits(param), bits(clean))


def test_results_do_not_depend_on_flush_denormal():
    case = Case(30_000, ("float32",) * 3)
    expected = case.run(TARGETS[0])
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormals on this CPU")
    try:
        for threads in (1, 4):
            assert_same_bits(case.run(TARGETS[0], threads), expected, f"with flushing, {threads} threads")
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0, "the caller's setting was not put back"
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("l2", "amsgrad"), MODES)
def test_error_bound_against_float64(l2, amsgrad):
    """The bound that docs/numerics.md states, in units of u = 2**-24, half an ulp of 1."""
    u = 2.0**-24
    case = Case(200_000, ("float32",) * 3, l2, amsgrad)
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)
    for i, scale in enumerate((1.0, 1e-2, 1e-2, 1e-4, 1e-4)):
        case.data[i] = torch.randn(case.size, generator=generator) * scale
    case.data[3], case.data[4] = case.data[3].abs(), case.data[4].abs()
    param, exp_avg, exp_avg_sq, _ = (x.numpy().astype(np.float64) for x in case.run(TARGETS[0]))
    p, m, v, _ = case.expected(float64)
    old_p, grad, old_m, old_v, _ = (x.numpy().astype(np.float64) for x in case.data)
    l2_share = np.abs(case.scalars[9] * old_p) if l2 else 0.0
    g = np.abs(grad) + l2_share
    assert np.all(np.abs(exp_avg - m) <= 4 * u * (0.9 * np.abs(old_m) + 0.1 * g))
    assert np.all(np.abs(exp_avg_sq - v) <= 6 * u * (old_v + 0.001 * g * g))
    step_size = np.abs(p - old_p * case.scalars[8])
    worst_m = 4 * u * (0.9 * np.abs(old_m) + 0.1 * g) / np.maximum(np.abs(m), 1e-300)
    assert np.all(np.abs(param - p) <= 2 * u * np.abs(p) + u * np.abs(old_p) + (12 * u + worst_m) * step_size)


@pytest.mark.parametrize("exponent", [1, 2, 3, 10, 1000, 123_457, 10**6])
@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_integer_power_is_near_the_true_power(base, exponent):
    true = base**exponent
    assert abs(integer_power(base, exponent) - true) <= exponent * 2.0**-52 * true + 1e-300

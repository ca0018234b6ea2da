"""What DeepSpeed's own tests ask of cpu_adam, adamw and fused_adam, of our classes and of DeepSpeed's on our ops."""

import copy
import functools
import os

import pytest
import torch

os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

import cpuinfo
from deepspeed.ops.adam import DeepSpeedCPUAdam as DeepSpeedsCPUAdam
from deepspeed.ops.adam import FusedAdam as DeepSpeedsFusedAdam
from frameworks.processes import run_on_ranks

import adamops
from adamops.deepspeed import patch

pytestmark = pytest.mark.frameworks

KINDS = {
    "adamops": (adamops.DeepSpeedCPUAdam, adamops.FusedAdam),
    "DeepSpeed on our ops": (DeepSpeedsCPUAdam, DeepSpeedsFusedAdam),
}
get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # takes seconds, and each DeepSpeedCPUAdam of DeepSpeed asks


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    monkeypatch.setattr(cpuinfo, "get_cpu_info", get_cpu_info)
    with patch(shm_comm=True):
        yield


@pytest.fixture(params=list(KINDS))
def CPUAdam(request):  # noqa: N802
    return KINDS[request.param][0]


@pytest.fixture(params=list(KINDS))
def FusedAdam(request):  # noqa: N802
    return KINDS[request.param][1]


def new_params(sizes=(1, 22, 64, 1023, 4097), dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]


def twins(params, dtype=None):
    return [torch.nn.Parameter(param.detach().clone().to(dtype or param.dtype)) for param in params]


def set_grads(*lists):
    """The same random grads for all, rounded as the first of each has it."""
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape).to(params[0].dtype)
        for param in params:
            param.grad = grad.clone().to(param.dtype)


def assert_near(params, expected, rtol=2e-6, atol=2e-7):
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


# DeepSpeedCPUAdam --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("adamw_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_float32_params_go_the_way_of_torch(CPUAdam, adamw_mode, reference, weight_decay):
    params = new_params()
    expected = twins(params)
    optimizer = CPUAdam(params, lr=1e-2, weight_decay=weight_decay, adamw_mode=adamw_mode)
    peer = reference(expected, lr=1e-2, weight_decay=weight_decay)
    for _ in range(10):
        set_grads(params, expected)
        optimizer.step()
        peer.step()
    assert_near(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_params_stay_near_a_float32_reference(CPUAdam, dtype):
    steps, params = 10, new_params(dtype=dtype)
    reference = twins(params, torch.float32)
    optimizer = CPUAdam(params, lr=1e-3)
    peer = torch.optim.AdamW(reference, lr=1e-3, weight_decay=0)
    for _ in range(steps):
        set_grads(params, reference)
        optimizer.step()
        peer.step()
    for param, wide in zip(params, reference, strict=True):
        # Each step rounds to the nearest: half a unit of the last place, which is eps times the binade at most.
        unit = torch.finfo(dtype).eps * (wide.detach().abs() + 1e-2 * steps)
        assert ((param.detach().float() - wide.detach()).abs() <= steps * unit / 2).all()


def with_deepspeeds_float16_states(optimizer):
    """The optimizer before its first step, with states of float16 for params of float16, as DeepSpeed makes them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.dtype == torch.float16:
                averages = {key: torch.zeros_like(param.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[param] = {"step": 0, **averages}
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_states", [True, False])
def test_states_are_float32_or_of_16_bits(CPUAdam, dtype, fp32_states):
    """DeepSpeed's have the param's dtype, ours are bfloat16 for float16 params too."""
    (param,) = params = new_params([70], dtype)
    optimizer = CPUAdam(params, fp32_optimizer_states=fp32_states)
    set_grads(params)
    optimizer.step()
    expected = torch.float32 if fp32_states else dtype
    if expected == torch.float16 and CPUAdam is adamops.DeepSpeedCPUAdam:
        expected = torch.bfloat16
    assert {optimizer.state[param][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {expected}
    assert optimizer.state[param]["exp_avg"].any() and optimizer.state[param]["exp_avg_sq"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_states", [True, False])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_both_classes_have_the_same_bits(dtype, fp32_states, adamw_mode):
    params = new_params(dtype=dtype)
    others = twins(params)
    settings = {"lr": 3e-3, "weight_decay": 0.05, "adamw_mode": adamw_mode, "fp32_optimizer_states": fp32_states}
    ours, theirs = adamops.DeepSpeedCPUAdam(params, **settings), DeepSpeedsCPUAdam(others, **settings)
    if not fp32_states:
        ours = with_deepspeeds_float16_states(ours)
    for _ in range(5):
        set_grads(params, others)
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    for a, b in zip(params, others, strict=True):
        assert ours.state[a]["step"] == theirs.state[b]["step"] == 5
        assert torch.equal(ours.state[a]["exp_avg"], theirs.state[b]["exp_avg"])
        assert torch.equal(ours.state[a]["exp_avg_sq"], theirs.state[b]["exp_avg_sq"])


def test_groups_have_settings_of_their_own(CPUAdam):
    settings = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-3, "betas": (0.8, 0.9)}, {"eps": 1e-4}]
    lists = [new_params([30, 5]) for _ in settings]
    alone = [twins(params) for params in lists]
    together = CPUAdam([{"params": params, **own} for params, own in zip(lists, settings, strict=True)])
    each = [CPUAdam(params, **own) for params, own in zip(alone, settings, strict=True)]
    for _ in range(3):
        for a, b in zip(lists, alone, strict=True):
            set_grads(a, b)
        together.step()
        for optimizer in each:
            optimizer.step()
    assert all(torch.equal(a, b) for x, y in zip(lists, alone, strict=True) for a, b in zip(x, y, strict=True))


def test_a_learning_rate_that_a_scheduler_changes_counts_from_the_next_step(CPUAdam):
    params = new_params([50])
    expected = twins(params)
    optimizer, peer = CPUAdam(params, lr=0.1), torch.optim.AdamW(expected, lr=0.1, weight_decay=0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, peer)]
    for _ in range(4):
        set_grads(params, expected)
        optimizer.step()
        peer.step()
        for schedule in schedules:
            schedule.step()
    assert_near(params, expected, rtol=1e-5, atol=1e-6)


def test_each_param_counts_its_own_steps(CPUAdam):
    first, second = params = new_params([8, 8])
    optimizer = CPUAdam(params)
    for step in range(4):
        set_grads(params)
        if step % 2:
            second.grad = None
        optimizer.step()
    late = new_params([3])
    optimizer.add_param_group({"params": late})
    set_grads(params + late)
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in (first, second, *late)] == [5, 3, 1]


def test_a_closure_gives_the_loss(CPUAdam):
    params = new_params([4])

    def closure():
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    assert CPUAdam(params).step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(params[0], before)


def test_noncontiguous_grads_are_read_in_the_order_of_the_param(CPUAdam):
    params = [torch.nn.Parameter(torch.randn(6, 7))]
    expected = twins(params)
    params[0].grad = torch.randn(7, 6).t()
    expected[0].grad = params[0].grad.contiguous()
    CPUAdam(params).step()
    CPUAdam(expected).step()
    assert torch.equal(params[0], expected[0])


def test_a_grad_of_another_dtype_is_an_error_or_used_as_it_is(CPUAdam):
    """DeepSpeed's own op takes the bytes of a float32 grad for 16-bit numbers."""
    (param,) = params = new_params([40], torch.bfloat16)
    (wide,) = twin = twins(params)
    try:
        param.grad = torch.randn(40)
    except RuntimeError:
        param.grad_dtype = None  # torch 2.10 and later let a param have a grad of another dtype only so
        param.grad = torch.randn(40)
    optimizer = CPUAdam(params)
    optimizer.step()
    wide.grad = param.grad.bfloat16()
    CPUAdam(twin).step()
    torch.testing.assert_close(param.detach(), wide.detach())
    moment = optimizer.state[param]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * param.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [0, 1], ids=["CPUAdam", "FusedAdam"])
def test_tensors_out_of_the_ordinary(kind):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((0,), (), (2, 3))]
    params.append(torch.nn.Parameter(torch.ones(4, 5).t()))
    expected = copy.deepcopy(params)
    theirs = KINDS["DeepSpeed on our ops"][kind](params, lr=torch.tensor(0.1))
    ours = adamops.DeepSpeedCPUAdam(expected, lr=0.1)
    for _ in range(2):
        for a, b in zip(params, expected, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        theirs.step()
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "dtype", "error", "message"),
    [
        ({"betas": (1.0, 0.9)}, torch.float32, ValueError, "beta"),
        ({}, torch.float64, TypeError, "float64.*use float32, bfloat16 or float16"),
    ],
    ids=["betas", "dtype"],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(CPUAdam, settings, dtype, error, message):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(error, match=message):
        optimizer = CPUAdam([param], **settings)
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(param, torch.ones(3, dtype=dtype))


def test_a_state_of_another_shape_is_an_error(CPUAdam):
    (param,) = params = new_params([5])
    optimizer = CPUAdam(params)
    set_grads(params)
    optimizer.step()
    former = param.detach().clone()
    optimizer.state[param]["exp_avg"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(6,\)"):
        optimizer.step()
    assert torch.equal(param, former)


def test_a_param_that_is_not_in_host_memory_is_an_error(CPUAdam):
    here, there = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = CPUAdam([there, here])
    here.grad, there.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises((ValueError, AssertionError), match="meta|host memory"):
        optimizer.step()
    assert torch.equal(here, torch.ones(3))


def test_ours_writes_nothing_whatever_the_order_of_the_params():
    here, there = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = adamops.DeepSpeedCPUAdam([here, there])
    here.grad, there.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"param group 0, param 1.*not on the CPU"):
        optimizer.step()
    assert torch.equal(here, torch.ones(3))


def test_amsgrad_works_here_and_is_refused_by_deepspeeds_class():
    params = new_params([9])
    expected = twins(params)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        DeepSpeedsCPUAdam(twins(params), amsgrad=True)
    optimizer = adamops.DeepSpeedCPUAdam(params, amsgrad=True)
    peer = torch.optim.AdamW(expected, amsgrad=True, weight_decay=0)
    for _ in range(5):
        set_grads(params, expected)
        optimizer.step()
        peer.step()
    assert_near(params, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_goes_on_when_the_patch_is_undone():
    params = new_params([300])
    twin = twins(params)
    with patch():
        optimizer = DeepSpeedsCPUAdam(params)
    other = adamops.DeepSpeedCPUAdam(twin)
    for _ in range(3):
        set_grads(params, twin)
        optimizer.step()
        other.step()
    assert torch.equal(params[0], twin[0])


def test_two_optimizers_of_different_modes_do_not_mix():
    first, second = new_params([64]), new_params([64])
    expected = twins(first), twins(second)
    makers = (torch.optim.AdamW, torch.optim.Adam)
    pair = [DeepSpeedsCPUAdam(p, weight_decay=0.5, adamw_mode=mode) for p, mode in ((first, True), (second, False))]
    peers = [make(p, weight_decay=0.5) for make, p in zip(makers, expected, strict=True)]
    for _ in range(3):
        set_grads(first, expected[0])
        set_grads(second, expected[1])
        for optimizer in (*pair, *peers):
            optimizer.step()
    del pair[0]  # DeepSpeed's destructor tells the op
    set_grads(second, expected[1])
    pair[0].step()
    peers[1].step()
    assert_near(first, expected[0], rtol=1e-5, atol=1e-6)
    assert_near(second, expected[1], rtol=1e-5, atol=1e-6)


# Subgroups ---------------------------------------------------------------------------------------------------------


def test_subgroups_step_and_roll_back(CPUAdam):
    shards = new_params([1000, 500])
    optimizer = CPUAdam([torch.nn.Parameter(torch.zeros(1))], lr=1e-2, weight_decay=0.1)
    before = {}
    for step in range(3):
        for i, shard in enumerate(shards):
            optimizer.param_groups[0]["params"] = [shard]
            set_grads([shard])
            if step == 2:
                state = optimizer.state[i]
                before[i] = shard.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
            optimizer.step_subgroup(i)
    for i, shard in enumerate(shards):
        optimizer.param_groups[0]["params"] = [shard]
        optimizer.rollback_subgroup(i)
        state = optimizer.state[i]
        assert state["step"] == 2
        for now, former in zip((shard.detach(), state["exp_avg"], state["exp_avg_sq"]), before[i], strict=True):
            torch.testing.assert_close(now, former, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_subgroup_is_undone_to_zero(CPUAdam):
    (shard,) = params = new_params([100])
    former = shard.detach().clone()
    optimizer = CPUAdam(params)
    set_grads(params)
    optimizer.step_subgroup("a")
    optimizer.rollback_subgroup("a")
    assert optimizer.state["a"]["step"] == 0
    assert not optimizer.state["a"]["exp_avg"].any() and not optimizer.state["a"]["exp_avg_sq"].any()
    torch.testing.assert_close(shard.detach(), former, rtol=1e-6, atol=1e-7)


# FusedAdam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_fused_adam_has_the_bits_of_the_cpu_op(FusedAdam, adam_w_mode, bias_correction):
    params = new_params()
    expected = twins(params)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "bias_correction": bias_correction}
    optimizer = FusedAdam(params, adam_w_mode=adam_w_mode, **settings)
    peer = adamops.DeepSpeedCPUAdam(expected, adamw_mode=adam_w_mode, **settings)
    for _ in range(4):
        set_grads(params, expected)
        optimizer.step()
        peer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deepspeeds_fused_adam_keeps_states_in_the_params_dtype(dtype):
    params = new_params(dtype=dtype)
    expected = twins(params)
    optimizer = DeepSpeedsFusedAdam(params)
    peer = with_deepspeeds_float16_states(adamops.DeepSpeedCPUAdam(expected, fp32_optimizer_states=False))
    for _ in range(3):
        set_grads(params, expected)
        optimizer.step()
        peer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert {optimizer.state[param]["exp_avg"].dtype for param in params} == {dtype}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (DeepSpeedsFusedAdam, adamops.FusedAdam),
        (DeepSpeedsFusedAdam, adamops.DeepSpeedCPUAdam),
        (adamops.FusedAdam, DeepSpeedsFusedAdam),
        (DeepSpeedsCPUAdam, adamops.DeepSpeedCPUAdam),
        (adamops.DeepSpeedCPUAdam, DeepSpeedsCPUAdam),
    ],
    ids=lambda each: f"{each.__module__.split('.')[0]}-{each.__name__}",
)
def test_a_state_dict_continues(source, target):
    params = new_params()
    first = source(params, lr=1e-2)
    for _ in range(4):
        set_grads(params)
        first.step()
    resumed = twins(params)
    second = target(resumed, lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        set_grads(params, resumed)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def _engine_and_in_backward(rank, world_size):
    from frameworks.deepspeed_training import quiet_deepspeed

    deepspeed = quiet_deepspeed()
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}

    def engine_of(model, optimizer):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    model = torch.nn.Linear(8, 8)
    optimizer = adamops.FusedAdam(model.parameters())
    handle = adamops.step_in_backward(model, optimizer)
    engine = engine_of(model, optimizer)
    with pytest.raises(RuntimeError, match="cannot be used with DeepSpeedEngine, which averages grads over processes"):
        engine.backward(engine(torch.ones(4, 8)).sum())
    assert not optimizer.state
    handle.remove()
    for given in (engine, model):
        with pytest.raises(RuntimeError, match="cannot be used with DeepSpeedEngine, which averages grads"):
            adamops.step_in_backward(given, optimizer)


def test_steps_in_backward_are_refused_under_the_engine():
    """It averages grads over processes after the backward pass."""
    run_on_ranks(_engine_and_in_backward, 2)

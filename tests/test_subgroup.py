"""step_subgroup() and rollback_subgroup(), by which ZeRO-3 and SuperOffload lend shards to the optimizer."""

import copy
import os
import signal

import pytest
import torch

from adamops import DeepSpeedCPUAdam
from adamops.ops.adam import rollback

U = 2.0**-24  # half an ulp of 1 in float32


def shards(count, size=1000):
    return [torch.nn.Parameter(torch.randn(size)) for _ in range(count)]


def test_subgroups_step_like_params_of_their_own():
    ours = shards(3)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    lender = DeepSpeedCPUAdam(ours, weight_decay=0.1)
    direct = DeepSpeedCPUAdam(theirs, weight_decay=0.1)
    for _ in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            b.grad = torch.randn_like(b)
            lender.param_groups[0]["params"] = [a]
            a.grad = b.grad.clone()
            lender.step_subgroup(i)
            a.grad = None
        direct.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [lender.state[i]["step"] for i in range(3)] == [3, 3, 3]


@pytest.mark.smoke
def test_random_bits_do_not_depend_on_how_tensors_are_read():
    values, grad = torch.randn(3000).bfloat16(), torch.randn(3000).bfloat16()
    results = []
    for has_reader in (True, False):
        param = torch.nn.Parameter(values.clone())
        optimizer = DeepSpeedCPUAdam([param], stochastic_rounding=True, stochastic_rounding_seed=5)
        if not has_reader:
            (backend,) = optimizer._backends.values()
            backend._reader = None
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step_subgroup(3)
        results.append(param.detach())
    assert torch.equal(*results)


def stepped(steps, adamw_mode=True, amsgrad=False, weight_decay=0.1, dtype=torch.float32, betas=(0.9, 0.999)):
    """An optimizer after some steps of a subgroup, with the param and state from before the last one."""
    param = torch.nn.Parameter(torch.randn(5000).to(dtype))
    optimizer = DeepSpeedCPUAdam(
        [param], lr=0.01, betas=betas, weight_decay=weight_decay, adamw_mode=adamw_mode, amsgrad=amsgrad
    )
    for _ in range(steps):
        state = optimizer.state.get(7, {})
        former = param.detach().clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
        param.grad = torch.randn_like(param)
        optimizer.step_subgroup(7)
    return optimizer, param, former


@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_rollback_comes_within_the_stated_bounds(adamw_mode, steps):
    weight_decay = 0.1 if adamw_mode else 0.0
    optimizer, param, (former, old) = stepped(steps, adamw_mode, weight_decay=weight_decay)
    after = param.detach().clone().double()
    grad = param.grad.double()
    optimizer.rollback_subgroup(7)
    state = optimizer.state[7]
    assert state["step"] == steps - 1
    error = (param.double() - former.double()).abs()
    assert (error <= 4 * U * (former.abs() + (former.double() - after).abs()) / (1 - 0.01 * weight_decay)).all()
    if steps == 1:
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        return
    m, v = old["exp_avg"].double(), old["exp_avg_sq"].double()
    assert ((state["exp_avg"] - m).abs() <= 4 * U * torch.maximum(m.abs(), grad.abs()) / 0.9).all()
    assert ((state["exp_avg_sq"] - v).abs() <= 4 * U * torch.maximum(v, grad**2) / 0.999).all()
    assert (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rollback_of_16_bit_params(dtype):
    optimizer, param, (former, _) = stepped(3, dtype=dtype)
    optimizer.rollback_subgroup(7)
    ulp = torch.finfo(dtype).eps * former.float().abs().clamp(min=0.02)
    assert ((param.float() - former.float()).abs() <= ulp).all()


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_rollback_of_bfloat16_states_comes_within_the_stated_bounds(steps):
    """They are rounded with noise, by an ulp at most where rounding to the nearest is wrong by half of one."""
    u = 2.0**-8
    param = torch.nn.Parameter(torch.randn(5000))
    optimizer = DeepSpeedCPUAdam([param], lr=0.01, state_dtype=torch.bfloat16)
    for _ in range(steps):
        former = param.detach().clone()
        old = {key: value.clone() for key, value in optimizer.state[7].items() if torch.is_tensor(value)}
        param.grad = torch.randn_like(param)
        optimizer.step_subgroup(7)
    after, grad = param.detach().clone(), param.grad
    optimizer.rollback_subgroup(7)
    state = optimizer.state[7]
    assert ((param - former).abs() <= 4 * u * (former.abs() + (former - after).abs())).all()
    if steps == 1:
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        return
    m, v = old["exp_avg"].float(), old["exp_avg_sq"].float()
    assert ((state["exp_avg"].float() - m).abs() <= 4 * u * torch.maximum(m.abs(), grad.abs()) / 0.9).all()
    assert ((state["exp_avg_sq"].float() - v).abs() <= 4 * u * torch.maximum(v, grad**2) / 0.999).all()


def test_rollback_in_l2_mode():
    optimizer, param, (former, _) = stepped(4, adamw_mode=False)
    optimizer.rollback_subgroup(7)
    torch.testing.assert_close(param.detach(), former, rtol=1e-6, atol=1e-7)


def test_rollback_of_long_and_of_strided_params():
    for param in (torch.randn(2**20 + 77), torch.randn(300, 20).t(), torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2)):
        param = torch.nn.Parameter(param)
        optimizer = DeepSpeedCPUAdam([param], lr=0.1)
        for _ in range(2):
            former = param.detach().clone()
            param.grad = torch.randn_like(param)
            optimizer.step_subgroup(0)
        optimizer.rollback_subgroup(0)
        torch.testing.assert_close(param.detach(), former, rtol=1e-6, atol=1e-6)


def test_step_again_after_rollback():
    optimizer, param, _ = stepped(3)
    after = param.detach().clone()
    optimizer.rollback_subgroup(7)
    optimizer.step_subgroup(7)
    torch.testing.assert_close(param.detach(), after, rtol=1e-6, atol=1e-7)
    assert optimizer.state[7]["step"] == 3


def test_amsgrad_rolls_back_its_first_step_only():
    optimizer, param, (former, _) = stepped(1, amsgrad=True)
    optimizer.rollback_subgroup(7)
    torch.testing.assert_close(param.detach(), former, rtol=1e-6, atol=1e-7)
    assert not optimizer.state[7]["max_exp_avg_sq"].any()
    optimizer, param, _ = stepped(2, amsgrad=True)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="Cannot roll back a step with amsgrad"):
        optimizer.rollback_subgroup(7)
    assert torch.equal(param.detach(), before)


def test_nothing_to_roll_back():
    optimizer, param, _ = stepped(2)
    with pytest.raises(RuntimeError, match="Cannot roll back subgroup 3: it was never stepped"):
        optimizer.rollback_subgroup(3)
    optimizer.rollback_subgroup(7)
    optimizer.rollback_subgroup(7)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="Cannot roll back subgroup 7: all its steps have been undone"):
        optimizer.rollback_subgroup(7)
    assert torch.equal(param.detach(), before) and optimizer.state[7]["step"] == 0


def test_a_beta_of_zero_cannot_be_rolled_back():
    optimizer, *_ = stepped(2, betas=(0.0, 0.999))
    with pytest.raises(RuntimeError, match="with a beta of 0"):
        optimizer.rollback_subgroup(7)


def test_a_subgroup_is_one_param():
    optimizer = DeepSpeedCPUAdam(params := shards(2))
    with pytest.raises(ValueError, match="0 have one"):
        optimizer.step_subgroup(0)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="a subgroup is the one param that has a grad, but 2 have one; use step"):
        optimizer.step_subgroup(0)
    assert not optimizer.state


def test_closure_of_a_subgroup():
    optimizer = DeepSpeedCPUAdam(params := shards(1))

    def closure():
        params[0].grad = torch.ones_like(params[0])
        return 42

    assert optimizer.step_subgroup(0, closure) == 42
    assert optimizer.rollback_subgroup(0, closure) == 42


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_lacks_something_cannot_be_rolled_back(key):
    optimizer, *_ = stepped(2)
    del optimizer.state[7][key]
    with pytest.raises(RuntimeError, match=f"its state has no '{key}'"):
        optimizer.rollback_subgroup(7)


@pytest.mark.parametrize("count", [torch.tensor(2), torch.tensor(2.0)])
def test_a_count_in_shared_memory_is_rolled_back_there(count):
    optimizer, *_ = stepped(2)
    optimizer.state[7]["step"] = shared = count.share_memory_()
    optimizer.rollback_subgroup(7)
    assert int(shared) == 1 and optimizer.state[7]["step"] is shared


def test_an_interrupted_rollback_is_whole():
    """A signal arrives while it writes; the handler's exception comes once it has ended."""
    optimizer, *_ = stepped(2)
    (param,) = optimizer.param_groups[0]["params"]
    twin, handler = copy.deepcopy(optimizer), signal.getsignal(signal.SIGUSR1)
    (twin_param,) = twin.param_groups[0]["params"]
    twin_param.grad = param.grad.clone()
    twin.rollback_subgroup(7)
    undo, calls = rollback._undo_piece, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        os.kill(os.getpid(), signal.SIGUSR1)
        undo(*args, **kwargs)

    def interrupt(*_):
        raise KeyboardInterrupt

    rollback._undo_piece = interrupted
    signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.rollback_subgroup(7)
    finally:
        rollback._undo_piece = undo
        signal.signal(signal.SIGUSR1, handler)
    assert calls and optimizer.state[7]["step"] == 1 and torch.equal(param, twin_param)

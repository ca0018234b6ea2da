"""Params that get another memory layout between steps, as by `model.to(memory_format=torch.channels_last)`."""

import pytest
import torch
import twins
from optimizers import HOST, MAKERS, state_tensors
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from adamops import DeepSpeedCPUAdam, FusedAdam

LAYOUTS = {
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


def started(make, settings, dtype, steps=2):
    """A param that has been updated some times, and its optimizer."""
    param = torch.nn.Parameter(torch.randn(8, 6, 5, 3).to(dtype))
    optimizer = make([param], lr=0.1, weight_decay=0.1, **settings)
    for _ in range(steps):
        twins.same_grads([param])
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_follow_a_param_into_another_memory_layout(PathAdam, states, layout):
    settings, dtype = states
    param, optimizer = started(PathAdam, settings, dtype)
    param.data = LAYOUTS[layout](param.data)
    twin = torch.nn.Parameter(param.detach().clone())
    loaded = PathAdam([twin], lr=0.1, weight_decay=0.1, **settings)
    loaded.load_state_dict(optimizer.state_dict())
    address = param.data_ptr()
    for step in range(3):
        twins.same_grads([param], [twin])
        optimizer.clip_grad_norm_(1.0)
        loaded.clip_grad_norm_(1.0)
        optimizer.step(zero_grads=step == 1)
        loaded.step(zero_grads=step == 1)
    assert param.data_ptr() == address and param.stride() == twin.stride()
    assert torch.equal(param, twin)
    ours, theirs = state_tensors(optimizer, param), state_tensors(loaded, twin)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) and value.stride() == theirs[name].stride(), name


def test_float_states_keep_their_bits_in_another_memory_layout(Adam):
    param, optimizer = started(Adam, {"amsgrad": True}, torch.float32, steps=0)
    plain = torch.nn.Parameter(param.detach().clone())
    other = Adam([plain], lr=0.1, weight_decay=0.1, amsgrad=True)
    for step in range(4):
        if step == 2:
            param.data = LAYOUTS["channels_last"](param.data)
        twins.same_grads([param], [plain])
        optimizer.step()
        other.step()
    assert torch.equal(param, plain)
    for name, value in state_tensors(optimizer, param).items():
        assert torch.equal(value, other.state[plain][name]), name


def test_as_torchs_optimizer(Adam):
    ours, theirs = twins.twin_models(lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)))
    pairs = [
        (ours, Adam(ours.parameters(), lr=1e-2)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)),
    ]
    for step in range(4):
        images = torch.randn(2, 3, 12, 12)
        for model, optimizer in pairs:
            if step == 2:
                model.to(memory_format=torch.channels_last)
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_trained_alike(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
def test_in_the_background(settings):
    param, optimizer = started(DeepSpeedCPUAdam, settings, torch.float32)
    param.data = LAYOUTS["channels_last"](param.data)
    twin = torch.nn.Parameter(param.detach().clone())
    loaded = DeepSpeedCPUAdam([twin], lr=0.1, weight_decay=0.1, **settings)
    loaded.load_state_dict(optimizer.state_dict())
    twins.same_grads([param], [twin])
    optimizer.step_async().wait()
    loaded.step()
    assert torch.equal(param, twin)


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
def test_of_dtensors(settings, mesh):
    values = torch.randn(8, 6, 5, 3)
    param = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    plain = torch.nn.Parameter(values.clone())
    ours = FusedAdam([param], lr=0.1, **settings)
    theirs = FusedAdam([plain], lr=0.1, **settings)
    for step in range(4):
        if step == 2:
            param._local_tensor = LAYOUTS["channels_last"](param._local_tensor)
            plain.data = LAYOUTS["channels_last"](plain.data)
        plain.grad = torch.randn_like(plain)
        param.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
        ours.step()
        theirs.step()
    assert torch.equal(param.to_local(), plain)
    assert isinstance(ours.state[param]["exp_avg"], DTensor)


def in_shared_memory(tensor):
    return tensor.clone().share_memory_()


def in_a_larger_tensor(tensor):
    flat = torch.cat([tensor.flatten(), torch.zeros(7, dtype=tensor.dtype)])
    return flat[: tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
@pytest.mark.parametrize("elsewhere", [in_shared_memory, in_a_larger_tensor])
def test_states_whose_memory_others_use_are_not_replaced(PathAdam, elsewhere, settings):
    param, optimizer = started(PathAdam, settings, torch.float32)
    state = optimizer.state[param]
    state["exp_avg_sq"] = kept = elsewhere(state["exp_avg_sq"])
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    before, bits = param.detach().clone(), kept.clone()
    with pytest.raises(ValueError, match="has strides .* its state 'exp_avg' has .* load_state_dict"):
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"] is kept and torch.equal(kept, bits)
    assert torch.equal(param, before) and int(state["step"]) == 2


def test_a_step_that_is_refused_leaves_the_states_as_they_were(PathAdam, states):
    settings, dtype = states
    param, optimizer = started(PathAdam, settings, dtype)
    bad = torch.nn.Parameter(torch.randn(5).to(dtype))
    optimizer.add_param_group({"params": [bad]})
    bad.grad = torch.randn(5).to(dtype)
    bad.grad.untyped_storage().resize_(0)
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    before = {name: (value, value.clone()) for name, value in state_tensors(optimizer, param).items()}
    with pytest.raises(ValueError, match="freed or shortened"):
        optimizer.step()
    after = state_tensors(optimizer, param)
    assert all(after[name] is value and torch.equal(value, bits) for name, (value, bits) in before.items())


def test_a_leftover_of_former_settings_is_left_alone(PathAdam):
    param, optimizer = started(PathAdam, {"amsgrad": True}, torch.float32)
    optimizer.param_groups[0]["amsgrad"] = False
    leftover = optimizer.state[param]["max_exp_avg_sq"]
    leftover.untyped_storage().resize_(0)
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    optimizer.step()
    state = optimizer.state[param]
    assert state["max_exp_avg_sq"] is leftover and state["exp_avg"].stride() == param.stride()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="'max_exp_avg_sq' .* freed or shortened"):
        optimizer.step()


def test_a_leftover_follows_when_it_is_needed_again(PathAdam, states):
    settings, dtype = states
    param, optimizer = started(PathAdam, {**settings, "amsgrad": True}, dtype)
    plain = torch.nn.Parameter(param.detach().clone())
    other = PathAdam([plain], lr=0.1, weight_decay=0.1, **{**settings, "amsgrad": True})
    other.load_state_dict(optimizer.state_dict())
    param.data, plain.data = (LAYOUTS["channels_last"](p.data) for p in (param, plain))
    other.load_state_dict(other.state_dict())  # brings all states into the new layout
    for amsgrad in (False, True):
        optimizer.param_groups[0]["amsgrad"] = other.param_groups[0]["amsgrad"] = amsgrad
        twins.same_grads([param], [plain])
        optimizer.step()
        other.step()
    assert torch.equal(param, plain)
    assert torch.equal(optimizer.state[param]["max_exp_avg_sq"], other.state[plain]["max_exp_avg_sq"])


def test_8_bit_states_share_scales_so_a_leftover_of_theirs_must_be_sound(PathAdam):
    param, optimizer = started(PathAdam, {"state_dtype": "8bit", "amsgrad": True}, torch.float32)
    param.data = torch.cat([param.data] * 6).clone()  # 8-bit states from 4096 elements on
    optimizer = PathAdam([param], lr=0.1, state_dtype="8bit", amsgrad=True)
    twins.same_grads([param])
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.state[param]["max_exp_avg_sq"].untyped_storage().resize_(0)
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    with pytest.raises(ValueError, match="'max_exp_avg_sq' .* freed or shortened"):
        optimizer.step()


def test_scales_in_shared_memory_are_not_replaced(PathAdam):
    param = torch.nn.Parameter(torch.randn(16, 16, 5, 4))
    optimizer = PathAdam([param], state_dtype="8bit")
    twins.same_grads([param])
    optimizer.step()
    scales = optimizer.state[param]["block_scales"].share_memory_()
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    with pytest.raises(ValueError, match="has strides .* its state 'exp_avg' has"):
        optimizer.step()
    assert optimizer.state[param]["block_scales"] is scales


def test_no_state_is_moved_while_a_graph_is_captured(cuda_op):
    """The graph would move it from its former memory at each replay."""
    param, optimizer = started(MAKERS["FusedAdam-CUDA-capturable"], {}, torch.float32)
    param.data = LAYOUTS["channels_last"](param.data)
    twins.same_grads([param])
    optimizer._backends[HOST].capturing = True
    with pytest.raises(RuntimeError, match="captur"):
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "8bit"}])
def test_a_leftover_of_a_dtensor_follows_or_stays(settings, mesh):
    values = torch.randn(16, 16, 5, 4)
    param = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    optimizer = FusedAdam([param], lr=0.1, amsgrad=True, **settings)
    for step in range(4):
        optimizer.param_groups[0]["amsgrad"] = step != 2
        if step == 2:
            param._local_tensor = LAYOUTS["channels_last"](param._local_tensor)
        param.grad = distribute_tensor(torch.randn_like(values), mesh, [Shard(0)])
        optimizer.step()
        assert {"exp_avg", "max_exp_avg_sq"} <= optimizer.state[param].keys()
        assert all(isinstance(optimizer.state[param][name], DTensor) for name in ("exp_avg", "max_exp_avg_sq"))

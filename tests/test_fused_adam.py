"""FusedAdam: what is its own. What it shares with DeepSpeedCPUAdam is the same code, tested in test_optimizer.py."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.optim.backends.cpu import NativeBackend
from adamops.optim.backends.torch import TorchBackend

SIZES = [(3, 5), (70,), (), (0,), (9, 1, 4)]


def new_params(dtype=torch.float32, seed=None):
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    return set_grads(params, generator)


def set_grads(params, generator=None, twins=()):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    for param, twin in zip(params, twins, strict=False):
        twin.grad = param.grad.clone()
    return params


def assert_equal(params, expected):
    for a, b in zip(params, expected, strict=True):
        assert torch.equal(a, b)


def test_arguments_are_those_of_deepspeed_and_apex():
    names = list(inspect.signature(FusedAdam).parameters)
    assert names[:9] == [
        *("params", "lr", "bias_correction", "betas", "eps", "adam_w_mode", "weight_decay", "amsgrad", "set_grad_none")
    ]
    defaults = [p.default for p in inspect.signature(FusedAdam).parameters.values()][1:9]
    assert defaults == [1e-3, True, (0.9, 0.999), 1e-8, True, 0.0, False, True]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_steps_have_the_bits_of_cpu_adam(dtype, adam_w_mode, amsgrad, maximize):
    ours, theirs = new_params(dtype), new_params(dtype)
    settings = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": maximize}
    a = FusedAdam(ours, adam_w_mode=adam_w_mode, **settings)
    b = DeepSpeedCPUAdam(theirs, adamw_mode=adam_w_mode, **settings)
    for _ in range(3):
        a.step()
        b.step()
    assert_equal(ours, theirs)
    assert all(a.state[param]["exp_avg"].dtype == torch.float32 for param in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", ["same", "float32"])
@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_master_weights_are_those_of_fp32_params(dtype, grad_dtype, adam_w_mode, amsgrad):
    """Params of 16 bits with masters: the trajectory of fp32 params under the widened grads, rounded once."""
    half = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in [*SIZES, (12345,)]]
    full = [torch.nn.Parameter(param.detach().float()) for param in half]
    settings = {"lr": 1e-4, "weight_decay": 0.1, "amsgrad": amsgrad, "adam_w_mode": adam_w_mode}
    ours, theirs = FusedAdam(half, master_weights=True, **settings), FusedAdam(full, **settings)
    for _ in range(5):
        for a, b in zip(half, full, strict=True):
            a.grad = torch.randn(a.shape).to(dtype)
            b.grad = a.grad.float()
            if grad_dtype == "float32":
                a.grad.data = a.grad.float()
        ours.step()
        theirs.step()
    for a, b in zip(half, full, strict=True):
        assert ours.state[a]["master_param"].dtype == torch.float32
        assert torch.equal(ours.state[a]["master_param"], b)
        assert torch.equal(a, b.to(dtype))
        assert torch.equal(ours.state[a]["exp_avg"], theirs.state[b]["exp_avg"])
    assert "master_param" not in theirs.state[full[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_too_small_for_16_bits_add_up_in_the_master(dtype):
    with_master, without = (torch.nn.Parameter(torch.ones(50, dtype=dtype)) for _ in range(2))
    optimizers = FusedAdam([with_master], lr=1e-5, master_weights=True), FusedAdam([without], lr=1e-5)
    for _ in range(1000):
        for param, optimizer in zip((with_master, without), optimizers, strict=True):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert without.eq(1).all()
    master = optimizers[0].state[with_master]["master_param"]
    torch.testing.assert_close(master, torch.full((50,), 0.99), rtol=0, atol=1000 * 2.0**-25)  # half an ulp a step
    assert torch.equal(with_master, master.to(dtype))


def test_master_weights_of_mixed_and_strided_params():
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    params = [torch.nn.Parameter(torch.randn(4, 6, 2).to(dtype).transpose(0, 1)) for dtype in dtypes]
    plain = [torch.nn.Parameter(param.detach().contiguous()) for param in params]
    ours, theirs = (FusedAdam(group, master_weights=True) for group in (params, plain))
    for _ in range(3):
        set_grads(params)
        for a, b in zip(params, plain, strict=True):
            b.grad = a.grad.contiguous()
        ours.step()
        theirs.step()
    assert_equal(params, plain)
    assert ["master_param" in ours.state[param] for param in params] == [False, True, True]
    assert ours.state[params[1]]["master_param"].stride() == params[1].stride()


def test_torch_calls_keep_masters_too():
    params, twins = new_params(torch.bfloat16), new_params(torch.bfloat16)
    compiled, fallback = FusedAdam(params, master_weights=True), FusedAdam(twins, master_weights=True)
    fallback._backends[torch.device("cpu")] = TorchBackend()
    for _ in range(5):
        set_grads(params, twins=twins)
        compiled.step()
        fallback.step()
    for a, b in zip(params, twins, strict=True):
        masters = compiled.state[a]["master_param"], fallback.state[b]["master_param"]
        torch.testing.assert_close(*masters, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, masters[1].bfloat16())


@pytest.mark.parametrize("saved_with", [True, False])
@pytest.mark.parametrize("loaded_with", [True, False])
def test_checkpoints_with_and_without_masters(saved_with, loaded_with):
    params, twin = new_params(torch.bfloat16), new_params(torch.bfloat16)
    optimizer = FusedAdam(params, master_weights=saved_with)
    optimizer.step()
    resumed = FusedAdam(twin, master_weights=loaded_with)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for a, b in zip(twin, params, strict=True):
            a.copy_(b)
    for a, b in zip(params, twin, strict=True):
        assert ("master_param" in resumed.state[b]) == (saved_with and loaded_with)
        if saved_with and loaded_with:
            assert torch.equal(resumed.state[b]["master_param"], optimizer.state[a]["master_param"])
    set_grads(params, twins=twin)
    optimizer.step()
    resumed.step()
    assert all(("master_param" in resumed.state[param]) == loaded_with for param in twin)
    if saved_with == loaded_with:
        assert_equal(params, twin)


def spoilt_dtype(state):
    state["master_param"] = state["master_param"].bfloat16()


def spoilt_shape(state):
    state["master_param"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoilt_dtype, TypeError, "param 1 .* state 'master_param' of torch.bfloat16; use torch.float32"),
        (spoilt_shape, ValueError, r"param 1 .* state 'master_param' of shape \(3,\)"),
    ],
)
def test_masters_replaced_by_the_user(spoil, error, message):
    params = new_params(torch.bfloat16)
    optimizer = FusedAdam(params, master_weights=True)
    optimizer.step()
    spoil(optimizer.state[params[1]])
    before = copy.deepcopy(params)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_equal(params, before)


@pytest.mark.parametrize("argument", ["grads", "output_params", "scale", "grad_norms"])
def test_arguments_of_old_apex_are_refused(argument):
    params = new_params()
    before = copy.deepcopy(params)
    with pytest.raises(RuntimeError, match="takes a closure only; put the grads into param.grad"):
        FusedAdam(params).step(**{argument: [1]})
    assert_equal(params, before)


def test_closure_and_hooks_run_once():
    params = new_params()
    optimizer, calls = FusedAdam(params), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        return torch.tensor(2.5)

    assert optimizer.step(closure) == 2.5
    assert calls == ["closure", "post"]


def test_zero_grad_does_as_it_was_told():
    params = new_params()
    FusedAdam(params, set_grad_none=False).zero_grad()
    assert all(param.grad.eq(0).all() for param in params)
    FusedAdam(params, set_grad_none=False).zero_grad(set_to_none=True)
    assert all(param.grad is None for param in params)
    set_grads(params)
    FusedAdam(params).zero_grad()
    assert all(param.grad is None for param in params)


def test_step_counts_are_kept_for_each_param():
    """DeepSpeed and apex correct a late param's bias by the count of its group."""
    params, expected = new_params(), new_params()
    late = params[1].grad.clone()
    optimizer, reference = FusedAdam(params, lr=0.1), torch.optim.AdamW(expected, lr=0.1, weight_decay=0)
    for step in range(3):
        params[1].grad = expected[1].grad = None if step < 2 else late
        optimizer.step()
        reference.step()
    assert [optimizer.state[param].get("step") for param in params] == [3, 1, 3, 3, 3]
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("peer", [torch.optim.AdamW, DeepSpeedCPUAdam])
def test_checkpoints_go_both_ways(peer):
    params, expected = new_params(), new_params()
    ours, theirs = FusedAdam(params, weight_decay=0.01), peer(expected, weight_decay=0.01)
    ours.step()
    theirs.step()
    for source, target, own in ((ours, peer(new_params(), lr=1), params), (theirs, FusedAdam(new_params()), expected)):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True))
        target.param_groups[0]["params"], old = own, target.param_groups[0]["params"]
        for param, former in zip(own, old, strict=True):
            target.state[param] = target.state.pop(former)
            assert int(target.state[param]["step"]) == 1
        target.step()
        assert all(int(target.state[param]["step"]) == 2 for param in own)


@pytest.mark.parametrize("in_last_state", [False, True], ids=["apex", "DeepSpeed"])
def test_loads_checkpoints_that_count_steps_by_group(in_last_state):
    """As apex' FusedAdam writes them, and as DeepSpeed's does, whose count is that of the last param."""
    params, twin = new_params(), new_params()
    optimizer = FusedAdam(params)
    for _ in range(4):
        optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    states = list(checkpoint["state"].values())
    for state in states:
        del state["step"]
        if in_last_state:
            state["step"] = 4 if state is states[-1] else 0
    checkpoint["param_groups"][0]["step"] = 0 if in_last_state else 4
    with torch.no_grad():
        for a, b in zip(twin, params, strict=True):
            a.copy_(b)
    resumed = FusedAdam(twin)
    resumed.load_state_dict(checkpoint)
    assert "step" not in resumed.param_groups[0]
    optimizer.step()
    resumed.step()
    assert_equal(twin, params)
    assert [resumed.state[param]["step"] for param in twin] == [5] * len(twin)


def test_survives_pickle_and_deepcopy():
    settings = {"set_grad_none": False, "adam_w_mode": False, "master_weights": True, "capturable": True}
    optimizer = FusedAdam(new_params(torch.float16), lr=0.5, **settings)
    optimizer.step()
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert (twin.set_grad_none, twin.adam_w_mode, twin.param_groups[0]["lr"]) == (False, False, 0.5)
        assert twin.master_weights and twin.param_groups[0]["capturable"]
        set_grads(twin.param_groups[0]["params"])
        twin.step()
        assert {state["step"] for state in twin.state.values()} == {2}


def test_a_dlpack_table_of_another_version_is_not_used(cpu_adam):
    """As a later torch may have: tensors are then read from Python."""

    class Module:
        def __getattr__(self, name):
            return getattr(cpu_adam, name)

        def TensorReader(self, *_):  # noqa: N802
            raise ValueError("this DLPack exchange table is of another version")

    params, expected = new_params(), new_params()
    ours, theirs = FusedAdam(params), FusedAdam(expected)
    ours._backends[torch.device("cpu")] = NativeBackend(Module())
    for _ in range(2):
        set_grads(params, twins=expected)
        ours.step()
        theirs.step()
    assert_equal(params, expected)

"""The optimizers as torch.optim.Optimizer: what users of torch.optim and DeepSpeed rely on, on every op."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from twins import assert_close, assert_equal, same_grads

import adamops
from adamops import CPUAdam, DeepSpeedCPUAdam, FusedAdam
from adamops.optim.backends.torch import TorchBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3,), (17, 5), (4, 3, 2, 2), (), (0,), (1, 1), (1000,)]


def new_params(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def twins(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.smoke
def test_names_of_deepspeed():
    from adamops.ops.adam import DeepSpeedCPUAdam as ByPath

    assert ByPath is DeepSpeedCPUAdam is CPUAdam is adamops.DeepSpeedCPUAdam
    optimizer = DeepSpeedCPUAdam(new_params(), 1e-3, True, (0.9, 0.999), 1e-8, 0, False, True, True)
    assert optimizer.adam_w_mode and optimizer.fp32_optimizer_states
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_torch_over_200_steps(Adam, adamw_mode, weight_decay, amsgrad, maximize):
    ours, theirs = (params := new_params()), twins(params)
    settings_ = {"lr": 1e-2, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    a = Adam(ours, adamw_mode=adamw_mode, **settings_)
    b = (torch.optim.AdamW if adamw_mode else torch.optim.Adam)(theirs, **settings_)
    for _ in range(200):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 200)


def test_without_bias_correction(Adam):
    (param,) = new_params([(100,)])
    before, grad = param.detach().clone(), torch.randn(100)
    param.grad = grad
    Adam([param], lr=0.1, bias_correction=False).step()
    torch.testing.assert_close(param.data, before - 0.1 * (0.1 * grad) / ((0.001 * grad**2).sqrt() + 1e-8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp32_states", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_state_names_and_dtypes(dtype, fp32_states, amsgrad):
    params = new_params(dtype=dtype)
    optimizer = DeepSpeedCPUAdam(params, amsgrad=amsgrad, fp32_optimizer_states=fp32_states)
    same_grads(params)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
        assert state["step"] == 1
        for key in set(state) - {"step"}:
            expected = torch.float32 if fp32_states or dtype == torch.float32 else torch.bfloat16
            assert state[key].dtype == expected
            assert state[key].shape == param.shape


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_params_follow_fp32_arithmetic(dtype):
    """A step of a 16-bit param is the step of its fp32 value, rounded once."""
    (half,) = new_params([(1000,)], dtype)
    full = torch.nn.Parameter(half.detach().float())
    same_grads([half])
    full.grad = half.grad.float()
    DeepSpeedCPUAdam([half], lr=0.1).step()
    DeepSpeedCPUAdam([full], lr=0.1).step()
    assert torch.equal(half.data, full.data.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_grads_of_16_bit_params(dtype):
    (a,) = new_params([(100,)], dtype)
    b = twins([a])[0]
    a.grad = torch.randn(100).to(dtype)
    b.grad = torch.zeros_like(b)
    b.grad.data = a.grad.float()
    assert b.grad.dtype == torch.float32
    for param in (a, b):
        DeepSpeedCPUAdam([param]).step()
    assert torch.equal(a.data, b.data)


def test_params_of_mixed_dtypes_in_one_group(Adam):
    params = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in DTYPES]
    alone = twins(params)
    same_grads(params, alone)
    Adam(params).step()
    for param in alone:
        Adam([param]).step()
    assert_equal(params, alone)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_optimizer_of_many_params_equals_many_of_one(Adam, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=8), "shapes")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    hyper = {
        "lr": data.draw(st.floats(0, 1), "lr"),
        "betas": data.draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)), "betas"),
        "eps": data.draw(st.floats(1e-12, 1e-2), "eps"),
        "weight_decay": data.draw(st.floats(0, 0.5), "weight_decay"),
        "amsgrad": data.draw(st.booleans(), "amsgrad"),
        "adamw_mode": data.draw(st.booleans(), "adamw_mode"),
        "bias_correction": data.draw(st.booleans(), "bias_correction"),
        "maximize": data.draw(st.booleans(), "maximize"),
    }
    together, alone = (params := new_params(shapes, dtype)), twins(params)
    optimizers = [Adam([param], **hyper) for param in alone]
    optimizer = Adam(together, **hyper)
    for _ in range(3):
        same_grads(together, alone)
        optimizer.step()
        for single in optimizers:
            single.step()
    assert_equal([p.nan_to_num() for p in together], [p.nan_to_num() for p in alone])


def test_groups_have_their_own_settings(Adam):
    params = new_params([(10,), (20,), (30,)])
    alone = twins(params)
    overrides = [{}, {"lr": 0.5, "weight_decay": 0.3}, {"betas": (0.5, 0.6), "amsgrad": True, "maximize": True}]
    groups = [{"params": [p], **extra} for p, extra in zip(params, overrides, strict=True)]
    together = Adam(groups, lr=0.1)
    apart = [Adam([p], **{"lr": 0.1, **extra}) for p, extra in zip(alone, overrides, strict=True)]
    for _ in range(3):
        same_grads(params, alone)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_equal(params, alone)


def test_step_counts_of_late_and_idle_params(Adam):
    """Each param's bias correction follows its own steps, not the optimizer's."""
    first, idle, late = new_params([(10,), (10,), (10,)])
    expected = twins([first, idle, late])
    ours = Adam([first, idle])
    theirs = [torch.optim.AdamW([p], weight_decay=0) for p in expected]
    for i in range(6):
        if i == 3:
            ours.add_param_group({"params": [late]})
        same_grads([first, idle, late], expected)
        if i % 2:
            idle.grad = expected[1].grad = None
        if i < 3:
            late.grad = expected[2].grad = None
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    assert [ours.state[p]["step"] for p in (first, idle, late)] == [6, 3, 3]
    assert_close([first, idle, late], expected, 6, lr=1e-3)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch takes named params since 2.6")
def test_named_params(Adam):
    model = torch.nn.Linear(3, 2)
    optimizer = Adam(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_without_any_grad_nothing_happens(Adam):
    params = new_params()
    before = twins(params)
    optimizer = Adam(params)
    optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


def test_closure(Adam):
    (param,) = new_params([(5,)])
    optimizer = Adam([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert losses[-1] < losses[0] / 10


def test_hooks(Adam):
    params = new_params()
    same_grads(params)
    optimizer, calls = Adam(params), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_hook_before_the_step_may_change_its_arguments(Adam):
    params = new_params()
    same_grads(params)
    optimizer = Adam(params)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer,), {"closure": lambda: torch.tensor(7.0)}))
    assert optimizer.step().item() == 7.0


def test_hooks_of_all_optimizers(Adam):
    params = new_params()
    same_grads(params)
    optimizer, calls = Adam(params), []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    optimizer.step()
    for hook in hooks:
        hook.remove()
    optimizer.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("flag", [True, False], ids=["torch.profiler", "from outside"])
def test_profilers_see_the_step(Adam, monkeypatch, flag):
    params = new_params()
    same_grads(params)
    optimizer = Adam(params)
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        monkeypatch.setattr(torch.autograd.profiler, "_is_profiler_enabled", flag)
        optimizer.step()
    assert [event.count for event in profile.key_averages() if event.key == name] == [1]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_schedulers(Adam, tensor_lr):
    ours, theirs = (params := new_params()), twins(params)
    pairs = []
    for cls, ps in ((Adam, ours), (torch.optim.AdamW, theirs)):
        optimizer = cls(ps, lr=torch.tensor(1e-2) if tensor_lr else 1e-2, weight_decay=0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
        pairs.append((optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [5])))
    for _ in range(20):
        same_grads(ours, theirs)
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    assert_close(ours, theirs, 20)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "permuted"])
def test_dense_strided_params_are_updated_in_place(Adam, layout):
    base = torch.randn(4, 6, 5, 3)
    strided = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.view(24, 15).t(),
        "permuted": base.permute(2, 0, 3, 1),
    }[layout]
    param = torch.nn.Parameter(strided)
    assert not param.is_contiguous()
    plain = torch.nn.Parameter(strided.detach().clone(memory_format=torch.contiguous_format))
    address = param.data_ptr()
    ours, theirs = Adam([param], amsgrad=True), Adam([plain], amsgrad=True)
    for i in range(4):
        grad = torch.randn_like(plain)
        plain.grad = grad
        param.grad = grad.clone(memory_format=torch.preserve_format) if i % 2 else torch.empty_like(param).copy_(grad)
        ours.step()
        theirs.step()
    assert param.data_ptr() == address
    assert ours.state[param]["exp_avg"].stride() == param.stride()
    assert torch.equal(param, plain)
    restored = torch.nn.Parameter(torch.empty_like(param).copy_(param))
    again = Adam([restored], amsgrad=True)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))  # contiguous states for a strided param
    restored.grad = plain.grad = torch.randn_like(plain)
    again.step()
    theirs.step()
    assert torch.equal(restored, plain)


def train(optimizer, params, steps=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp32_states", [True, False])
def test_resumes_from_its_own_checkpoint_bit_for_bit(dtype, fp32_states):
    params = new_params(dtype=dtype)
    optimizer = DeepSpeedCPUAdam(params, amsgrad=True, fp32_optimizer_states=fp32_states)
    train(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    restored = twins(params)
    again = DeepSpeedCPUAdam(restored, lr=7, amsgrad=True, fp32_optimizer_states=fp32_states)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, seed=1)
    train(again, restored, seed=1)
    assert_equal(params, restored)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_resumes_from_torch_checkpoint_and_back(Adam, cls, amsgrad, fused):
    theirs = new_params()
    torch_optimizer = cls(theirs, lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, fused=fused)
    train(torch_optimizer, theirs)
    ours = twins(theirs)
    optimizer = Adam(ours, amsgrad=amsgrad, adamw_mode=cls is torch.optim.AdamW)
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    assert all(optimizer.state[p]["step"] == 5 and type(optimizer.state[p]["step"]) is int for p in ours)
    assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.param_groups[0]["weight_decay"] == 0.1
    for seed in (1, 2):
        train(torch_optimizer, theirs, seed=seed)
        train(optimizer, ours, seed=seed)
        assert_close(ours, theirs, 5 * seed)
        if seed == 1:
            back = twins(ours)
            other = cls(back, lr=3.0)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, back, seed=2)
    assert_close(back, theirs, 10)


def test_loads_a_deepspeed_checkpoint(Adam):
    """The layout of Adam 0.19: int steps, and groups with neither maximize nor adamw_mode."""
    params = new_params([(4,), (2, 3)])
    state = {
        i: {"step": 7, "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)} for i, p in enumerate(params)
    }
    group = {
        "lr": 0.25,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.5,
        "bias_correction": True,
        "amsgrad": False,
    }
    optimizer = Adam(params)
    optimizer.load_state_dict({"state": state, "param_groups": [{**group, "params": [0, 1]}]})
    expected = twins(params)
    reference = torch.optim.AdamW(expected, lr=0.25, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    reference.load_state_dict(
        {
            "state": {i: {**copy.deepcopy(s), "step": torch.tensor(7.0)} for i, s in state.items()},
            "param_groups": [{**reference.state_dict()["param_groups"][0]}],
        }
    )
    same_grads(params, expected)
    optimizer.step()
    reference.step()
    assert_close(params, expected, 1, lr=2.5)  # random averages make updates of several lr


def test_loading_keeps_fp32_states_of_16_bit_params():
    """Optimizer.load_state_dict casts states to the dtype of their param; that would lose 16 of their bits."""
    (param,) = new_params([(100,)], torch.bfloat16)
    optimizer = DeepSpeedCPUAdam([param])
    train(optimizer, [param])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"])
    assert state["exp_avg"].bfloat16().float().ne(state["exp_avg"]).any()


def test_load_state_dict_hooks_see_plain_state(Adam):
    params = new_params()
    optimizer = Adam(params)
    train(optimizer, params)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["state"][0]["exp_avg"]))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[params[0]]["exp_avg"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert [type(x) for x in seen] == [torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_of_the_whole_optimizer(way):
    params = new_params()
    optimizer = DeepSpeedCPUAdam(params, adamw_mode=False, weight_decay=0.1, fp32_optimizer_states=False)
    train(optimizer, params)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    elif way == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    copies = twin.param_groups[0]["params"]
    assert not twin.adam_w_mode and not twin.fp32_optimizer_states
    train(optimizer, params, seed=1)
    train(twin, copies, seed=1)
    assert_equal(params, copies)


def test_state_may_hold_step_tensors(Adam):
    """Some frameworks put torch.optim's step tensors into the state behind the optimizer's back."""
    params = new_params()
    expected = twins(params)
    a, b = Adam(params), Adam(expected)
    train(a, params)
    train(b, expected)
    for state in a.state.values():
        state["step"] = torch.tensor(float(state["step"]))
    train(a, params, seed=1)
    train(b, expected, seed=1)
    assert_equal(params, expected)


def test_amsgrad_turned_on_in_the_middle(Adam):
    params = new_params()
    optimizer = Adam(params)
    train(optimizer, params)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, params)
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in params)


def test_data_of_a_param_may_be_replaced(Adam):
    """As FSDP and ZeRO do with their flat shards: the next step updates the new memory."""
    param, twin = (p := new_params([(50,)])[0]), twins([p])[0]
    a, b = Adam([param]), Adam([twin])
    for _ in range(3):
        same_grads([param], [twin])
        a.step()
        b.step()
        param.data = param.data.clone()
    assert torch.equal(param, twin)


def test_tensors_of_more_than_2_to_the_31_elements():
    elements = 2**31 + 77
    available = 0
    with open("/proc/meminfo") as meminfo:  # noqa: PTH123
        for line in meminfo:
            if line.startswith("MemAvailable"):
                available = int(line.split()[1]) * 1024
    if available < elements * 8 * 1.15:
        pytest.skip(f"needs {elements * 8 / 2**30:.0f} GiB of free memory, {available / 2**30:.0f} are free")
    param = torch.nn.Parameter(torch.empty(elements, dtype=torch.bfloat16).fill_(1.0))
    param.grad = torch.empty_like(param).fill_(1.0)
    DeepSpeedCPUAdam([param], lr=0.5, fp32_optimizer_states=False).step()
    for part in (slice(0, 100), slice(2**31 - 50, 2**31 + 77), slice(elements // 2 - 99, elements // 2 + 99)):
        assert (param.detach()[part] == 0.5).all()


def test_states_are_found_whatever_their_order(Adam):
    """The op walks the dict of states beside the params; these are the ways in which the two part."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    values = [torch.randn(3 + i, generator=generator) for i in range(40)]

    def new_optimizer(group_of):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [{"params": [p for i, p in enumerate(params) if group_of(i) == g]} for g in (0, 1)]
        return Adam(groups), params

    mixed, params = new_optimizer(lambda i: i % 3 == 0)
    plain, expected = new_optimizer(lambda i: 0)
    for step in range(6):
        absent = {(7 * step + k) % 40 for k in range(3 * step)} if step else set()
        for i, (a, b) in enumerate(zip(params, expected, strict=True)):
            grad = None if i in absent else torch.randn(values[i].shape, generator=generator)
            a.grad, b.grad = grad, grad
        if step == 2:  # a dict in the reverse order
            entries = list(mixed.state.items())
            mixed.state.clear()
            mixed.state.update(reversed(entries))
        if step == 4:  # entries of others between
            mixed.state = type(mixed.state)(
                dict, {k: v for p, s in mixed.state.items() for k, v in ((f"other {id(p)}", {}), (p, s))}
            )
        mixed.step()
        plain.step()
    for a, b in zip(params, expected, strict=True):
        assert torch.equal(a, b)
        assert mixed.state[a]["step"] == plain.state[b]["step"]


def test_a_step_lets_go_of_the_grads(Adam):
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    for param in params:
        param.grad = torch.randn(5)
    optimizer = Adam(params)
    for _ in range(2):
        optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * 3


def test_what_a_printed_optimizer_says(cpu_adam):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3).bfloat16())]
    groups = [{"params": params[:1]}, {"params": params[1:], "master_weight_bits": 24}]
    lines = repr(DeepSpeedCPUAdam(groups, state_dtype="8bit", adamw_mode=False)).splitlines()
    assert lines[:4] == [
        "DeepSpeedCPUAdam (",
        "Rule: Adam: weight decay added to the grads",
        "Precision: 8-bit states, no master weights; 8-bit states, 24-bit master weights",
        f"Updates: cpu by the compiled op cpu_adam ({cpu_adam.target()})",
    ]
    assert "Parameter Group 1" in lines
    mixed = adamops.Adam([{"params": params[:1]}, {"params": params[1:], "decoupled_weight_decay": True}])
    assert "Rule: Adam: weight decay decoupled, or added to the grads, by param group\n" in repr(mixed)
    del mixed.param_groups[0]
    assert "Rule: AdamW: decoupled weight decay\n" in repr(mixed)
    del mixed.param_groups[0]
    assert "Rule: Adam: weight decay added to the grads\n" in repr(mixed)
    slow = DeepSpeedCPUAdam(params, stochastic_rounding=True, fp32_optimizer_states=False)
    slow._backends = {torch.device("cpu"): TorchBackend()}
    assert "Precision: states of their param's dtype, no master weights, stochastic rounding\n" in repr(slow)
    assert "Updates: cpu by pure PyTorch, which is slow\n" in repr(slow)
    assert "Updates: meta by what the first step loads" in repr(FusedAdam([torch.ones(2, device="meta")]))

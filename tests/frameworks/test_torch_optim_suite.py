"""What torch's own tests ask of Adam and AdamW, asked of our classes: its table of inputs, its error inputs, and the
behaviours that test_optim.py of torch holds every optimizer to.

torch's settings that only choose an implementation (foreach, fused, capturable on the CPU), that our classes say
otherwise (decoupled_weight_decay) or that they cannot do (differentiable) are refused by name.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from optimizers import MAKERS, by_deepspeeds_names
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from twins import assert_close, assert_equal, same_grads, twin_models, twin_params

import adamops
from adamops import DeepSpeedCPUAdam, FusedAdam

pytest.importorskip("expecttest")  # torch's testing modules need it
common_optimizers = pytest.importorskip("torch.testing._internal.common_optimizers")

pytestmark = pytest.mark.frameworks

SHAPES = [(4, 6), (5,), (), (0, 3), (2, 1, 3)]
PEERS = {torch.optim.Adam: False, torch.optim.AdamW: True}  # with our adamw_mode
INFOS = {info.optim_cls: info for info in common_optimizers.optim_db if info.optim_cls in PEERS}
CLASSES = [DeepSpeedCPUAdam, FusedAdam]
IMPLEMENTATIONS = ("foreach", "fused", "differentiable", "decoupled_weight_decay")


def inputs_of(device):
    """torch's cases for a device. Nothing is put there; for "cuda" there are cases with `capturable` besides."""
    return [
        pytest.param(cls, case.kwargs, id=f"{cls.__name__}-{case.desc}")
        for cls, info in INFOS.items()
        for case in info.optim_inputs_func(device=device, dtype=torch.float32)
    ]


def error_inputs():
    return [
        pytest.param(case, id=f"{cls.__name__}-{case.optimizer_error_input.desc}")
        for cls, info in INFOS.items()
        for case in info.optim_error_inputs_func("cpu", torch.float32)
    ]


def ours_and_torchs(make, peer, kwargs, shapes=SHAPES, dtype=torch.float32):
    """Params and optimizers of both, the weight decay of torch's default in both."""
    ours, theirs = twin_params(shapes, dtype)
    kwargs = {"weight_decay": 0.01 if PEERS[peer] else 0.0, **kwargs}
    return ours, make(ours, adamw_mode=PEERS[peer], **kwargs), theirs, peer(theirs, **kwargs)


# torch's inputs ----------------------------------------------------------------------------------------------------


def test_torch_has_inputs_for_both():
    assert set(INFOS) == set(PEERS)


@pytest.mark.parametrize(("peer", "kwargs"), inputs_of("cpu"))
def test_inputs_of_torch(Adam, peer, kwargs):
    ours, a, theirs, b = ours_and_torchs(Adam, peer, kwargs)
    for _ in range(20):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 20, kwargs.get("lr", 1e-3))


@pytest.mark.parametrize(("peer", "kwargs"), inputs_of("cuda"))
@pytest.mark.parametrize("name", [name for name in MAKERS if "FusedAdam" in name])
def test_inputs_for_gpus(request, name, peer, kwargs):
    """With `capturable`, lr and betas in tensors; torch takes these on the CPU as numbers only."""
    if "CUDA" in name:
        request.getfixturevalue("cuda_op")
    ours, theirs = twin_params(SHAPES)
    numbers = {
        key: tuple(map(float, value)) if key == "betas" else float(value) if isinstance(value, torch.Tensor) else value
        for key, value in kwargs.items()
        if key != "capturable"
    }
    wd = {"weight_decay": kwargs.get("weight_decay", 0.0)}
    kwargs = {**kwargs, **wd}
    if "capturable" in name:  # the maker says it already
        kwargs.pop("capturable", None)
    a = MAKERS[name](ours, adamw_mode=PEERS[peer], **kwargs)
    b = peer(theirs, **{**numbers, **wd})
    for _ in range(20):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 20, 1e-2)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", error_inputs())
def test_error_inputs_of_torch(cls, case):
    given = case.optimizer_error_input
    params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    if "foreach" in given.kwargs:  # whatever torch says against the combination, we have no foreach
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'foreach'"):
            cls(params, **given.kwargs)
    elif "both floats or both Tensors" in case.error_regex:
        kwargs = {**given.kwargs, "weight_decay": 0.1}  # mixed betas are taken: they mean what they say
        assert_mixed_betas_are_numbers(cls, kwargs)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(case.error_type, match=case.error_regex):
                cls(params, **given.kwargs)


@pytest.mark.parametrize(("peer", "kwargs"), [*inputs_of("cpu"), *inputs_of("cuda")])
@pytest.mark.parametrize(
    "choice", [{}, {"foreach": True}, {"foreach": False, "fused": True}, {"capturable": True}], ids=str
)
def test_inputs_of_torch_by_its_names(peer, kwargs, choice):
    """adamops.Adam and AdamW take all of them as they are."""
    ours, theirs = twin_params(SHAPES)
    a = getattr(adamops, peer.__name__)(ours, **kwargs, **{k: v for k, v in choice.items() if k not in kwargs})
    numbers = {key: tuple(map(float, value)) if key == "betas" else value for key, value in kwargs.items()}
    b = peer(theirs, **{key: value for key, value in numbers.items() if key != "capturable"})
    for _ in range(20):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 20, 1e-2)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(cls.__name__, case, id=f"{cls.__name__}-{case.optimizer_error_input.desc}")
        for cls, info in INFOS.items()
        for case in info.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_error_inputs_of_torch_by_its_names(name, case):
    given = case.optimizer_error_input
    make = getattr(adamops, name)
    params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    if "as a Tensor is not supported" in case.error_regex or "both floats or both Tensors" in case.error_regex:
        make(params, **given.kwargs)  # of torch's implementations only; here numbers are numbers
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(case.error_type, match=case.error_regex):
            make(params, **given.kwargs)


def assert_mixed_betas_are_numbers(cls, kwargs):
    ours, plain = twin_params(SHAPES)
    a, b = cls(ours, **kwargs), cls(plain, **{**kwargs, "betas": tuple(map(float, kwargs["betas"]))})
    for _ in range(3):
        same_grads(ours, plain)
        a.step()
        b.step()
    assert_equal(ours, plain)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("argument", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [True, False, None])
def test_arguments_of_torch_that_choose_an_implementation_are_refused_by_name(cls, argument, value):
    with pytest.raises(
        TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument '{argument}'"
    ):
        cls(twin_params(SHAPES)[0], **{argument: value})


def test_capturable_is_of_fused_adam_only():
    params = twin_params(SHAPES)[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'capturable'"):
        DeepSpeedCPUAdam(params, capturable=True)
    assert FusedAdam(params, capturable=True).param_groups[0]["capturable"] is True


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("setting", ["foreach", "fused", "differentiable"])
def test_checkpoints_of_every_implementation_of_torch_go_on_here(Adam, peer, setting):
    """The settings come along in the param groups, without effect, and go back with them."""
    ours, a, theirs, b = ours_and_torchs(Adam, peer, {"lr": 1e-2})
    if setting != "differentiable":  # that one cannot step params that are leaves
        b = peer(theirs, lr=1e-2, **{setting: True}, weight_decay=b.param_groups[0]["weight_decay"])
    for _ in range(3):
        same_grads(theirs)
        b.step()
    with torch.no_grad():
        for param, value in zip(ours, theirs, strict=True):
            param.copy_(value)
    saved = copy.deepcopy(b.state_dict())
    saved["param_groups"][0][setting] = True
    a.load_state_dict(saved)
    assert a.state_dict()["param_groups"][0][setting] is True
    for _ in range(3):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 6)


# Behaviours --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(Adam):
    """A weight and a bias against an input, from any start, as in torch's oldest test of optimizers."""
    weight, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in [(10, 5), (10,)])
    x = torch.randn(5)
    optimizer = Adam([{"params": [weight]}, {"params": [bias], "lr": 1e-2}], lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = (weight @ x + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(100):
        last = optimizer.step(closure)
    assert last.item() < first


@pytest.mark.parametrize("peer", PEERS)
def test_groups_with_their_own_lr_and_weight_decay(Adam, peer):
    ours, theirs = twin_params(SHAPES)
    optimizers = []
    for cls, params in ((Adam, ours), (peer, theirs)):
        groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 1e-3}]
        mode = {"adamw_mode": PEERS[peer]} if cls is Adam else {}
        optimizers.append(cls(groups, lr=1e-2, weight_decay=0.1, **mode))
    for _ in range(20):
        same_grads(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(ours, theirs, 20)


def test_the_dict_of_a_group_is_the_group_itself(Adam):
    """As with torch, whose users keep their dicts to change settings by them; a refused group stays as it was."""
    params, more = twin_params(SHAPES)
    first, second = {"params": params, "lr": 1e-2}, {"params": iter(more)}
    optimizer = Adam([first])
    optimizer.add_param_group(second)
    assert optimizer.param_groups[0] is first and optimizer.param_groups[1] is second
    assert second["params"] == more and second["lr"] == optimizer.defaults["lr"]
    refused = {"params": torch.nn.Parameter(torch.zeros(2)), "lr": -1.0}
    with pytest.raises(ValueError, match="Invalid learning rate: -1.0 in param group 2"):
        optimizer.add_param_group(refused)
    assert set(refused) == {"params", "lr"} and isinstance(refused["params"], torch.Tensor)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_an_lr_in_a_tensor_of_one_element(Adam, shape):
    ours, a, theirs, b = ours_and_torchs(Adam, torch.optim.AdamW, {"lr": torch.full(shape, 1e-2)})
    numbers = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    c = Adam(numbers, lr=float(torch.tensor(1e-2)), weight_decay=0.01)
    for _ in range(5):
        same_grads(ours, theirs, numbers)
        for optimizer in (a, b, c):
            optimizer.step()
    assert_close(ours, theirs, 5)
    assert_close(ours, numbers, 5)


def test_without_any_grad_a_step_does_nothing(Adam):
    params, before = twin_params(SHAPES)
    optimizer = Adam(params, lr=1e-2, weight_decay=0.1)
    optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


def test_empty_params_with_empty_grads(Adam):
    params, before = twin_params([(0,), (3, 0)])
    optimizer = Adam(params, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        same_grads(params)
        optimizer.step()
    assert_equal(params, before)
    state = optimizer.state_dict()
    Adam(params).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grads_are_read_only(Adam, dtype):
    params, _ = twin_params(SHAPES, dtype)
    optimizer = Adam(params, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        same_grads(params)
        kept = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
        optimizer.step()
        for param, (grad, value, version) in zip(params, kept, strict=True):
            assert param.grad is grad and grad._version == version and torch.equal(grad, value)


class NotesCalls(TorchDispatchMode):
    """Notes the operations of torch that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_memory_for_temporaries(cpu_adam, dtype):
    """torch's tests bound the peak; here it is that of the states, as a step makes no tensor at all."""
    params, _ = twin_params(SHAPES, dtype)
    for optimizer in (DeepSpeedCPUAdam(params), FusedAdam(params)):
        same_grads(params)
        optimizer.step()
        with NotesCalls() as mode:
            optimizer.step()
        assert [call for call in mode.calls if call.startswith("aten::")] == []


def test_params_of_16_bits_are_torchs_float32_step_rounded(Adam):
    """torch computes such a step with states of 16 bits, in which squares vanish; ours are float32."""
    for dtype, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        (halves, _) = twin_params(SHAPES, dtype)
        floats = [torch.nn.Parameter(param.detach().float()) for param in halves]
        same_grads(halves)
        for param, half in zip(floats, halves, strict=True):
            param.grad = half.grad.float()
        Adam(halves, lr=1e-2, weight_decay=0.01).step()
        torch.optim.AdamW(floats, lr=1e-2, weight_decay=0.01).step()
        for half, param in zip(halves, floats, strict=True):
            torch.testing.assert_close(half.float(), param, rtol=ulp, atol=2.0**-24)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64, torch.int64])
def test_dtypes_that_are_refused(Adam, dtype):
    values = torch.zeros(3, dtype=dtype)
    param = torch.nn.Parameter(values) if dtype != torch.int64 else values
    with pytest.raises(TypeError, match=r"param group 0, param 0 .*dtype is not supported; use float32, bfloat16 or"):
        Adam([param])


def test_a_view_with_gaps_is_refused(Adam):
    """torch takes the first of two interleaved weights as a param; here each param owns its memory."""
    with pytest.raises(ValueError, match=r"strides \(10, 2\), which overlap or leave gaps"):
        Adam([torch.nn.Parameter(torch.randn(10, 5, 2)[..., 0])])


@pytest.mark.parametrize("value", [1.0, None, (1.0, {"parts": [2.0]}), "loss"])
def test_what_a_closure_returns_is_returned(Adam, value):
    params, _ = twin_params(SHAPES)
    assert Adam(params).step(lambda: value) == value


def test_an_error_in_a_closure_changes_nothing(Adam):
    params, before = twin_params(SHAPES)
    optimizer = Adam(params)

    def closure():
        raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        optimizer.step(closure)
    assert_equal(params, before)
    assert not optimizer.state


# Hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_of_one_optimizer_and_of_all(Adam):
    params, _ = twin_params(SHAPES)
    optimizer, calls = Adam(params), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["all before", "before", "after", "all after"]
    optimizer.step()
    assert len(calls) == 4


def test_a_hook_may_change_what_the_step_is_given(Adam):
    params, _ = twin_params(SHAPES)
    optimizer = Adam(params)
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: "of the hook"), {}))
    assert optimizer.step(lambda: "of the caller") == "of the hook"
    optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
        optimizer.step()


def test_a_hook_may_change_the_grads(Adam):
    ours, halved = twin_params(SHAPES)
    a, b = Adam(ours), Adam(halved)

    def halve(optimizer, *_):
        for param in optimizer.param_groups[0]["params"]:
            param.grad.mul_(0.5)

    a.register_step_pre_hook(halve)
    for _ in range(3):
        same_grads(ours, halved)
        for param in halved:
            param.grad *= 0.5
        a.step()
        b.step()
    assert_equal(ours, halved)


# State dicts -------------------------------------------------------------------------------------------------------


def trained(make, steps=5, **kwargs):
    params, _ = twin_params(SHAPES)
    optimizer = make(params, lr=1e-2, weight_decay=0.1, **kwargs)
    for _ in range(steps):
        same_grads(params)
        optimizer.step()
    return params, optimizer


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_numbers(value):
    """A state dict with tensors as dtypes and lists, so that == compares all of it."""
    if isinstance(value, dict):
        return {key: as_numbers(entry) for key, entry in value.items()}
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_dicts_are_deterministic(Adam, named, way, tensor_lr):
    """Optimizers that load the same state dict make the same steps, and the state dict of both is the same again."""
    params, _ = twin_params(SHAPES)
    entries = [(f"layer{i}", param) for i, param in enumerate(params)] if named else params
    optimizer = Adam(entries, lr=torch.tensor(1e-2) if tensor_lr else 1e-2)
    for _ in range(3):
        same_grads(params)
        optimizer.step()
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = Adam([(f"layer{i}", param) for i, param in enumerate(copies)] if named else copies, lr=0.5)
    other.load_state_dict(way(optimizer.state_dict()))
    assert list(other.state_dict()["state"]) == list(optimizer.state_dict()["state"])
    for _ in range(3):
        same_grads(params, copies)
        optimizer.step()
        other.step()
    assert_equal(params, copies)
    assert as_numbers(other.state_dict()) == as_numbers(optimizer.state_dict())
    if named:
        assert other.param_groups[0]["param_names"] == [f"layer{i}" for i in range(len(SHAPES))]


def test_state_dicts_with_names_and_without_go_into_each_other(Adam):
    params, optimizer = trained(Adam)
    named = Adam([(f"layer{i}", param) for i, param in enumerate(params)])
    named.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert named.param_groups[0]["param_names"][0] == "layer0"
    plain = Adam(params)
    plain.load_state_dict(copy.deepcopy(named.state_dict()))
    assert plain.state[params[0]]["step"] == optimizer.state[params[0]]["step"]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "lacks",
    [("maximize",), ("foreach", "fused", "differentiable"), ("maximize", "foreach", "fused", "capturable", "amsgrad")],
    ids=" ".join,
)
@pytest.mark.parametrize("step_form", [int, float, torch.tensor])
def test_state_dicts_of_older_versions_of_torch(Adam, peer, lacks, step_form):
    """Those before 1.12 lack settings that came later, and have counts of steps as numbers."""
    ours, a, theirs, b = ours_and_torchs(Adam, peer, {"lr": 1e-2})
    for _ in range(3):
        same_grads(theirs)
        b.step()
    old = copy.deepcopy(b.state_dict())
    for group in old["param_groups"]:
        for key in (*lacks, "decoupled_weight_decay"):
            group.pop(key, None)
    for state in old["state"].values():
        state["step"] = step_form(int(state["step"]))
    with torch.no_grad():
        for param, value in zip(ours, theirs, strict=True):
            param.copy_(value)
    a.load_state_dict(old)
    for _ in range(3):
        same_grads(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, 6)


def test_state_dicts_of_other_optimizers_are_refused(Adam):
    params, _ = twin_params(SHAPES)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    same_grads(params)
    sgd.step()
    optimizer = Adam(params)
    with pytest.raises(ValueError, match="momentum_buffer.*this is not the state of an Adam optimizer"):
        optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert not optimizer.state
    before_its_first_step = torch.optim.SGD(params, lr=0.1).state_dict()
    with pytest.raises(ValueError, match="param group 0 has no betas; this is not the state of an Adam optimizer"):
        optimizer.load_state_dict(before_its_first_step)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_state_dicts_of_other_params_are_refused(Adam):
    params, optimizer = trained(Adam)
    with pytest.raises(ValueError, match="loaded state dict contains a parameter group that doesn't match the size"):
        Adam(params[:2]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Adam([{"params": params[:2]}, {"params": params[2:]}]).load_state_dict(optimizer.state_dict())


def test_state_dict_hooks(Adam):
    params, optimizer = trained(Adam)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "more": "here"})
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: calls.append(state_dict.pop("more")))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert calls == ["before saving", "here", "loaded"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [DeepSpeedCPUAdam, by_deepspeeds_names(FusedAdam)], ids=["cpu", "fused"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_copies_of_optimizers(make, copied, tensor_lr):
    params, _ = twin_params(SHAPES)
    optimizer = make(params, lr=torch.tensor(1e-2) if tensor_lr else 1e-2, amsgrad=True)
    for _ in range(3):
        same_grads(params)
        optimizer.step()
    other = copied(optimizer)
    copies = other.param_groups[0]["params"]
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public <= set(vars(other))
    for _ in range(3):
        same_grads(params, copies)
        optimizer.step()
        other.step()
    assert_equal(params, copies)


def test_a_model_and_its_optimizer_copied_together():
    model, _ = twin_models(lambda: torch.nn.Linear(4, 3))
    optimizer = DeepSpeedCPUAdam(model.parameters())
    pair = copy.deepcopy({"model": model, "optimizer": optimizer})
    assert [id(p) for p in pair["model"].parameters()] == [id(p) for p in pair["optimizer"].param_groups[0]["params"]]

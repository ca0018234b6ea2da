"""What users of apex.optimizers.FusedAdam, and of the one of Transformer Engine, rely on, on the CPU op and on the
emulated CUDA op: the same training as with torch.optim.Adam and AdamW, masters for 16-bit params, and its arguments."""

import functools

import pytest
import torch
from optimizers import EmulatedFusedAdam
from torch import nn
from twins import assert_close, assert_equal, assert_trained_alike, same_grads, twin_models, twin_params

from adamops import FusedAdam

pytestmark = pytest.mark.frameworks

MAKERS = {
    "host": FusedAdam,
    "CUDA": EmulatedFusedAdam,
    "CUDA-capturable": functools.partial(EmulatedFusedAdam, capturable=True),
}
# One tensor and many, of sizes around those of vectors, cache lines and the chunks that work is split into.
SIZES = {
    "one element": [(1,)],
    "one vector less one": [(15,)],
    "a matrix": [(257, 129)],
    "several chunks": [(65536 * 2 + 7,)],
    "many params": [(n,) for n in (1, 2, 31, 32, 33, 255, 256, 257, 4095, 4097)],
    "layers of a model": [(64, 48), (64,), (64, 64), (64,), (10, 64), (10,)],
    "with an empty one": [(5, 3), (0,), (7,), (2, 0, 3)],
    "numbers": [(), (1, 1, 1), ()],
}
ITERATIONS, LR = 7, 5e-3


@pytest.fixture(params=list(MAKERS))
def Fused(request):  # noqa: N802
    """Makes FusedAdam from its own arguments, on each op."""
    if "CUDA" in request.param:
        request.getfixturevalue("cuda_op")
    return MAKERS[request.param]


def torchs(adam_w_mode):
    return torch.optim.AdamW if adam_w_mode else torch.optim.Adam


def step_all(*optimizers):
    for optimizer in optimizers:
        optimizer.step()


# Against torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_many_steps_are_those_of_torch(Fused, sizes, adam_w_mode):
    ours, theirs = twin_params(SIZES[sizes])
    settings = {"lr": LR, "betas": (0.6, 0.9), "eps": 3e-6, "weight_decay": 0.02}
    a, b = Fused(ours, adam_w_mode=adam_w_mode, **settings), torchs(adam_w_mode)(theirs, **settings)
    for _ in range(ITERATIONS):
        same_grads(ours, theirs)
        step_all(a, b)
    assert_close(ours, theirs, ITERATIONS, LR)
    for param, other in zip(ours, theirs, strict=True):
        mine, reference = a.state[param], b.state[other]
        assert int(mine["step"]) == int(reference["step"]) == ITERATIONS
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[key], reference[key], rtol=0.0, atol=ITERATIONS * 2.0**-21)


@pytest.mark.parametrize("settings", [{"amsgrad": True}, {"weight_decay": 0.0}, {"maximize": True}], ids=str)
def test_what_apex_refuses_or_leaves_out_works(Fused, settings):
    ours, theirs = twin_params(SIZES["layers of a model"])
    a, b = Fused(ours, lr=LR, adam_w_mode=False, **settings), torch.optim.Adam(theirs, lr=LR, **settings)
    for _ in range(ITERATIONS):
        same_grads(ours, theirs)
        step_all(a, b)
    assert_close(ours, theirs, ITERATIONS, LR)


def test_without_bias_correction_the_first_step_is_larger_by_what_is_known(Fused):
    """The averages are c1 * g and c2 * g**2, so without eps each element moves by lr * c1 / sqrt(c2)."""
    (param,), _ = twin_params([(1000,)])
    before = param.detach().clone()
    param.grad = torch.randn(1000)
    Fused([param], lr=LR, bias_correction=False, betas=(0.9, 0.99), eps=0.0).step()
    torch.testing.assert_close((before - param).abs(), torch.full((1000,), LR * 0.1 / 0.01**0.5), rtol=1e-4, atol=1e-6)


def new_classifier():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 12 * 12, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_a_small_classifier_trains_as_with_torch(Fused, scaled):
    """A convolutional model on images of 28 by 28, with and without the scaler of losses."""
    ours, theirs = twin_models(new_classifier)
    a, b = Fused(ours.parameters(), lr=1e-3, adam_w_mode=False), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    scalers = [torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12) for _ in range(2)]
    for _ in range(6):
        images, labels = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
        for model, optimizer, scaler in zip((ours, theirs), (a, b), scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-2, atol=1e-3)


# Grads that are missing --------------------------------------------------------------------------------------------


def test_frozen_params_stay_as_they_are(Fused):
    model = new_classifier()
    for param in model[0].parameters():
        param.requires_grad_(False)
    frozen = [param.clone() for param in model[0].parameters()]
    optimizer = Fused(model.parameters(), lr=LR, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 28, 28)).sum().backward()
        optimizer.step()
    assert_equal(model[0].parameters(), frozen)
    assert len(optimizer.state) == 4


def test_groups_without_grads_and_without_params(Fused):
    params, before = twin_params(SIZES["layers of a model"])
    optimizer = Fused([{"params": params[:2]}, {"params": []}, {"params": params[2:]}], lr=LR)
    same_grads(params[2:])
    optimizer.step()
    assert_equal(params[:2], before[:2])
    assert all(not torch.equal(a, b) for a, b in zip(params[2:], before[2:], strict=True))
    optimizer.zero_grad()
    optimizer.step()  # nobody has a grad


@pytest.mark.parametrize("of_optimizer", [True, False])
@pytest.mark.parametrize("of_call", [None, True, False])
def test_how_grads_are_cleared(Fused, of_optimizer, of_call):
    params, _ = twin_params(SIZES["layers of a model"])
    optimizer = Fused(params, set_grad_none=of_optimizer)
    same_grads(params)
    optimizer.zero_grad() if of_call is None else optimizer.zero_grad(set_to_none=of_call)
    to_none = of_optimizer if of_call is None else of_call
    for param in params:
        assert param.grad is None if to_none else not param.grad.any()


def test_params_that_join_later_count_steps_of_their_own(Fused):
    """apex counts by group, so that the first step of such a param would be corrected as its group's."""
    ours, theirs = twin_params(SIZES["layers of a model"])
    a, b = Fused(ours[:2], lr=LR, weight_decay=0.0), torch.optim.AdamW(theirs[:2], lr=LR, weight_decay=0.0)
    for i in range(ITERATIONS):
        if i == 3:
            for optimizer, params in ((a, ours), (b, theirs)):
                optimizer.add_param_group({"params": params[2:], "lr": LR / 2})
        same_grads(ours, theirs)
        step_all(a, b)
    assert_close(ours, theirs, ITERATIONS, LR)
    assert [int(a.state[param]["step"]) for param in ours] == [ITERATIONS] * 2 + [ITERATIONS - 3] * 4


# 16 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_masters_go_the_way_of_float32_params(Fused, dtype, adam_w_mode):
    """And the params are their masters, rounded, after each step."""
    halves, _ = twin_params(SIZES["layers of a model"], dtype)
    floats = [nn.Parameter(param.detach().float()) for param in halves]
    settings = {"lr": LR, "adam_w_mode": adam_w_mode, "weight_decay": 0.05}
    a, b = Fused(halves, master_weights=True, **settings), Fused(floats, **settings)
    for _ in range(ITERATIONS):
        same_grads(halves)
        for half, param in zip(halves, floats, strict=True):
            param.grad = half.grad.float()
        step_all(a, b)
        for half, param in zip(halves, floats, strict=True):
            assert torch.equal(a.state[half]["master_param"], param)
            assert torch.equal(half, param.to(dtype))
            assert a.state[half]["exp_avg"].dtype == torch.float32


def test_remainders_are_masters_in_less_memory():
    """As Transformer Engine's store_param_remainders: a bfloat16 param and 16 bits more are a float32 master."""
    halves, others = twin_params(SIZES["layers of a model"], torch.bfloat16)
    a, b = FusedAdam(halves, lr=LR, master_weight_bits=32), FusedAdam(others, lr=LR, master_weights=True)
    for _ in range(ITERATIONS):
        same_grads(halves, others)
        step_all(a, b)
    assert_equal(a.fp32_params(), b.fp32_params())
    for param in halves:
        assert a.state[param]["param_remainder"].element_size() == 2 and "master_param" not in a.state[param]


def test_copies_in_16_bits_take_the_place_of_output_params():
    """apex wrote them for step(output_params=...), and gave that up; here lowp_out is written in the same pass."""
    params, _ = twin_params(SIZES["layers of a model"])
    copies = [torch.empty_like(param, dtype=torch.float16) for param in params]
    optimizer = FusedAdam(params, lr=LR)
    same_grads(params)
    optimizer.step(lowp_out=copies)
    assert_equal(copies, [param.half() for param in params])


def test_a_scale_is_set_not_passed(Fused):
    """apex took step(scale=...), and gave that up; GradScaler sets `grad_scale`, and so can users."""
    scaled, plain = twin_params(SIZES["layers of a model"])
    a, b = Fused(scaled, lr=LR), Fused(plain, lr=LR)
    for _ in range(ITERATIONS):
        same_grads(scaled, plain)
        for param in scaled:
            param.grad *= 64.0
        a.grad_scale = torch.tensor(64.0)
        step_all(a, b)
    assert_equal(scaled, plain)
    with pytest.raises(RuntimeError, match="FusedAdam.step.. takes a closure only"):
        a.step(scale=64.0)


@pytest.mark.parametrize(
    "argument", ["store_param_remainders", "master_weight_dtype", "exp_avg_dtype", "use_decoupled_grad", "use_mt"]
)
def test_arguments_of_other_fused_adams_are_refused_by_name(argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        FusedAdam(twin_params([(3,)])[0], **{argument: True})


# Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_checkpoint_with_the_count_in_the_group_goes_on(Fused, master_weights):
    """As apex writes it: `step` of the group, masters beside the states or none."""
    params, resumed = twin_params(SIZES["layers of a model"], torch.bfloat16)
    optimizer = Fused(params, lr=LR, master_weights=master_weights)
    for _ in range(3):
        same_grads(params)
        optimizer.step()
    saved = optimizer.state_dict()
    old = {
        "state": {
            key: {name: value.clone() for name, value in state.items() if name != "step"}
            for key, state in saved["state"].items()
        },
        "param_groups": [{**group, "step": 3} for group in saved["param_groups"]],
    }
    with torch.no_grad():
        for param, value in zip(resumed, params, strict=True):
            param.copy_(value)
    other = Fused(resumed, lr=0.5, master_weights=master_weights)
    other.load_state_dict(old)
    for _ in range(3):
        same_grads(params, resumed)
        step_all(optimizer, other)
    assert_equal(params, resumed)
    assert "step" not in other.param_groups[0]


def test_capturable_changes_no_bit(cuda_op):
    """Nor does turning it on in the middle, by a checkpoint."""
    ours, others = twin_params(SIZES["layers of a model"])
    a, b = (
        EmulatedFusedAdam(ours, lr=LR),
        EmulatedFusedAdam(others, lr=torch.tensor(LR, dtype=torch.float64), capturable=True),
    )
    for _ in range(3):
        same_grads(ours, others)
        step_all(a, b)
    assert_equal(ours, others)
    assert all(isinstance(b.state[param]["step"], torch.Tensor) for param in others)


def test_models_in_turns_keep_to_themselves(Fused):
    """Two models with their optimizers, as in adversarial training."""
    first, second = twin_models(new_classifier)
    alone, _ = twin_models(new_classifier)
    alone.load_state_dict(first.state_dict())
    optimizers = [Fused(model.parameters(), lr=LR) for model in (first, second, alone)]
    for _ in range(3):
        images = torch.randn(2, 1, 28, 28)
        for model, optimizer in zip((first, second, alone), optimizers, strict=True):
            optimizer.zero_grad()
            (model(images).sum() * (-1.0 if model is second else 1.0)).backward()
            optimizer.step()
    assert_equal(first.parameters(), alone.parameters())
    with pytest.raises(AssertionError):
        assert_trained_alike(first, second, LR)

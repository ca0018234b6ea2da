"""adamops.Adam and AdamW: torch's signatures, param groups and checkpoints, and steps near torch's."""

import copy
import inspect
import io
import pickle
import textwrap

import pytest
import torch
from torch.nn import Parameter

import adamops

CLASSES = ["Adam", "AdamW"]
SPELLINGS = [
    {},
    {"fused": True},
    {"fused": False, "foreach": None},
    {"foreach": True},
    {"foreach": False},
    {"capturable": True},
    {"amsgrad": True, "maximize": True},
    {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.99))},
    {"weight_decay": 0.3, "eps": 1e-4, "betas": (0.5, 0.6), "lr": 0.1},
]


def pair(name, dtype=torch.float32, **settings):
    """Our optimizer, and torch's over twins of its params in float64."""
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 7), (), 300)]
    twins = [Parameter(param.detach().double()) for param in params]
    theirs = {key: value for key, value in settings.items() if key != "capturable"}  # which torch refuses on the CPU
    return getattr(adamops, name)(params, **settings), getattr(torch.optim, name)(twins, **theirs)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_both(ours, theirs, steps=5):
    for _ in range(steps):
        for param, twin in zip(params_of(ours), params_of(theirs), strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.double()
        ours.step()
        theirs.step()


def assert_near(ours, theirs, bound=2e-6):
    """float32 rounds each step by half a unit in the last place of values up to some 4, and its states by less."""
    for param, twin in zip(params_of(ours), params_of(theirs), strict=True):
        assert (param.double() - twin).abs().max() <= bound * (1 + twin.abs().max())


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_torch(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (adamops, torch.optim))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("settings", SPELLINGS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_steps_are_those_of_torch_however_it_is_spelled(name, settings):
    ours, theirs = pair(name, **settings)
    step_both(ours, theirs)
    # Where an L2 term nearly cancels a grad, what is left has the rounding errors of both, up to 2^-22, and a step
    # divides it by as little as eps.
    cancels = name == "Adam" and "weight_decay" in settings
    assert_near(ours, theirs, 5 * settings["lr"] * 2.0**-22 / settings["eps"] if cancels else 2e-6)
    assert ours.defaults.keys() == theirs.defaults.keys()
    assert [*map(dict.keys, ours.param_groups)] == [*map(dict.keys, theirs.param_groups)]
    for key, value in ours.defaults.items():
        assert value == theirs.defaults[key] or key == "capturable", key


@pytest.mark.parametrize("name", CLASSES)
def test_param_groups_have_settings_of_their_own(name):
    ours, theirs = pair(name)
    groups = [
        {"lr": 0.1, "foreach": True},
        {"weight_decay": 0.5, "fused": True},
        {"amsgrad": True, "betas": (0.1, 0.2)},
    ]
    ours, theirs = (
        getattr(module, name)([{"params": [p], **group} for p, group in zip(params_of(o), groups, strict=True)])
        for module, o in ((adamops, ours), (torch.optim, theirs))
    )
    step_both(ours, theirs)
    assert_near(ours, theirs)
    for mine, of_torch in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {key: mine[key] for key in of_torch if key != "params"} == {
            key: value for key, value in of_torch.items() if key != "params"
        }


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "foreach": True}, {"weight_decay": 0.2}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_go_both_ways(name, settings):
    ours, theirs = pair(name, **settings)
    step_both(ours, theirs)
    file = io.BytesIO()
    torch.save({"ours": ours.state_dict(), "theirs": theirs.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    ours.load_state_dict(saved["theirs"])
    theirs.load_state_dict(saved["ours"])
    for mine, of_torch in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {**mine, "params": 0} == {**of_torch, "params": 0}
    step_both(ours, theirs)
    assert_near(ours, theirs, 5e-6)


def test_decoupled_weight_decay_is_an_argument_of_adam():
    value, grad = torch.randn(2, 100)
    results = []
    for make in (
        lambda p: adamops.AdamW(p, 0.1, weight_decay=0.1),
        lambda p: adamops.Adam(p, 0.1, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: adamops.FusedAdam(p, 0.1, weight_decay=0.1),
        lambda p: adamops.Adam(p, 0.1, weight_decay=0.1),
    ):
        param = Parameter(value.clone())
        param.grad = grad.clone()
        optimizer = make([param])
        optimizer.step()
        results.append(param.detach())
    decoupled, *others, coupled = results
    assert all(torch.equal(decoupled, other) for other in others) and not torch.equal(decoupled, coupled)
    twin = torch.optim.Adam([Parameter(value.clone())], decoupled_weight_decay=True)
    twin.load_state_dict(adamops.Adam([param], decoupled_weight_decay=True).state_dict())
    assert twin.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("change", ["group", "later", "from Adam", "from AdamW", "from FusedAdam"])
def test_each_group_decays_as_it_says(name, change):
    """As in torch, where the setting of the group counts at each step, and AdamW sets it anew when it is loaded."""
    ours, theirs = pair(name, weight_decay=0.5, lr=0.1)
    if change == "group":
        groups = [
            [{"params": [p], "decoupled_weight_decay": i == 1} for i, p in enumerate(params_of(o))]
            for o in (ours, theirs)
        ]
        ours, theirs = (
            getattr(m, name)(g, weight_decay=0.5, lr=0.1) for m, g in zip((adamops, torch.optim), groups, strict=True)
        )
    elif change == "later":
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["decoupled_weight_decay"] = name == "Adam"
    else:
        step_both(ours, theirs)
        if change == "from FusedAdam":  # which has no such setting in its groups
            source = adamops.FusedAdam(params_of(ours), weight_decay=0.5, lr=0.1)
            source.load_state_dict(ours.state_dict())
        else:
            source = getattr(adamops, change.split()[1])(params_of(ours), weight_decay=0.5, lr=0.1)
            source.load_state_dict(
                getattr(torch.optim, change.split()[1])(params_of(ours), weight_decay=0.5, lr=0.1).state_dict()
            )
        saved = copy.deepcopy(source.state_dict())
        for group in saved["param_groups"] if change == "from FusedAdam" else ():
            group.pop("decoupled_weight_decay", None)
        saved["state"] = theirs.state_dict()["state"]
        ours.load_state_dict(copy.deepcopy(saved))
        theirs.load_state_dict(saved)
    step_both(ours, theirs)
    assert_near(ours, theirs, 5e-6)
    for mine, of_torch in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert mine["decoupled_weight_decay"] == of_torch["decoupled_weight_decay"]


@pytest.mark.parametrize("name", CLASSES)
def test_what_cannot_be_done_is_refused_with_the_reason(name):
    make, param = getattr(adamops, name), Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="differentiable: True; a step of adamops writes params in place"):
        make([param], differentiable=True)
    with pytest.raises(ValueError, match="differentiable: True in param group 0"):
        make([{"params": [param], "differentiable": True}])
    with pytest.raises(ValueError, match="`fused` and `foreach` cannot be `True` together"):
        make([param], fused=True, foreach=True)
    with pytest.raises(ValueError, match="cannot be `True` together in param group 0"):
        make([{"params": [param], "fused": True}], foreach=True)
    with pytest.raises(TypeError, match=r"Invalid foreach: 'yes'.*; expected True or False"):
        make([param], foreach="yes")
    with pytest.raises(TypeError, match="float64"):
        make([Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(TypeError):
        make([param], 1e-3, (0.9, 0.999), 1e-8, 0.0, False, True)  # keywords only from there on, as in torch
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            make([param], **wrong)


@pytest.mark.parametrize("name", CLASSES)
def test_params_may_have_names(name):
    model = torch.nn.Linear(3, 2)
    try:
        theirs = getattr(torch.optim, name)(model.named_parameters())
    except TypeError:
        pytest.skip("torch before 2.5")
    ours = getattr(adamops, name)(model.named_parameters())
    assert ours.param_groups[0]["param_names"] == theirs.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", CLASSES)
def test_copies_go_on_alike(name, copied):
    ours, _ = pair(name, weight_decay=0.1)
    for param in params_of(ours):
        param.grad = torch.randn_like(param)
    ours.step()
    other = copied(ours)
    assert type(other) is type(ours) and repr(other) == repr(ours)
    for mine, its in zip(params_of(ours), params_of(other), strict=True):
        its.grad = mine.grad.clone()
    ours.step()
    other.step()
    assert all(torch.equal(*both) for both in zip(params_of(ours), params_of(other), strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_16_bit_params_have_float32_states(name):
    ours, theirs = pair(name, torch.bfloat16)
    step_both(ours, theirs, 1)
    assert {state["exp_avg"].dtype for state in ours.state.values()} == {torch.float32}
    assert_near(ours, theirs, 2**-8)


LOOP = """
import torch

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
decayed = [param for param in model.parameters() if param.dim() > 1]
others = [param for param in model.parameters() if param.dim() <= 1]
optimizer = torch.optim.AdamW(
    [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.98), SPELLING
)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=30, cycle_momentum=True)
losses = []
for step in range(30):
    x = torch.randn(64, 8)

    def closure():
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    losses.append(optimizer.step(closure).item())
    scheduler.step()
    if step == 15:
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
"""


@pytest.mark.parametrize("spelling", ["", "fused=True", "foreach=True", "capturable=True", "amsgrad=True"])
def test_a_loop_of_plain_torch_becomes_ours_by_the_name_alone(spelling):
    source = textwrap.dedent(LOOP).replace("SPELLING", spelling)
    theirs, ours = {}, {"adamops": adamops}
    exec(source.replace("capturable=True", ""), theirs)  # which torch refuses on the CPU
    exec(source.replace("torch.optim.AdamW", "adamops.AdamW"), ours)
    assert isinstance(ours["optimizer"], adamops.AdamW)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["losses"][-1] < 0.5 * ours["losses"][0]

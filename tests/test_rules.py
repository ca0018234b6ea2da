"""What any rule gets from the engine: precision, clipping, loss scaling, checkpoints, async steps, backward steps."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from optimizers import OnEmulatedCuda
from rules import REFERENCES, WAYS, Adagrad, Lion, OnCpuOp, module_of, optimizer_of
from torch.distributed.tensor import DTensor, Replicate
from twins import assert_equal, same_grads, twin_params

import adamops
from adamops.optim.backends.loading import of_rule
from adamops.optim.optimizer import RuleOptimizer
from adamops.optim.rule import Flag, Rate, Rule, State
from adamops.optim.state import quantization
from adamops.optim.state.precision import SCALES, names_of
from adamops.optim.state.quantized_states import dequantized_states, is_quantized, quantized_states

pytestmark = pytest.mark.filterwarnings("ignore:adamops falls back to pure PyTorch")
SHAPES = [(5000,), (3, 4), ()]  # the first has 8-bit states where they are asked for


@pytest.fixture(scope="session")
def ops():
    """Compiled ops by rule and kind; each is compiled when it is first asked for."""
    modules = {}

    def op_of(way, cls):
        key = cls, issubclass(way, OnEmulatedCuda), issubclass(way, OnCpuOp)
        if key not in modules:
            modules[key] = module_of(way, cls)
        return modules[key]

    return op_of


def on_backends(ways):
    """A fixture: the optimizer of each rule, on each of these backends."""

    @pytest.fixture(
        params=list(itertools.product(REFERENCES, ways)), ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}"
    )
    def fixture(request, ops):
        rule, way = request.param
        chosen = optimizer_of(way, rule)
        chosen.module = ops(way, rule)
        return chosen

    return fixture


cls = on_backends(WAYS)
compiled_cls = on_backends(WAYS[1:])  # without pure PyTorch


def train(optimizer, params, steps=3):
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def assert_same_states(ours, theirs):
    for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "lr": 0.05}])
def test_steps_are_those_of_the_rule(cls, settings):
    ours, theirs = twin_params(SHAPES)
    optimizer, reference = cls(ours, **settings), cls.reference(theirs, **settings)
    for _ in range(5):
        same_grads(ours, theirs)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_param_has_the_states_of_the_rule_and_a_step_count(cls):
    params, _ = twin_params(SHAPES)
    optimizer = cls(params)
    train(optimizer, params)
    for state in optimizer.state.values():
        assert state.keys() == {"step", *names_of(cls.rule.states)} and state["step"] == 3


def test_scalars_may_depend_on_the_step():
    ours, theirs = twin_params(SHAPES)
    optimizer, reference = Adagrad(ours, lr_decay=0.5), torch.optim.Adagrad(theirs, lr=1e-2, lr_decay=0.5)
    for _ in range(4):
        same_grads(ours, theirs)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_maximizing_is_minimizing_along_the_negative_grad(cls):
    ours, theirs = twin_params(SHAPES)
    up, down = cls(ours, maximize=True), cls(theirs)
    for _ in range(3):
        same_grads(ours, theirs)
        for param in theirs:
            param.grad.neg_()
        up.step()
        down.step()
    assert_equal(ours, theirs)


def test_a_missing_grad_leaves_param_and_state_alone(cls):
    params, before = twin_params(SHAPES)
    optimizer = cls(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert_equal(params[1:], before[1:])
    assert list(optimizer.state) == params[:1] and not torch.equal(params[0], before[0])


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_states_are_what_the_float_states_would_be_quantized_to(cls, dtype):
    ours, theirs = twin_params([(5000,)], dtype)
    quantized, floats = cls(ours, state_dtype="8bit"), cls(theirs)
    for _ in range(3):
        if quantized.state and cls.rule.states:
            state = quantized.state[ours[0]]
            floats.state[theirs[0]] = {
                "step": copy.deepcopy(state["step"]),
                **dequantized_states(state, cls.rule.states),
            }
        with torch.no_grad():
            theirs[0].copy_(ours[0])
        same_grads(ours, theirs)
        quantized.step()
        floats.step()
        assert_equal(ours, theirs)
        held, expected = quantized.state[ours[0]], floats.state[theirs[0]]
        if not cls.rule.states:
            assert held.keys() == {"step"}
            continue
        for name, value in quantized_states(expected, cls.rule.states, int(held["step"])).items():
            assert torch.equal(held[name], value), name
        assert is_quantized(held, cls.rule.states) and held[SCALES].shape == (20, len(cls.rule.states))


def test_8bit_states_train_as_float_states_do(cls):
    ours, theirs = twin_params([(64, 64)])
    target = torch.randn(64, 64)
    optimizers = cls(ours, lr=0.01, state_dtype="8bit"), cls(theirs, lr=0.01)
    losses = []
    for (param,), optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(60):
            optimizer.zero_grad()
            loss = (param - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_of_32_bits_are_those_of_float32_params(cls, dtype):
    ours, theirs = twin_params(SHAPES, dtype)
    theirs = [torch.nn.Parameter(param.detach().float()) for param in theirs]
    optimizer, reference = cls(ours, master_weight_bits=32), cls(theirs)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape).to(dtype)
            other.grad = mine.grad.float()
        optimizer.step()
        reference.step()
    if dtype == torch.bfloat16:
        assert_equal(optimizer.fp32_params(), theirs)
    for master, other in zip(optimizer.fp32_params(), theirs, strict=True):
        torch.testing.assert_close(master, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"master_weight_bits": 24}, {"master_weights": True}])
def test_small_updates_are_not_lost_with_master_weights(cls, settings):
    params = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer = cls(params, lr=5e-4, **settings)  # less than half of the distance to the next bfloat16
    for _ in range(64):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert (params[0] < 1).all() and len(optimizer.state[params[0]]) == len(cls.rule.states) + 2


def test_stochastic_rounding_without_an_op_is_refused_in_words():
    params = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer = Lion(params, stochastic_rounding=True)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(NotImplementedError, match="stochastic_rounding needs the compiled"):
        optimizer.step()
    assert params[0].eq(1).all()


def test_stochastic_rounding_is_unbiased_and_has_the_bits_of_the_cpu_op(compiled_cls, ops):
    ours, theirs = twin_params([(20_000,)], torch.bfloat16)
    twin_cls = optimizer_of(OnCpuOp, compiled_cls.base)
    twin_cls.module = ops(OnCpuOp, compiled_cls.base)
    optimizers = [
        cls(params, lr=1e-3, stochastic_rounding=True) for cls, params in ((compiled_cls, ours), (twin_cls, theirs))
    ]
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        with torch.no_grad():
            params[0].fill_(1.0)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert_equal(ours, theirs)
    below = 1 - 2.0**-8  # the next bfloat16
    assert ours[0].eq(1).logical_or(ours[0].eq(below)).all()
    # An element is rounded down with a probability of 0.256, so the mean has a standard deviation of 1.2e-5.
    assert ours[0].double().mean().item() == pytest.approx(1 - 1e-3, abs=8e-5)
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        params[0].grad = torch.linspace(-1, 1, 20_000).to(torch.bfloat16)
        optimizer.step()
    assert_equal(ours, theirs)


def test_a_step_also_writes_params_in_16_bits(cls):
    params, _ = twin_params(SHAPES)
    optimizer = cls(params, lr=0.1)
    outs = [torch.zeros(param.shape, dtype=torch.bfloat16) for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step(lowp_out=outs)
    assert_equal(outs, [param.to(torch.bfloat16) for param in params])


def test_an_op_of_other_states_or_hyper_parameters_is_refused(ops):
    class OtherRule(type(Lion.rule)):
        hyper_names = ("lr", "beta2", "beta1", "weight_decay")

    module = ops(OnCpuOp, Lion)
    assert of_rule(module, Lion.rule) is module
    with pytest.raises(TypeError, match="_cpu_lion was built for other hyper-parameters or states than OtherRule has"):
        of_rule(module, OtherRule())
    with pytest.raises(TypeError, match="_cpu_lion was built for other .* than AdagradRule has"):
        of_rule(module, Adagrad.rule)


# Grads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grads", [False, True])
def test_clipping_is_that_of_torch_and_writes_no_grad(cls, zero_grads):
    ours, theirs = twin_params(SHAPES)
    clipped, reference = cls(ours, lr=0.1), cls(theirs, lr=0.1)
    for _ in range(3):
        same_grads(ours, theirs)
        before = [param.grad.clone() for param in ours]
        norm = clipped.clip_grad_norm_(0.5)
        assert_equal([param.grad for param in ours], before)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5))
        clipped.step(zero_grads=zero_grads)
        reference.step()
    assert all(param.grad.eq(0).all() for param in ours) == zero_grads
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_grad_scaler_steps_are_those_of_the_unscaled_grads_and_skip_infinities(cls):
    ours, theirs = twin_params(SHAPES)
    scaled, plain = cls(ours), cls(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x = torch.randn(5000)
        if step == 2:
            x[7] = torch.inf
        scaler.scale((ours[0] * x).sum()).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
        if step != 2:
            theirs[0].grad = x
            plain.step()
    assert scaled.state[ours[0]]["step"] == 3 and scaler.get_scale() == 512.0
    assert_equal(ours, theirs)


def test_a_step_in_the_background_has_the_bits_of_a_step(cls):
    ours, theirs = twin_params(SHAPES)
    background, plain = cls(ours, state_dtype="8bit"), cls(theirs, state_dtype="8bit")
    for _ in range(3):
        same_grads(ours, theirs)
        background.step_async(threads=1).wait()
        plain.step()
    assert_equal(ours, theirs)
    assert_same_states(background, plain)


def test_a_step_in_the_backward_pass_has_the_bits_of_a_step(cls):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    twin = copy.deepcopy(model)
    ours, theirs = cls(model.parameters()), cls(twin.parameters())
    handle = adamops.step_in_backward(model, ours)
    for _ in range(3):
        x = torch.randn(5, 8)
        model(x).square().sum().backward()
        theirs.zero_grad()
        twin(x).square().sum().backward()
        theirs.step()
    assert_equal(model.parameters(), twin.parameters())
    handle.remove()


def test_dtensors_are_updated_as_their_local_tensors(cls, mesh):
    ours, theirs = twin_params([(5000,)])
    sharded = torch.nn.Parameter(DTensor.from_local(ours[0].detach(), mesh, [Replicate()]))
    optimizer, plain = cls([sharded], state_dtype="8bit"), cls(theirs, state_dtype="8bit")
    for _ in range(2):
        theirs[0].grad = torch.randn(5000)
        sharded.grad = DTensor.from_local(theirs[0].grad.clone(), mesh, [Replicate()])
        optimizer.step()
        plain.step()
    assert torch.equal(sharded.to_local(), theirs[0])
    saved = optimizer.state_dict()["state"][0]
    assert all(isinstance(saved[name], DTensor) for name in names_of(cls.rule.states))


# Checkpoints ----------------------------------------------------------------------------------------------------------

PRECISIONS = [
    {},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "8bit"},
    {"state_dtype": "8bit", "master_weight_bits": 24},
    {"master_weights": True},
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_to_the_same_bits(cls, precision, dtype):
    params, _ = twin_params(SHAPES, dtype)
    optimizer = cls(params, **precision)
    train(optimizer, params)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = cls(twins, **precision)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_states(optimizer, loaded)
    for _ in range(2):
        same_grads(params, twins)
        optimizer.step()
        loaded.step()
    assert_equal(params, twins)
    assert_same_states(optimizer, loaded)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_goes_on_to_the_same_bits(cls, copied):
    params, _ = twin_params(SHAPES)
    optimizer = cls(params, state_dtype="8bit", weight_decay=0.1)
    train(optimizer, params)
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    same_grads(params, twins)
    optimizer.step()
    twin.step()
    assert_equal(params, twins)
    assert_same_states(optimizer, twin)


def test_quantized_states_are_saved_by_names_of_their_own_or_as_floats(cls):
    params, _ = twin_params(SHAPES)
    optimizer = cls(params, state_dtype="8bit")
    train(optimizer, params)
    names = names_of(cls.rule.states)
    saved = optimizer.state_dict()["state"][0]
    assert saved.keys() == {"step", *(f"quantized_{name}" for name in names), *([SCALES] if names else [])}
    floats = optimizer.state_dict(dequantize=True)["state"][0]
    assert floats.keys() == {"step", *names} and all(floats[name].dtype == torch.float32 for name in names)


def test_a_checkpoint_of_torch_is_loaded_where_it_has_the_states_of_the_rule():
    ours, theirs = twin_params(SHAPES)
    source = torch.optim.Adagrad(theirs, lr=1e-2)
    same_grads(ours, theirs)
    source.step()
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    optimizer = Adagrad(ours)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    same_grads(ours, theirs)
    optimizer.step()
    source.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_of_another_rule_is_refused_in_words():
    params, _ = twin_params([(8,)])
    source = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="param group 0 has no betas; this is not the state of a Lion optimizer"):
        Lion(params).load_state_dict(source.state_dict())
    train(source, params)
    with pytest.raises(
        ValueError, match="param 0 has no 'step', 'exp_avg' in its state but 'momentum_buffer'; this is"
    ):
        Lion(params).load_state_dict(source.state_dict())
    adagrad = Adagrad(params)
    groups = adagrad.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="has no 'sum' in its state but .*not the state of an Adagrad optimizer"):
        adagrad.load_state_dict({"state": {0: {"step": 3}}, "param_groups": groups})
    assert not adagrad.state


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("lr", -1.0, ValueError, r"Invalid learning rate: -1\.0; expected 0 or more"),
        ("lr", "1e-3", TypeError, "Invalid lr: '1e-3', a str; expected a number"),
        ("weight_decay", float("nan"), ValueError, "Invalid weight_decay: nan; expected 0 or more"),
        ("betas", (0.9, 1.0), ValueError, "Invalid beta parameter at index 1: 1.0; expected 0 <= beta < 1"),
        ("betas", 0.9, TypeError, r"Invalid betas: 0\.9; expected two numbers, such as \(0\.9, 0\.99\)"),
        ("maximize", "yes", TypeError, "Invalid maximize: 'yes'; expected True or False"),
        ("capturable", 2, TypeError, "Invalid capturable: 2; expected True or False"),
    ],
)
def test_bad_settings_are_refused_in_words(setting, value, error, message):
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(error, match=message):
        Lion(params, **{setting: value})
    optimizer = Lion([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=message.replace(";", " in param group 1;", 1)):
        optimizer.add_param_group({"params": params, setting: value})


def test_settings_that_the_rule_does_not_have_or_that_are_missing_are_refused_in_words():
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match=r"Lion\(\) got an unexpected argument 'maximise'"):
        Lion(params, maximise=True)

    class Forgetful(RuleOptimizer):
        rule = Lion.rule

    with pytest.raises(TypeError, match="a Lion optimizer needs the setting 'weight_decay'"):
        Forgetful(params, lr=1e-3, betas=(0.9, 0.99))


def test_a_setting_that_became_no_number_is_found_before_anything_is_written(cls):
    params, before = twin_params([(4,), (5,)])
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.param_groups[1]["weight_decay"] = "much"
    with pytest.raises(TypeError, match="Invalid weight_decay: 'much', a str in param group 1; expected a number"):
        optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


def test_hyper_parameters_have_the_names_and_the_order_of_the_rule():
    optimizer = Lion([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.5), betas=[0, 0.5], weight_decay=1)
    assert Lion.rule.hyper_names == ("lr", "beta1", "beta2", "weight_decay")
    assert optimizer._step_settings(optimizer.param_groups[0], "").hyper == (0.5, 0.0, 0.5, 1.0)


def test_a_rule_that_the_engine_could_not_run_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="The first of the settings of Bad must be the learning rate, 'lr'"):

        class Bad(Rule):
            settings = (Flag("nesterov"), Rate("lr"))

    with pytest.raises(TypeError, match="The states of Bad need different names, and none is 'step'"):

        class Bad(Rule):  # noqa: F811
            settings = (Rate("lr"),)
            states = (State("sum"), State("step"))

    with pytest.raises(TypeError, match="Of the states of Bad only the last may be optional"):

        class Bad(Rule):  # noqa: F811
            settings = (Rate("lr"),)
            states = (State("a", optional=True), State("b"))


# Quantized states whose first one is unsigned -------------------------------------------------------------------------

UNSIGNED_FIRST = (State("sum", signed=False), State("exp_avg"))


def values_with_infinities(count=1000):
    values = {"sum": torch.rand(count) * 10, "exp_avg": torch.randn(count)}
    values["sum"][:256] = torch.linspace(0, 10, 256)  # its largest element has the largest quantized value
    values["sum"][3], values["exp_avg"][300], values["exp_avg"][999] = torch.inf, torch.nan, -torch.inf
    marked = torch.zeros(count, dtype=torch.bool)
    marked[[3, 300, 999]] = True
    return values, marked


@pytest.mark.parametrize("step", [None, 1, 77])
def test_elements_that_are_not_finite_are_marked_in_an_unsigned_first_state(step):
    values, marked = values_with_infinities()
    quantized, scales = quantization.quantize_states(values, UNSIGNED_FIRST, step)
    assert scales[:, 0].signbit().tolist() == [True, True, False, True] and not scales[:, 1].signbit().any()
    block = torch.arange(1000) // 256
    assert quantized["sum"].dtype == torch.uint8
    assert torch.equal((quantized["sum"] == 255) & (block != 2), marked)
    assert torch.equal(quantized["exp_avg"] == -128, torch.zeros(1000, dtype=torch.bool))
    found = quantization.dequantize_states(quantized, scales, UNSIGNED_FIRST)
    assert torch.equal(found["sum"].isnan(), marked) and found["exp_avg"].isfinite().all()
    clean = ~marked
    torch.testing.assert_close(found["sum"][clean], values["sum"][clean], rtol=0.1, atol=1e-4)


def test_marked_elements_get_back_the_quantized_values_that_they_came_from():
    values, _ = values_with_infinities()
    quantized, scales = quantization.quantize_states(values, UNSIGNED_FIRST, step=5)
    found = quantization.dequantize_states(quantized, scales, UNSIGNED_FIRST)
    again, scales_again = quantization.quantize_states(found, UNSIGNED_FIRST)
    assert torch.equal(scales, scales_again)
    assert all(torch.equal(quantized[name], again[name]) for name in quantized)


def test_255_is_a_number_in_a_block_without_marks():
    quantized, scales = quantization.quantize_states({"sum": torch.linspace(0, 1, 256)}, UNSIGNED_FIRST[:1], step=65535)
    assert quantized["sum"].max() == 255
    assert quantization.dequantize_states(quantized, scales, UNSIGNED_FIRST[:1])["sum"].isfinite().all()


def test_an_infinite_grad_stays_with_its_elements_in_8bit_states(cls):
    params = [torch.nn.Parameter(torch.ones(5000))]
    optimizer = cls(params, state_dtype="8bit")
    for step in range(3):
        params[0].grad = torch.ones(5000)
        if step == 1:
            params[0].grad[[17, 4999]] = torch.inf
        optimizer.step()
    assert params[0].isnan().nonzero().flatten().tolist() == ([17, 4999] if cls.rule.states else [])

"""Bad calls: the message says what is wrong and what to do, and nothing is written."""

import collections
import copy
import gc
import weakref

import pytest
import torch

from adamops import DeepSpeedCPUAdam, FusedAdam
from adamops.ops.adam.adam import adam_settings
from adamops.optim.batch import Batch, check_params_and_grads


def snapshot(optimizer, params):
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


def assert_untouched(optimizer, params, before):
    old_params, old_state = before
    for param, old in zip(params, old_params, strict=True):
        if param.device.type == "cpu" and param.shape == old.shape:
            assert torch.equal(param.detach(), old)
    state = optimizer.state_dict()
    assert state["param_groups"] == old_state["param_groups"]
    assert state["state"].keys() == old_state["state"].keys()
    for key, entry in old_state["state"].items():
        for name, value in entry.items():
            now = state["state"][key][name]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", -1.0, "Invalid learning rate: -1.0"),
        ("lr", float("nan"), "Invalid learning rate: nan"),
        ("betas", (torch.tensor([0.1, 0.2]), 0.9), r"Tensor betas\[0\] must be 1-element, has shape \(2,\)"),
        ("lr", torch.tensor([0.1, 0.2]), r"Tensor lr must be 1-element, has shape \(2,\)"),
        ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
        ("weight_decay", -0.1, "Invalid weight_decay value: -0.1"),
        ("betas", (1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
        ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
        ("betas", (-0.1, 0.9), "Invalid beta parameter at index 0: -0.1"),
    ],
)
def test_hyper_parameters_out_of_range(Adam, setting, value, message):
    with pytest.raises(ValueError, match=message):
        Adam([torch.nn.Parameter(torch.ones(3))], **{setting: value})
    optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=f"{message} in param group 1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], setting: value})
    assert len(optimizer.param_groups) == 1


NO_NUMBERS = [
    ("lr", "1e-2", TypeError, "Invalid lr: '1e-2', a str.*expected a number: take it out of its quotes"),
    ("lr", None, TypeError, "Invalid lr: None, a NoneType.*expected a number"),
    ("lr", (1e-3,), TypeError, r"Invalid lr: \(0.001,\), a tuple"),
    ("lr", torch.ones((), device="meta"), ValueError, "Tensor lr has no value.*meta"),
    ("lr", torch.ones((), dtype=torch.complex64), TypeError, "Tensor lr is torch.complex64.*expected a real number"),
    ("eps", "1e-8", TypeError, "Invalid eps: '1e-8'"),
    ("eps", (1e-30, 1e-3), TypeError, "Invalid eps: .*a tuple"),
    ("eps", torch.ones(2), ValueError, r"Tensor eps must be 1-element, has shape \(2,\)"),
    ("weight_decay", "0", TypeError, "Invalid weight_decay: '0'"),
    ("weight_decay", torch.ones(2), ValueError, "Tensor weight_decay must be 1-element"),
    ("weight_decay", torch.ones((), device="meta"), ValueError, "Tensor weight_decay has no value"),
    ("betas", None, TypeError, "Invalid betas: None.*expected two numbers"),
    ("betas", 0.9, TypeError, "Invalid betas: 0.9.*expected two numbers"),
    ("betas", (0.9, 0.99, 0.999), TypeError, r"Invalid betas: \(0.9, 0.99, 0.999\)"),
    ("betas", ("0.9", 0.99), TypeError, r"Invalid betas\[0\]: '0.9'"),
    ("betas", (0.9, torch.ones((), device="meta")), ValueError, r"Tensor betas\[1\] has no value"),
]


@pytest.mark.parametrize(("setting", "value", "error", "message"), NO_NUMBERS)
def test_hyper_parameters_that_are_no_numbers(Adam, setting, value, error, message):
    with pytest.raises(error, match=message):
        Adam([torch.nn.Parameter(torch.ones(3))], **{setting: value})
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Adam([first])
    with pytest.raises(error, match=f"{message}.*param group 1|param group 1.*{message}|in param group 1"):
        optimizer.add_param_group({"params": [second], setting: value})
    loaded = copy.deepcopy({**optimizer.state_dict()})
    loaded["param_groups"][0][setting] = value
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(loaded)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("setting", "value", "error", "message"), NO_NUMBERS)
def test_hyper_parameters_changed_to_no_numbers_are_found_before_any_group_is_updated(
    Adam, setting, value, error, message
):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = Adam([{"params": [param]} for param in params])
    for stepped in (0, 1):
        before = [param.detach().clone() for param in params]
        good = optimizer.param_groups[1][setting]
        optimizer.param_groups[1][setting] = value
        with pytest.raises(error, match=message):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        assert stepped == 0 or optimizer.state[params[0]]["step"] == 1
        optimizer.param_groups[1][setting] = good
        optimizer.step()


@pytest.mark.parametrize("value", [(0.9, 0.95), 0.5, "true", None, [True], torch.ones(2)])
@pytest.mark.parametrize("flag", ["bias_correction", "amsgrad", "maximize", "adamw_mode", "stochastic_rounding"])
def test_flags_that_are_neither_true_nor_false(Adam, flag, value):
    name = "adam_?w_mode" if flag == "adamw_mode" else flag
    with pytest.raises(TypeError, match=f"Invalid {name}: .*expected True or False"):
        Adam([torch.nn.Parameter(torch.ones(3))], **{flag: value})
    if flag != "adamw_mode":
        optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
        with pytest.raises(TypeError, match=f"Invalid {name}.*expected True or False"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], flag: value})


@pytest.mark.smoke
@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
def test_betas_in_the_place_of_bias_correction(cls):
    """torch has them third, DeepSpeed has bias_correction there."""
    with pytest.raises(TypeError, match=r"Invalid bias_correction: \(0.9, 0.95\).*pass betas by name"):
        cls([torch.nn.Parameter(torch.ones(3))], 1e-3, (0.9, 0.95))
    for flag in (True, False, 1, 0):
        cls([torch.nn.Parameter(torch.ones(3))], 1e-3, flag, (0.9, 0.95))


@pytest.mark.smoke
@pytest.mark.parametrize("flag", ["set_grad_none", "master_weights", "capturable", "adam_w_mode"])
def test_flags_of_fused_adam(flag):
    with pytest.raises(TypeError, match=f"Invalid {flag}: 0.01; expected True or False"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], **{flag: 0.01})
    with pytest.raises(TypeError, match="Invalid fp32_optimizer_states: None"):
        DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(3))], fp32_optimizer_states=None)


def test_loaded_betas_out_of_range_change_nothing(Adam):
    param = torch.nn.Parameter(torch.ones(10))
    param.grad = torch.ones(10)
    optimizer = Adam([param])
    optimizer.step()
    before = optimizer.state_dict()
    loaded = copy.deepcopy(before)
    loaded["param_groups"][0]["betas"] = (1.5, 0.9)
    loaded["state"][0]["step"] = 77
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0: 1.5 in param group 0"):
        optimizer.load_state_dict(loaded)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and int(after["state"][0]["step"]) == 1


def test_betas_changed_out_of_range_after_construction(Adam):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Adam([param])
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0: 1.0 in param group 0"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (
            torch.zeros(3, dtype=torch.float64),
            TypeError,
            r"param 0 \(shape \(3,\), torch.float64.*use float32, bfloat16",
        ),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "torch.complex64.*dtype is not supported"),
        (torch.zeros(1).expand(4), ValueError, r"strides \(0,\), which overlap or leave gaps"),
        (torch.zeros(4, 6)[:, ::2], ValueError, r"strides \(6, 2\), which overlap or leave gaps"),
        (torch.zeros(6).as_strided((3, 2), (1, 1)), ValueError, r"strides \(1, 1\), which overlap"),
        (torch.zeros(3, 3).to_sparse(), TypeError, "layout torch.sparse_coo; only dense"),
    ],
    ids=["float64", "complex", "expanded", "gaps", "overlapping", "sparse"],
)
def test_params_that_cannot_be_updated(Adam, param, error, message):
    good = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        Adam([torch.nn.Parameter(param)])
    with pytest.raises(error, match="param group 1, param 1"):
        Adam([good]).add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(param)]})


def test_params_outside_host_memory_are_refused_at_the_step_only():
    """An optimizer may be made for a model on the GPU: ZeRO-Offload then puts shards on the CPU into its groups."""
    there, here = torch.nn.Parameter(torch.zeros(3, device="meta")), torch.nn.Parameter(torch.ones(3))
    optimizer = DeepSpeedCPUAdam([here, there])
    here.grad, there.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="param group 0, param 1 .*meta.* is not on the CPU; move the params"):
        optimizer.step()
    assert torch.equal(here.detach(), torch.ones(3)) and not optimizer.state
    optimizer.param_groups[0]["params"] = [here]
    optimizer.step()


def test_arguments_that_torch_refuses(Adam):
    with pytest.raises(TypeError, match="params argument"):
        Adam(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="empty parameter list"):
        Adam([])
    with pytest.raises(TypeError, match="ordered collection"):
        Adam([{"params": {torch.nn.Parameter(torch.ones(2))}}])
    with pytest.raises(TypeError, match="Tensors"):
        Adam([1, 2])
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Adam([{"params": [param]}, {"params": [param]}])
    with pytest.raises(ValueError, match="leaf"):
        Adam([param * 2])


def sparse_grad(param):
    param.grad = torch.ones_like(param).to_sparse()


def grad_of_other_shape(param):
    param.grad = torch.ones_like(param)
    param.grad.data = torch.ones(2, 2)


def grad_of_other_order(param):
    param.grad = torch.ones_like(param)
    param.grad.data = torch.ones(5, 4)


def grad_of_other_dtype(param):
    param.grad = torch.ones_like(param)
    param.grad.data = torch.ones(4, 5, dtype=torch.float64)


def param_of_other_dtype(param):
    param.grad = torch.ones_like(param)
    param.data = param.data.double()
    param.grad.data = param.grad.data.double()


def param_of_other_shape(param):
    param.data = param.data[:2]
    param.grad = torch.ones_like(param)


BAD_STEPS = [
    (
        sparse_grad,
        TypeError,
        "param group 1, param 1 .* grad of layout torch.sparse_coo; sparse grads are not supported",
    ),
    (grad_of_other_shape, ValueError, r"param group 1, param 1 .*\(4, 5\).* grad of shape \(2, 2\)"),
    (grad_of_other_order, ValueError, r"param group 1, param 1 .*\(4, 5\).* grad of shape \(5, 4\)"),
    (grad_of_other_dtype, TypeError, "param group 1, param 1 .* grad of torch.float64; use torch.float32"),
    (param_of_other_dtype, TypeError, "param group 1, param 1 .*torch.float64.*dtype is not supported"),
    (param_of_other_shape, ValueError, r"param group 1, param 1 .*\(2, 5\).* state 'exp_avg' of shape \(4, 5\)"),
]


# A param that has no states yet may have any shape.
BAD_FIRST_STEPS = [bad for bad in BAD_STEPS if bad[0] is not param_of_other_shape]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_STEPS, ids=[bad[0].__name__ for bad in BAD_STEPS])
def test_bad_steps_are_found_before_anything_is_written(Adam, spoil, error, message):
    check_bad_step(Adam, spoil, error, message, stepped=True)


@pytest.mark.parametrize(
    ("spoil", "error", "message"), BAD_FIRST_STEPS, ids=[bad[0].__name__ for bad in BAD_FIRST_STEPS]
)
def test_bad_first_steps_are_found_before_anything_is_written(Adam, spoil, error, message):
    check_bad_step(Adam, spoil, error, message, stepped=False)


def check_bad_step(Adam, spoil, error, message, stepped):
    params = [torch.nn.Parameter(torch.randn(4, 5)) for _ in range(4)]
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    for param in params:
        param.grad = torch.randn_like(param)
    if stepped:
        optimizer.step()
    spoil(params[3])
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_untouched(optimizer, params, before)


def test_grad_on_another_device():
    """torch itself does not let a grad live elsewhere, so the check is called directly."""
    settings = adam_settings(1e-3, 0.9, 0.999, 1e-8, 0.0)
    batch = Batch(["param group 0, param 0"], settings, [torch.ones(2)], [torch.ones(2, device="meta")], [])
    with pytest.raises(
        ValueError, match="param group 0, param 0 .*cpu.* has a grad on meta; copy it to the param's device"
    ):
        check_params_and_grads(batch)


def state_of_other_shape(state):
    state["exp_avg_sq"] = torch.zeros(5, 4)


def state_of_other_dtype(state):
    state["exp_avg"] = state["exp_avg"].double()


def state_on_other_device(state):
    state["exp_avg"] = state["exp_avg"].to("meta")


def state_without_gaps(state):
    state["exp_avg"] = torch.zeros(4, 10)[:, ::2]


def state_that_is_no_tensor(state):
    state["exp_avg"] = [0.0] * 20


def negative_step(state):
    state["step"] = -1


def endless_step(state):
    state["step"] = 2**53


def step_past_64_bits(state):
    state["step"] = 2**70


def step_that_is_no_number(state):
    state["step"] = "1"


def step_tensor_of_two(state):
    state["step"] = torch.ones(2)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            state_of_other_shape,
            ValueError,
            r"param 1 .* state 'exp_avg_sq' of shape \(5, 4\); it belongs to another model",
        ),
        (state_of_other_dtype, TypeError, "param 1 .* state 'exp_avg' of torch.float64"),
        (state_on_other_device, ValueError, "param 1 .* state 'exp_avg' on meta"),
        (state_without_gaps, ValueError, r"param 1 has strides \(5, 1\), its state 'exp_avg' has \(10, 2\)"),
        (state_that_is_no_tensor, TypeError, "param 1 .* has a list as state 'exp_avg'"),
        (negative_step, ValueError, "param 1 has the step count -1; expected 0 or more"),
        (endless_step, ValueError, f"param 1 has the step count {2**53}; expected 0 or more, and less than {2**53}"),
        (step_past_64_bits, ValueError, f"param 1 has the step count {2**70}"),
        (step_that_is_no_number, TypeError, "param 1 has a str as step count; expected an int"),
        (step_tensor_of_two, ValueError, r"param 1 has a step count of shape \(2,\); expected one number"),
    ],
)
def test_states_replaced_by_the_user(Adam, spoil, error, message):
    params = [torch.nn.Parameter(torch.randn(4, 5)) for _ in range(2)]
    optimizer = Adam(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    spoil(optimizer.state[params[1]])
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.update(exp_avg=torch.zeros(3)), ValueError, r"param 0 .*\(4, 5\).* 'exp_avg' of shape \(3,\)"),
        (lambda s: s.pop("exp_avg_sq"), ValueError, "has no 'exp_avg_sq' in its state but 'step', 'exp_avg'"),
        (lambda s: (s.clear(), s.update(momentum_buffer=torch.zeros(4, 5))), ValueError, "not the state of an Adam"),
    ],
)
def test_loading_a_state_that_does_not_fit_changes_nothing(Adam, change, error, message):
    param = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = Adam([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["lr"] = 123.0
    change(bad["state"][0])
    before = snapshot(optimizer, [param])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    assert_untouched(optimizer, [param], before)
    optimizer.step()


def test_params_that_share_memory(Adam):
    base = torch.randn(100)
    params = [torch.nn.Parameter(base[:60]), torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(base[50:])]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}])
    before = base.clone()
    with pytest.raises(
        ValueError, match="param group 0, param 0 and param group 1, param 0 share memory; pass each piece"
    ):
        optimizer.step()
    assert torch.equal(base, before) and not optimizer.state
    with pytest.warns(UserWarning, match="duplicate"):
        twice = Adam([params[0], params[0]])
    with pytest.raises(ValueError, match="share memory"):
        twice.step()
    halves = [torch.nn.Parameter(half) for half in base.split(50)]
    for half in halves:
        half.grad = torch.ones(50)
    Adam(halves).step()  # neighbours are no overlap


ROW = {
    "param": 0,
    "grad": 0,
    "states": [0, 0],
    "numel": 0,
    "param_dtype": 0,
    "grad_dtype": 0,
    "state_dtype": 0,
    "step": 1,
}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([{**ROW, "grads": 0}], ValueError, "a field of an unknown name"),
        ([{key: value for key, value in ROW.items() if key != "grad"}], ValueError, "a row of a table has no grad"),
        ([{**ROW, "states": [0]}], ValueError, "a row's states are not 2 addresses"),
        ([{**ROW, "states": None}], ValueError, "a row of a table has no states"),
        ([{**ROW, "param_dtype": 99}], ValueError, "param_dtype is 99, which is no dtype"),
        ([{**ROW, "lowp_out": 64}], ValueError, "a row of a table has no lowp_dtype"),
        ([{**ROW, "state_dtype": 99}], ValueError, "state_dtype is 99, which is no dtype"),
        ([{**ROW, "numel": "1"}], TypeError, "numel of a row is not an int of 0 or more"),
        ([{**ROW, "numel": -1}], TypeError, "numel of a row is not an int of 0 or more"),
        ([{**ROW, "param": 2**64}], TypeError, "param of a row is not an int of 0 or more"),
        ([[0, 0]], TypeError, "a row of a table is not a dict"),
        ([{**ROW, "counted_in": 1}], TypeError, "counted_in of a row is not a dict"),
        ([{**ROW, "counted_in": {}}, ROW], ValueError, "some rows have counted_in, and others have not"),
    ],
)
def test_the_op_refuses_rows_that_are_not_of_a_table(cpu_adam, rows, error, words):
    with pytest.raises(error, match=words):
        cpu_adam.table_of_rows(rows, 2)


def test_the_op_refuses_dtypes_that_do_not_go_together_and_targets_that_it_lacks(cpu_adam):
    table = cpu_adam.table_of_rows([{**ROW, "param_dtype": 1, "grad_dtype": 2}], 2)
    with pytest.raises(ValueError, match="no kernel for these dtypes"):
        cpu_adam.step_with_scalars(table, [(0.0,) * cpu_adam.SCALAR_COUNT], 0, 1)
    with pytest.raises(ValueError, match="mode is 2, expected less than 2"):
        cpu_adam.step_with_scalars(table, [(0.0,) * cpu_adam.SCALAR_COUNT], 2, 1)
    with pytest.raises(ValueError, match="state_count is 4, expected 2 to 3"):
        cpu_adam.table_of_rows([ROW], 4)
    with pytest.raises(ValueError, match="unknown kind of master 4"):
        cpu_adam.table_of_rows([ROW], 2, 4)
    with pytest.raises(ValueError, match="no SIMD target 'avx1024' in this build; it has: .*baseline"):
        cpu_adam.use_target("avx1024")


def test_removed_param_groups_are_released():
    optimizer, alive = DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(4))]), []
    for _ in range(3):
        param = torch.nn.Parameter(torch.zeros(100))
        param.grad = torch.ones(100)
        optimizer.add_param_group({"params": [param]})
        optimizer.step()
        alive.append(weakref.ref(param))
        del optimizer.state[param], optimizer.param_groups[1:], param
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    optimizer.step()
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_a_precision_setting_in_place_of_another_key_is_noticed():
    param = torch.nn.Parameter(torch.zeros(5000))
    optimizer = DeepSpeedCPUAdam([{"params": [param], "name": "weights"}])
    param.grad = torch.ones(5000)
    optimizer.step()
    del optimizer.param_groups[0]["name"]
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    with pytest.raises(ValueError, match="The precision of param group 0 was set"):
        optimizer.step()


@pytest.mark.parametrize("key", ["decoupled_weight_decay", "adamw_mode", "adam_w_mode"])
def test_a_group_cannot_have_another_kind_of_weight_decay(key):
    param = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=f"param group 0 has {key}=False: whether weight decay is decoupled"):
        DeepSpeedCPUAdam([{"params": [param], key: False}])
    DeepSpeedCPUAdam([{"params": [param], key: True}])
    DeepSpeedCPUAdam([{"params": [param], key: False}], adamw_mode=False)


def test_params_that_share_memory_take_turns_but_never_the_same_step():
    """As with torch, one may take over from the other, as the original of a parametrization does from a weight."""
    base = torch.zeros(1000)
    params = [torch.nn.Parameter(base[:600]), torch.nn.Parameter(base[500:]), torch.nn.Parameter(torch.zeros(5))]
    optimizer = DeepSpeedCPUAdam(params)
    for chosen in ((0, 2), (1, 2), (0, 2)):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i in chosen else None
        optimizer.step()
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(ValueError, match="param 0 and param group 0, param 1 share memory"):
        optimizer.step()


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to_mkldnn(), lambda t: t])
def test_frozen_params_of_any_kind_do_not_hinder_lowp_outs(make):
    param, frozen = torch.nn.Parameter(torch.zeros(50)), make(torch.eye(4))
    others = [torch.nn.Parameter(frozen, requires_grad=False) for _ in range(2)]
    optimizer = DeepSpeedCPUAdam([param, *others], lr=0.5)
    param.grad, out = torch.ones(50), torch.zeros(50, dtype=torch.bfloat16)
    optimizer.step(lowp_out=[out, None, None])
    assert torch.allclose(out.float(), torch.tensor(-0.5))


def test_a_lazy_frozen_param_with_a_remainder_is_refused_for_a_lowp_out_before_anything_is_written():
    param, frozen = (torch.nn.Parameter(torch.randn(50).bfloat16()) for _ in range(2))
    optimizer = DeepSpeedCPUAdam([param, frozen], lr=0.5, master_weight_bits=32)
    param.grad, frozen.grad = torch.ones(50).bfloat16(), torch.ones(50).bfloat16()
    optimizer.step()
    frozen.grad = None
    frozen.data = torch._neg_view(frozen.data.clone())
    before = [param.detach().clone(), optimizer.state[param]["exp_avg"].clone()]
    outs = [torch.zeros(50, dtype=torch.bfloat16) for _ in range(2)]
    with pytest.raises(TypeError, match="a param with a lowp_out is lazily negated or conjugated"):
        optimizer.step(zero_grads=True, lowp_out=outs)
    assert torch.equal(param, before[0]) and torch.equal(optimizer.state[param]["exp_avg"], before[1])
    assert optimizer.state[param]["step"] == 1 and not any(out.any() for out in outs) and param.grad.all()
    with pytest.raises(TypeError, match="lazily negated"):
        optimizer.fp32_params()


def test_groups_and_states_of_other_kinds_that_torch_takes_are_taken():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = DeepSpeedCPUAdam([param], lr=0.5)
    optimizer.param_groups = torch.optim.AdamW([param], lr=0.5).param_groups
    optimizer.state = collections.UserDict()
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2 and torch.allclose(param, torch.tensor(-1.0), atol=0.02)

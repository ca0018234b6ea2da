"""adamops.functional: a call on lists of tensors does what a step of an optimizer does, bit-identically."""

import contextlib
import functools
import inspect
import random

import pytest
import torch
from frameworks.pages import script_of
from optimizers import HOST, EmulatedBackend
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw as torch_adamw
from twins import assert_close, assert_equal

import adamops
from adamops import FusedAdam
from adamops.functional import adam_, adamw_
from adamops.ops.adam.adam import ADAM, ADAMW
from adamops.optim import tensor_lists
from adamops.optim.backends.loading import load_backend
from adamops.optim.backends.torch import TorchBackend

NAMES = {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs", "max_exp_avg_sq": "max_exp_avg_sqs"}
NAMES |= {"block_scales": "block_scales", "master_param": "master_params", "param_remainder": "param_remainders"}
SIZES = [0, 1, 33, 5000, 9000]


def use_backend(monkeypatch, backend):
    monkeypatch.setattr(tensor_lists, "_backend", lambda rule, device: backend)


def slow(backend):
    backend._reader = None
    return backend


@pytest.fixture(params=["fast", "slow", "CUDA", "CUDA, slow", "pure PyTorch"])
def path(request, monkeypatch):
    """Has calls done by each backend, and optimizers too: returns the backend that both have."""
    if request.param == "pure PyTorch":
        backend = TorchBackend()
    elif "CUDA" in request.param:
        backend = EmulatedBackend(request.getfixturevalue("cuda_op"))
    else:
        backend = load_backend(ADAMW, HOST)
    if "slow" in request.param:
        slow(backend)
    use_backend(monkeypatch, backend)
    return backend


def optimizer_on(backend, *args, **kwargs):
    optimizer = FusedAdam(*args, **kwargs)
    optimizer._backends = {HOST: backend}
    return optimizer


def params_of(sizes, dtype=torch.float32):
    return [torch.randn(size).to(dtype) for size in sizes]


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def columns_of(optimizer, params):
    """The states of an optimizer as the arguments of a call, copied."""
    states = [optimizer.state[param] for param in params]
    columns = {NAMES[key]: [state.get(key) for state in states] for key in NAMES if any(key in s for s in states)}
    return {name: [None if t is None else t.clone() for t in column] for name, column in columns.items()}


def assert_same(columns, others):
    for name, column in columns.items():
        for ours, theirs in zip(column, others[name], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def random_arguments(pure_pytorch, seed):
    """Settings of an optimizer with the arguments of a call that mean the same, and the dtype of the params."""
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    settings = {"lr": draw.choice([0.0, 1e-3, torch.tensor(0.01)]), "weight_decay": draw.choice([0.0, 0.1])}
    settings |= {"betas": (draw.random(), 0.99), "eps": draw.choice([1e-8, 1e-3]), "adam_w_mode": draw.random() < 0.5}
    for flag in ("amsgrad", "maximize", "bias_correction"):
        settings[flag] = draw.random() < 0.5
    call = dict(settings)
    (call["beta1"], call["beta2"]), call["decoupled_weight_decay"] = call.pop("betas"), call.pop("adam_w_mode")
    call.pop("amsgrad")  # follows from the lists
    settings["state_dtype"] = draw.choice([torch.float32, torch.bfloat16, "8bit"])
    settings["master_weight_bits"] = draw.choice([None, 24, 32])
    if settings["master_weight_bits"] != 32 and not pure_pytorch and draw.random() < 0.5:
        rounding = {"stochastic_rounding": True, "stochastic_rounding_seed": draw.randrange(1000)}
        settings |= rounding
        call |= rounding
    return settings, call, dtype


@pytest.mark.parametrize("_", range(8))
def test_a_call_has_the_bits_of_a_step(path, _, seed):
    pure_pytorch = isinstance(path, TorchBackend)
    settings, call, dtype = random_arguments(pure_pytorch, seed)
    owned = [torch.nn.Parameter(param) for param in params_of(SIZES, dtype)]
    optimizer = optimizer_on(path, owned, **settings)
    for param in owned:
        param.grad = torch.randn_like(param)
    optimizer.step()
    params, columns = clones(owned), columns_of(optimizer, owned)
    for step in range(2, 5):
        zero_grads, scale, copies = step == 3, random.choice([None, 4.0, torch.tensor(0.5)]), step > 2
        for param in owned:
            param.grad = None
            if hasattr(param, "grad_dtype"):  # since torch 2.10
                param.grad_dtype = random.choice([dtype, torch.float32])
            param.grad = torch.randn(param.shape).to(getattr(param, "grad_dtype", dtype))
        skipped = step == 3 and not isinstance(path, EmulatedBackend) and seed % 2
        grads = clones(param.grad for param in owned)
        outs = [torch.zeros(param.shape, dtype=torch.bfloat16) for param in owned] if copies else None
        others = [torch.zeros_like(out) for out in outs] if copies else None
        optimizer.grad_scale, optimizer.found_inf = scale, 1.0 if skipped else None
        optimizer.step(zero_grads=zero_grads, lowp_out=others)
        call |= {"step": optimizer.state[owned[0]]["step"] + skipped, "zero_grads": zero_grads, "lowp_outs": outs}
        call |= {"grad_scale": scale, "found_inf": optimizer.found_inf}
        assert adamw_(params, grads, **columns, **call) is None
        assert_equal(params, owned)
        assert_same(columns, columns_of(optimizer, owned))
        if not skipped:
            assert_equal(grads, [param.grad for param in owned])
            assert_equal(outs or [], others or [])


def settings_of_torch():
    return {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@pytest.mark.parametrize("ours, theirs", [(adamw_, torch_adamw), (adam_, torch_adam)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_steps_are_torchs(path, ours, theirs, amsgrad, seed):
    params = params_of(SIZES)
    states = [[torch.zeros_like(param) for param in params] for _ in range(3 if amsgrad else 2)]
    steps = [torch.tensor(0.0) for _ in params]
    twins, twin_states, twin_steps = clones(params), [clones(state) for state in states], clones(steps)
    for _ in range(3):
        grads = params_of(SIZES)
        ours(params, grads, *states, state_steps=steps, **settings_of_torch())
        theirs(
            twins,
            grads,
            *twin_states,
            *([] if amsgrad else [[]]),
            twin_steps,
            foreach=False,
            amsgrad=amsgrad,
            **settings_of_torch(),
        )
    assert_equal(steps, twin_steps)
    assert_close(params, twins, 3)


def test_params_without_a_grad_are_left_alone(path, seed):
    params, grads = params_of([3, 40, 5]), [torch.randn(3), None, torch.randn(5)]
    steps = [torch.tensor(4.0) for _ in params]
    before = params[1].clone()
    adamw_(params, grads, [torch.zeros(3), None, torch.zeros(5)], [torch.zeros(3), None, torch.zeros(5)], None, steps)
    assert torch.equal(params[1], before)
    assert [float(step) for step in steps] == [5, 4, 5]


def test_counts_are_not_raised_where_the_step_is_skipped(path, seed):
    params, steps = params_of([5]), [torch.tensor(4.0)]
    before = clones(params)
    adamw_(params, [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], None, steps, found_inf=torch.tensor(1.0))
    assert_equal(params, before)
    assert float(steps[0]) == 4


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_on_the_device(cuda_op, monkeypatch, found, seed):
    """With counts on the device nothing is read on the host; they count what was done."""
    use_backend(monkeypatch, EmulatedBackend(cuda_op))
    monkeypatch.setattr(adamops.functional, "to_number", lambda value, *_: value)
    monkeypatch.setattr(tensor_lists, "_is_on_host", lambda count: False)
    params, steps = params_of([5, 6000]), [torch.tensor(4.0), torch.tensor(2.0)]
    states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    before = clones(params)
    adamw_(params, params_of([5, 6000]), *states, None, steps, found_inf=torch.tensor(found))
    assert [float(step) for step in steps] == ([4, 2] if found else [5, 3])
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [bool(found)] * 2


def test_tensors_of_any_layout(seed):
    """Dense params in another memory order, grads in any, and a misaligned grad."""
    params = [torch.randn(7, 9).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    plain = [param.clone(memory_format=torch.contiguous_format) for param in params]
    grads = [torch.randn(18, 7)[::2], torch.randn(2, 3, 4, 5)]
    columns = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    plain_columns = [[torch.zeros_like(param) for param in plain] for _ in range(2)]
    for step in range(1, 4):
        adamw_(params, grads, *columns, step=step)
        adamw_(plain, clones(grads), *plain_columns, step=step, zero_grads=step == 3)
    adamw_(params, grads, *columns, step=4, zero_grads=True)
    assert not any(grad.any() for grad in grads)
    assert columns[0][0].stride() == params[0].stride()


def test_autograd_sees_what_is_written(path, seed):
    param = torch.nn.Parameter(torch.randn(5))
    tensors = {"m": torch.zeros(5), "v": torch.zeros(5), "out": torch.zeros(5, dtype=torch.bfloat16)}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    squared = param.square().sum()
    adamw_([param], [torch.ones(5)], [tensors["m"]], [tensors["v"]], step=1, lowp_outs=[tensors["out"]])
    assert all(tensors[name]._version > version for name, version in versions.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def arguments(**changed):
    """Valid arguments for three params, some replaced."""
    params = [torch.ones(2, 3), torch.ones(5000), torch.ones(())]
    given = {"params": params, "grads": [torch.ones_like(param) for param in params]}
    given |= {name: [torch.zeros_like(param) for param in params] for name in ("exp_avgs", "exp_avg_sqs")}
    return {**given, "step": 1, **changed}


def replaced(name, value, index=1):
    return {name: [value if i == index else tensor for i, tensor in enumerate(arguments()[name])]}


SHARED, HALF = torch.zeros(5000), torch.zeros(5000).half()
EIGHT_BIT = {**replaced("exp_avgs", torch.zeros(5000, dtype=torch.int8))}
EIGHT_BIT |= replaced("exp_avg_sqs", torch.zeros(5000, dtype=torch.uint8))
BAD = {
    "a short list": ({"grads": []}, ValueError, "grads has 0 entries, expected 3, one for each param"),
    "a tensor for a list": ({"exp_avgs": torch.ones(3)}, TypeError, "exp_avgs is a Tensor; expected a list of tensors"),
    "no count": ({"step": None}, TypeError, "step and state_steps: give one of them"),
    "two counts": ({"state_steps": [torch.ones(())] * 3}, TypeError, "step and state_steps: give one of them"),
    "step 0": ({"step": 0}, ValueError, "Invalid step: 0; expected 1 for the first step"),
    "a fractional step": ({"step": 1.5}, TypeError, "Invalid step: 1.5; expected an int of 1 or more"),
    "counts that are numbers": (
        {"step": None, "state_steps": [1, 2, 3]},
        TypeError,
        "the step count of param 0 is a int; expected a tensor",
    ),
    "a count of two": (
        {"step": None, "state_steps": [torch.ones(()), torch.ones(2), torch.ones(())]},
        ValueError,
        "param 1 has a step count of shape",
    ),
    "a negative lr": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "a beta of 1": ({"beta2": 1.0}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    "a NaN eps": ({"eps": float("nan")}, ValueError, "Invalid epsilon value: nan"),
    "an lr in quotes": ({"lr": "1e-3"}, TypeError, "Invalid lr: '1e-3', a str"),
    "a flag": ({"maximize": 3}, TypeError, "Invalid maximize: 3; expected True or False"),
    "a param that is no tensor": (replaced("params", 1.0), TypeError, "param 1 is a float; expected a tensor"),
    "a grad that is no tensor": (replaced("grads", 1.0), TypeError, "the grad of param 1 is a float"),
    "no state": (replaced("exp_avgs", None), TypeError, "'exp_avg' of param 1 is a NoneType; expected a tensor"),
    "a grad's shape": (replaced("grads", torch.ones(4)), ValueError, "param 1 .* has a grad of shape \\(4,\\)"),
    "a grad's dtype": (
        replaced("grads", torch.ones(5000).double()),
        TypeError,
        "param 1 .* has a grad of torch.float64",
    ),
    "a sparse grad": (replaced("grads", torch.ones(5000).to_sparse()), TypeError, "sparse grads are not supported"),
    "a state's shape": (replaced("exp_avg_sqs", torch.ones(4)), ValueError, "has state 'exp_avg_sq' of shape \\(4,\\)"),
    "a state's dtype": (
        replaced("exp_avg_sqs", torch.ones(5000).bfloat16()),
        TypeError,
        "param 1 .* has states of different dtypes",
    ),
    "a param with gaps": (replaced("params", torch.ones(10000)[::2]), ValueError, "overlap or leave gaps"),
    "a sparse param": (
        replaced("params", torch.ones(5000).to_sparse()),
        TypeError,
        "param 1 .* has layout torch.sparse",
    ),
    "a double param": (replaced("params", torch.ones(5000).double()), TypeError, "its dtype is not supported"),
    "the same param twice": (
        {"params": [SHARED] * 3, **{name: [torch.zeros(5000) for _ in range(3)] for name in list(arguments())[1:4]}},
        ValueError,
        "param 0 and param 1 share memory",
    ),
    "one list for both averages": (
        {"exp_avgs": [SHARED], "exp_avg_sqs": [SHARED], "params": [torch.ones(5000)], "grads": [torch.ones(5000)]},
        ValueError,
        "'exp_avg' of param 0 and 'exp_avg_sq' of param 0 share memory",
    ),
    "a grad that is a state, zeroed": (
        {**replaced("grads", SHARED), **replaced("exp_avgs", SHARED), "zero_grads": True},
        ValueError,
        "share memory",
    ),
    "8-bit states without scales": (EIGHT_BIT, ValueError, "8-bit states without the 'block_scales'"),
    "scales beside floats": (
        {"block_scales": [None, torch.zeros(20, 2, dtype=torch.bfloat16), None]},
        ValueError,
        "has float states beside",
    ),
    "scales of another shape": (
        {**EIGHT_BIT, "block_scales": [None, torch.zeros(19, 2, dtype=torch.bfloat16), None]},
        ValueError,
        "without the 'block_scales' that belong to them",
    ),
    "both kinds of masters": ({"master_params": [None] * 3, "param_remainders": [None] * 3}, ValueError, "give one"),
    "masters of float32 params": (
        {"master_params": [None, torch.ones(5000), None]},
        ValueError,
        "param 1, of torch.float32, has 'master_param'; expected none",
    ),
    "no master": (
        {**replaced("params", torch.ones(5000).bfloat16()), "master_params": [None] * 3},
        ValueError,
        "param 1, of torch.bfloat16, has no 'master_param'; expected one",
    ),
    "remainders of another dtype": (
        {"param_remainders": [None, torch.zeros(5000, dtype=torch.int32), None]},
        TypeError,
        "use torch.int8 or",
    ),
    "two kinds of remainders": (
        {
            "params": [torch.ones(2, 3).half(), torch.ones(5000).half(), torch.ones(())],
            "param_remainders": [torch.zeros(2, 3, dtype=torch.int8), torch.zeros(5000, dtype=torch.int16), None],
        },
        TypeError,
        "has state 'param_remainder' of torch.int16, and this",
    ),
    "a lowp_out's dtype": ({"lowp_outs": [None, torch.ones(5000), None]}, TypeError, "has a lowp_out of torch.float32"),
    "a lowp_out's shape": ({"lowp_outs": [None, torch.ones(4).half(), None]}, ValueError, "has a lowp_out of shape"),
    "a lowp_out that is the param": (
        {**replaced("params", HALF), **replaced("grads", HALF.clone()), "lowp_outs": [None, HALF, None]},
        ValueError,
        "param 1 and the lowp_out of param 1 share memory",
    ),
    "a meta param": (replaced("params", torch.ones(5000, device="meta")), ValueError, "has a grad on cpu"),
    "a lazy state": (replaced("exp_avgs", torch._neg_view(torch.zeros(5000))), TypeError, "lazily negated"),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.filterwarnings("ignore:adamops falls back")
def test_bad_arguments_raise_before_anything_is_written(path, name):
    changed, error, message = BAD[name]
    if isinstance(path, EmulatedBackend) and name == "a meta param":
        pytest.skip("the emulated device stands for all devices")
    given = arguments(**changed)
    tensors = [
        t for column in given.values() if isinstance(column, list) for t in column if isinstance(t, torch.Tensor)
    ]
    dense = [t for t in tensors if t.layout == torch.strided and t.device.type == "cpu"]
    before = clones(dense)
    with pytest.raises(error, match=message):
        adamw_(**given)
    assert_equal(dense, before)


def one_param(n=5000, **changed):
    """Arguments for one param of ones."""
    own = {"params": [torch.ones(n)], "grads": [torch.ones(n)], "exp_avgs": [torch.zeros(n)]}
    return {**own, "exp_avg_sqs": [torch.zeros(n)], **({} if "state_steps" in changed else {"step": 1}), **changed}


def assert_refused(arguments, error, match):
    tensors = [t for column in arguments.values() if isinstance(column, list) for t in column]
    dense = [
        t for t in tensors if isinstance(t, torch.Tensor) and t.layout == torch.strided and t.untyped_storage().nbytes()
    ]
    before = clones(dense)
    with pytest.raises(error, match=match):
        adamw_(**arguments)
    assert_equal(dense, before)


@pytest.mark.parametrize(
    "count, error",
    [
        (torch.tensor(1, dtype=torch.uint16), TypeError),
        (torch.tensor(1.0).to(torch.float8_e5m2), (TypeError, ValueError)),
        (torch.tensor([1.0]).to_sparse(), (TypeError, ValueError, RuntimeError)),
        (torch.tensor(2.5), ValueError),
    ],
    ids=["uint16", "float8", "sparse", "2.5"],
)
def test_counts_that_cannot_go_up_are_refused(path, count, error):
    assert_refused(one_param(state_steps=[count]), error, "step count|not supported|sparse")


def test_a_count_that_only_a_transform_refuses_to_write_is_refused(seed):
    count, arguments = torch.tensor(1.0), one_param(state_steps=[torch.tensor(1.0)])
    arguments["state_steps"] = [count]
    with pytest.raises(TypeError, match="has a step count that cannot be written"):
        torch.func.grad(lambda x: (adamw_(**arguments), x.sum())[1])(torch.ones(3))
    assert torch.equal(arguments["params"][0], torch.ones(5000))


def test_counts_share_no_memory(path):
    count = torch.tensor(1.0)
    two = {
        name: values * 2 if name == "state_steps" else [*values, values[0].clone()]
        for name, values in one_param(state_steps=[count]).items()
    }
    assert_refused(two, ValueError, "the step count of param 0 and the step count of param 1 share memory")
    arguments = one_param(1, state_steps=[None])
    arguments["state_steps"] = [arguments["params"][0]]
    assert_refused(
        arguments, ValueError, "param 0 and the step count of param 0 share memory|step count of param 0 and"
    )


def test_zeroing_touches_the_grad_alone(path, seed):
    """Grads between the elements of others, expanded ones, one grad of two params, and one without memory."""
    memory = torch.ones(400)
    strided = one_param(100, params=[memory[100:200]], grads=[memory[0:200:2]], zero_grads=True)
    assert_refused(strided, ValueError, "the grad of param 0 and param 0 share memory")
    columns = torch.ones(100, 2)
    arguments = {name: [torch.zeros(100), torch.zeros(100)] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    for grads in (list(columns.unbind(1)), [torch.ones(100)] * 2, [torch._efficientzerotensor(100), torch.ones(100)]):
        adamw_(**arguments, grads=grads, step=1, zero_grads=True)
        assert not any(grad.any() for grad in grads)
    expanded = torch.ones(1).expand(100)
    with contextlib.suppress(RuntimeError):  # torch zeroes no expanded tensor
        adamw_(**one_param(100, grads=[expanded]), zero_grads=True)


def test_a_grad_of_inference_mode_is_not_zeroed(seed):
    with torch.inference_mode():
        grad = torch.ones(200)[::2]
    assert_refused(one_param(100, grads=[grad], zero_grads=True), ValueError, "is a tensor of inference mode")


def test_grads_are_apart_from_what_others_write(path, seed):
    """They may lie where their own param or copy does, element by element."""
    n = 5000
    grad = torch.ones(n)
    assert_refused(
        one_param(n, grads=[grad], lowp_outs=[grad.view(torch.bfloat16)[:n]]),
        ValueError,
        "the grad of param 0 and the lowp_out of param 0 share memory; use a copy of the grad",
    )
    params = params_of([n, n])
    states = {name: [torch.zeros(n), torch.zeros(n)] for name in ("exp_avgs", "exp_avg_sqs")}
    crossed = {"params": params, "grads": [torch.ones(n), params[0]], **states, "step": 1}
    assert_refused(crossed, ValueError, "the grad of param 1 and param 0 share memory")
    half, alone = torch.randn(n).bfloat16(), one_param(n, params=[torch.ones(n).bfloat16()])
    expected = half.clone()
    arguments = one_param(n, params=[torch.ones(n).bfloat16()], grads=[half], lowp_outs=[half])
    adamw_(**arguments)
    adamw_(**{**alone, "grads": [expected]})
    assert torch.equal(arguments["params"][0], alone["params"][0]) and torch.equal(half, alone["params"][0])


def test_an_optimizers_copies_are_apart_from_grads(seed):
    param = torch.nn.Parameter(torch.ones(5000))
    param.grad = torch.ones(5000)
    with pytest.raises(ValueError, match="the grad of param group 0, param 0 and the lowp_out of"):
        FusedAdam([param]).step(lowp_out=[param.grad.view(torch.bfloat16)[:5000]])
    assert torch.equal(param.detach(), torch.ones(5000))


def test_wide_scales_that_two_params_share(path, seed):
    """Such as were left from AMSGrad."""
    n, scales = 512, torch.zeros(2, 3, dtype=torch.bfloat16)
    arguments = {"params": params_of([n, n]), "grads": params_of([n, n]), "block_scales": [scales, scales], "step": 1}
    arguments |= {"exp_avgs": [torch.zeros(n, dtype=torch.int8) for _ in range(2)]}
    arguments |= {"exp_avg_sqs": [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]}
    assert_refused(arguments, ValueError, "'block_scales' of param 0 and 'block_scales' of param 1 share memory")


@pytest.mark.parametrize("remainders", [[None], []])
def test_remainders_that_are_not_there_are_missed(path, remainders):
    half = {"params": [torch.ones(50).bfloat16()], "grads": [torch.ones(50)]}
    match = (
        "param_remainders has 0 entries" if not remainders else "param 0, of torch.bfloat16, has no 'param_remainder'"
    )
    assert_refused(one_param(50, **half, param_remainders=remainders), ValueError, match)


def test_a_skipped_step_zeroes_grads_and_writes_copies(path, seed):
    """As that of an optimizer does, or the next step would add to infinities."""
    out, grads = torch.zeros(50, dtype=torch.bfloat16), [torch.full((50,), float("inf"))]
    arguments = one_param(50, grads=grads, zero_grads=True, lowp_outs=[out], found_inf=1.0)
    adamw_(**arguments)
    assert not grads[0].any() and torch.equal(out, torch.ones(50).bfloat16())
    assert torch.equal(arguments["params"][0], torch.ones(50)) and not arguments["exp_avgs"][0].any()


def test_torchs_way_to_say_that_there_are_no_maxima(path):
    arguments = one_param(50, max_exp_avg_sqs=[])
    adamw_(**arguments)
    assert not torch.equal(arguments["params"][0], torch.ones(50))


def freeing(victim, count):
    """A tensor subclass that frees a tensor when torch has run its Python code this often."""
    calls = []

    class Freeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            if len(calls) == count:
                victim.untyped_storage().resize_(0)
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    return Freeing, calls


@pytest.mark.parametrize("count", range(1, 80, 3))
def test_memory_that_a_grads_code_frees_is_not_touched(count, seed):
    n = 50_000
    param = torch.randn(n)
    cls, calls = freeing(param, count)
    grad = torch.randn(2 * n)[::2].as_subclass(cls)
    calls.clear()
    with contextlib.suppress(ValueError, RuntimeError, TypeError):
        adamw_([param], [grad], [torch.zeros(n)], [torch.zeros(n)], step=1, zero_grads=True)


class Number:
    """An object that is a number, as of another library, and frees a tensor when it is read again."""

    device = "cuda"

    def __init__(self, victim):
        self.victim, self.reads = victim, 0

    def __float__(self):
        self.reads += 1
        if self.reads > 2:
            self.victim.untyped_storage().resize_(0)
        return 1.0


@pytest.mark.parametrize("name", ["grad_scale", "lr", "eps", "weight_decay"])
def test_numbers_are_read_before_addresses(name, seed):
    n = 2_000_000
    param = torch.ones(n)
    arguments = one_param(n, params=[param])
    with contextlib.suppress(ValueError, RuntimeError):
        adamw_(**{**arguments, name: Number(param)})


def test_messages_do_not_read_tensors():
    freed, seed = torch.ones(1), torch.ones(1, dtype=torch.int64)
    for tensor in (freed, seed):
        tensor.untyped_storage().resize_(0)
    for arguments, match in (
        ({"step": freed}, "Invalid step: a Tensor; expected an int of 1 or more, or tensors as state_steps"),
        ({"maximize": freed}, "Invalid maximize: a Tensor; expected True or False"),
        ({"stochastic_rounding": True, "stochastic_rounding_seed": seed}, "Invalid stochastic_rounding_seed"),
        ({"params": (x for x in [1.0])}, "param 0 is a float"),
        ({"params": 3}, "params is a int; expected a list of tensors"),
        ({"param_remainders": 5}, "param_remainders is a int; expected a list of tensors"),
    ):
        with pytest.raises(TypeError, match=match):
            adamw_(**one_param(2, **arguments))


def test_dtensors_are_refused(mesh):
    param = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"param 0 is a DTensor; pass what this process holds, its to_local\(\)"):
        adamw_([param], [param], [param], [param], step=1)


def test_inside_a_compiled_function(seed):
    """Called as it is: torch.compile finds nothing in it to compile."""
    param = torch.randn(5)
    twin, lists = param.clone(), [[torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)]]
    torch.compile(lambda: adamw_([param], *lists, step=1), backend="eager")()
    adamw_([twin], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], step=1)
    assert torch.equal(param, twin)


def test_the_pages_engine_learns(capsys):
    exec(compile(script_of("engines"), "engine.py", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0] / 10


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="momentum"):
        adam_([], [], [], [], step=1, momentum=0.9)


def test_no_params_are_no_work():
    adamw_([], [], [], [], step=1)


def test_sequences_that_are_no_lists():
    param = torch.ones(5)
    adamw_((param,), (torch.ones(5),), (torch.zeros(5),), (torch.zeros(5),), step=1)
    assert not torch.equal(param, torch.ones(5))


def test_adam_differs_in_its_defaults_only():
    given = inspect.signature(adamw_).parameters
    assert given["weight_decay"].default == 0.01 and given["decoupled_weight_decay"].default is True
    for function, rule in (
        (adam_, ADAM),
        (functools.partial(adamw_, decoupled_weight_decay=False), ADAM),
        (adamw_, ADAMW),
    ):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adamops.functional, "step_on_lists", lambda settings, lists, seen=seen: seen.append(settings))
            function([torch.ones(2)], [torch.ones(2)], [torch.ones(2)], [torch.ones(2)], step=1)
        assert seen[0].rule is rule
        assert seen[0].hyper[4] == (0.0 if function is adam_ else 0.01)


def mutations():
    """Tensors in place of others, whether they fit or not."""
    zeros = torch.zeros
    yield from (zeros(5000), zeros(5000).bfloat16(), zeros(5000).half(), zeros(5000, dtype=torch.int8), None)
    yield from (zeros(5000, dtype=torch.uint8), zeros(5000, dtype=torch.int16), zeros(5001)[1:], zeros(10000)[::2])
    yield from (zeros(20, 2, dtype=torch.bfloat16), zeros(2, 20, dtype=torch.bfloat16).t(), zeros(20, 3).bfloat16())
    yield from (zeros(5000).double(), torch._neg_view(zeros(5000)), zeros(50, 100), zeros(1).expand(5000), zeros(0))
    freed = zeros(5000)
    freed.untyped_storage().resize_(0)
    yield freed


@pytest.mark.parametrize("_", range(40))
def test_the_fast_path_takes_what_the_slow_one_takes(monkeypatch, _, seed):
    """Random objects in random lists: both paths do the same, or both refuse."""
    draw = random.Random(seed)
    found = []
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "block_scales", "param_remainders", "lowp_outs"]
    start = draw.choice([{}, {**EIGHT_BIT, "block_scales": [None, torch.zeros(20, 2).bfloat16(), None]}])
    changes = [(draw.choice(names), draw.randrange(3), draw.randrange(18)) for _ in range(draw.randrange(4))]
    for reads in (True, False):
        backend = load_backend(ADAMW, HOST)
        use_backend(monkeypatch, backend if reads else slow(backend))
        given = arguments(**{name: [t if t is None else t.clone() for t in column] for name, column in start.items()})
        for name, index, kind in changes:
            given[name] = given.get(name) or [None] * 3
            given[name][index] = list(mutations())[kind]
        try:
            adamw_(**given)
        except (TypeError, ValueError) as error:
            found.append((type(error), str(error)))
        else:
            found.append({name: column for name, column in given.items() if isinstance(column, list)})
    assert type(found[0]) is type(found[1]), found
    if isinstance(found[0], dict):
        assert_same(found[0], found[1])
    else:
        assert found[0] == found[1]

"""No call touches memory that is not the tensor's, or takes the raw memory of a lazy tensor for its values."""

import ctypes
import random

import pytest
import torch
from optimizers import MAKERS, STATES, state_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from adamops import DeepSpeedCPUAdam
from adamops.optim import memory
from adamops.optim.backends import tensor_layout
from adamops.optim.backends.torch import TorchBackend

N = 4096  # the fewest elements that get 8-bit states


def trained(make, states, numel=N):
    """Two params, in groups of their own, that have made a step, and have grads."""
    settings, dtype = states
    params = [Parameter(torch.randn(numel).to(dtype)) for _ in range(2)]
    optimizer = make([{"params": [param]} for param in params], lr=0.1, **settings)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return params, optimizer


STEPS = {
    "step": lambda optimizer: optimizer.step(),
    "zero_grads": lambda optimizer: optimizer.step(zero_grads=True),
    "async": lambda optimizer: optimizer.step_async().wait(),
}


def assert_refused(optimizer, params, step, words, errors=(TypeError, ValueError)):
    """The step raises, and neither param, grad nor count of the first param has changed."""
    kept = params[0].detach().clone(), params[0].grad.clone(), int(optimizer.state[params[0]]["step"])
    with pytest.raises(errors, match=words):
        STEPS[step](optimizer)
    first = params[0]
    assert torch.equal(first, kept[0]) and torch.equal(first.grad, kept[1])
    assert int(optimizer.state[first]["step"]) == kept[2]


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("left", [0, 10])
def test_storage_that_was_freed_or_shortened_is_refused(PathAdam, states, step, left):
    _, optimizer = trained(PathAdam, states)
    keys = ["param", "grad", *state_tensors(optimizer, optimizer.param_groups[1]["params"][0])]
    for key in keys:
        params, optimizer = trained(PathAdam, states)
        held = {"param": params[1].data, "grad": params[1].grad, **state_tensors(optimizer, params[1])}[key]
        held.untyped_storage().resize_(left)
        assert_refused(optimizer, params, step, "param group 1, param 0.*freed or shortened", ValueError)


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.fp32_params(),
        lambda o: o.load_fp32_params([torch.zeros(N)] * 2),
        lambda o: o.step(lowp_out=[None, torch.zeros(N, dtype=torch.bfloat16)]),
    ],
)
@pytest.mark.parametrize("has_grad", [True, False])
def test_params_whose_storage_was_freed_are_read_by_no_method(PathAdam, call, has_grad):
    params, optimizer = trained(PathAdam, STATES["float32"])
    before = params[0].detach().clone()
    if not has_grad:
        params[1].grad = None
    params[1].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="param.*freed or shortened"):
        call(optimizer)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_norms_of_grads_whose_storage_was_freed_are_refused(PathAdam, norm_type):
    params, optimizer = trained(PathAdam, STATES["float32"])
    params[1].grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a grad.*freed or shortened"):
        optimizer.clip_grad_norm_(1.0, norm_type)


def test_grads_of_a_step_that_is_left_out_are_not_zeroed_where_nothing_is(Adam):
    params, optimizer = trained(Adam, STATES["float32"])
    params[1].grad.untyped_storage().resize_(0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    with pytest.raises(ValueError, match="grad.*freed or shortened"):
        optimizer.step(zero_grads=True)


@pytest.mark.parametrize("shape", [(), (5,), (2, 1), (N // 256, 1), (N // 256, 2), (N // 256, 3), (3, 4, 5)])
def test_scales_without_averages_belong_to_nothing(PathAdam, shape):
    """Whatever their shape, the step starts the averages, and has the bits of one that finds no scales."""
    value, grad = torch.randn(2, N)
    results = []
    for scales in (None, torch.randn(shape).to(torch.bfloat16)):
        param = Parameter(value.clone())
        optimizer = PathAdam([param], lr=0.1, state_dtype="8bit")
        if scales is not None:
            optimizer.state[param] = {"step": 0, "block_scales": scales}
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step()
        results.append({"param": param.detach(), **state_tensors(optimizer, param)})
    without, with_scales = results
    assert without.keys() == with_scales.keys()
    for key, value in without.items():
        assert torch.equal(value, with_scales[key]), key


@pytest.mark.parametrize("step", list(STEPS))
def test_scales_and_remainders_of_other_shapes_and_dtypes_are_refused(PathAdam, step):
    for states, key, spoil in (
        ("8bit", "block_scales", lambda t: t[:, :1].contiguous()),
        ("8bit", "block_scales", lambda t: t[:-1]),
        ("8bit", "block_scales", lambda t: t.float()),
        ("8bit", "block_scales", lambda t: t.t().contiguous().t()),
        ("8bit", "exp_avg", lambda t: t[:-1]),
        ("8bit", "exp_avg_sq", lambda t: t.float()),
        ("8bit, amsgrad", "block_scales", lambda t: t[:-1]),
        ("masters of 32 bits, 8bit", "param_remainder", lambda t: t.to(torch.int8)),
        ("masters of 24 bits", "param_remainder", lambda t: t[::2]),
        ("float32", "exp_avg", lambda t: t[::2]),
        ("float32", "exp_avg", lambda t: t.double()),
    ):
        params, optimizer = trained(PathAdam, STATES[states])
        optimizer.state[params[1]][key] = spoil(optimizer.state[params[1]][key])
        assert_refused(optimizer, params, step, f"param group 1, param 0.*{key}|8-bit|8bit|different dtypes")


@pytest.mark.parametrize("step", list(STEPS))
def test_states_of_fake_tensors_are_refused(PathAdam, step):
    params, optimizer = trained(PathAdam, STATES["float32"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(N)
    assert_refused(optimizer, params, step, "param group 1, param 0.*FakeTensor", TypeError)


def test_amsgrad_can_be_switched_at_any_time(PathAdam, states):
    params, optimizer = trained(PathAdam, states)
    for k in range(6):
        optimizer.param_groups[k % 2]["amsgrad"] ^= True
        optimizer.step()
    assert all(int(optimizer.state[param]["step"]) == 7 for param in params)
    assert all(param.isfinite().all() for param in params)


def test_amsgrad_switched_off_leaves_the_scales_of_its_average_alone(PathAdam):
    (param, _), optimizer = trained(PathAdam, STATES["8bit, amsgrad"])
    before = optimizer.state[param]["block_scales"].clone()
    optimizer.param_groups[0]["amsgrad"] = False
    param.grad = param.grad * 100
    optimizer.step()
    after = optimizer.state[param]["block_scales"]
    assert torch.equal(after[:, 2], before[:, 2]) and not torch.equal(after[:, 1], before[:, 1])


def test_zero_tensors_count_as_zeros(PathAdam, states):
    settings, dtype = states
    param = Parameter(torch.randn(N).to(dtype))
    before = param.detach().clone()
    optimizer = PathAdam([param], **settings)
    for step in STEPS.values():
        param.grad = torch._efficientzerotensor(N, dtype=dtype)
        assert optimizer.clip_grad_norm_(1.0) == 0.0
        step(optimizer)
    assert torch.equal(param, before) and int(optimizer.state[param]["step"]) == 3


@pytest.mark.parametrize("step", list(STEPS))
def test_negated_grads_are_resolved(PathAdam, states, step):
    settings, dtype = states
    grad = torch.randn(N).to(dtype)
    results = []
    for given in (-grad, torch._neg_view(grad.clone())):
        param = Parameter(torch.ones(N, dtype=dtype))
        optimizer = PathAdam([param], lr=0.1, **settings)
        param.grad = given
        norm = optimizer.clip_grad_norm_(1.0)
        STEPS[step](optimizer)
        assert param.grad.any() == (step != "zero_grads")
        results.append((param.detach(), norm))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("step", list(STEPS))
def test_negated_states_are_refused(PathAdam, states, step):
    params, optimizer = trained(PathAdam, states)
    for key, value in state_tensors(optimizer, params[1]).items():
        optimizer.state[params[1]][key] = torch._neg_view(value)
        assert_refused(optimizer, params, step, f"param group 1, param 0.*{key}.*lazily negated", TypeError)
        optimizer.state[params[1]][key] = value


@pytest.mark.parametrize("step", list(STEPS))
def test_negated_params_are_refused(PathAdam, step):
    params, optimizer = trained(PathAdam, STATES["float32"])
    params[1].data = torch._neg_view(params[1].detach().clone())
    assert_refused(optimizer, params, step, "param group 1, param 0.*lazily negated", TypeError)
    with pytest.raises(TypeError, match="lazily negated"):
        PathAdam([Parameter(torch._neg_view(torch.ones(3)))])


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch has no lazy clones")
@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("written", ["the clone", "what was cloned"])
def test_copy_on_write_clones_are_not_written_through(PathAdam, states, step, written):
    params, optimizer = trained(PathAdam, states)
    param, state = params[0], optimizer.state[params[0]]
    held = {"param": param.data, "grad": param.grad, **state_tensors(optimizer, param)}
    clones = {key: torch._lazy_clone(value) for key, value in held.items()}
    before = {key: value.clone() for key, value in held.items()}
    others = clones
    if written == "the clone":
        others = held
        param.data, param.grad = clones["param"], clones["grad"]
        state.update({key: value for key, value in clones.items() if key not in ("param", "grad")})
    STEPS[step](optimizer)
    assert not torch.equal(param, before["param"])
    for key, value in others.items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_slow_path_has_the_bits_of_the_fast_one(request, states, name, monkeypatch):
    if "CUDA" in name:
        request.getfixturevalue("cuda_op")
    settings, dtype = states
    values = [torch.randn(shape).to(dtype) for shape in ((70, 80), 3, 5000, 0)]
    grads = [[torch.randn(value.shape).to(dtype) for value in values] for _ in range(3)]
    results = []
    for has_layout in (True, False):
        if not has_layout:
            monkeypatch.setattr(tensor_layout, "arguments", lambda device: None)
        params = [Parameter(value.clone()) for value in values]
        optimizer = MAKERS[name](params, lr=0.1, weight_decay=0.1, **settings)
        for of_step in grads:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad.clone()
            norm = optimizer.clip_grad_norm_(1.0)
            optimizer.step(zero_grads=True)
            assert not any(param.grad.any() for param in params)
        (backend,) = optimizer._backends.values()
        assert has_layout or backend._reader is None
        held = [value for param in params for value in (param.detach(), *state_tensors(optimizer, param).values())]
        results.append([*held, norm])
    for fast, slow in zip(*results, strict=True):
        assert torch.equal(fast, slow)


# How torch lays tensors out in memory -----------------------------------------------------------------------------


def unclear(monkeypatch, name, function):
    """Spoils an experiment; the layout is then looked for anew."""
    monkeypatch.setattr(tensor_layout, "_found", None)
    monkeypatch.setattr(tensor_layout, name, function)
    return tensor_layout.arguments(torch.device("cpu"))


def test_no_layout_where_a_place_is_not_found_or_found_twice(monkeypatch):
    words = tensor_layout._words
    assert unclear(monkeypatch, "_words", lambda address, count: [0] * count) is None
    assert unclear(monkeypatch, "_words", lambda address, count: words(address, count) * 2) is None
    monkeypatch.setattr(tensor_layout, "_words", words)
    with monkeypatch.context() as short:
        short.setattr(tensor_layout, "_LEAST_TENSOR_WORDS", 1)
        assert unclear(short, "_MOST_TENSOR_WORDS", 1) is None
    assert unclear(monkeypatch, "dispatch_keys", lambda tensor: 5) is None


@pytest.mark.parametrize("further", range(5))
def test_the_key_set_is_found_in_longer_tensors(further):
    """It is the last field of a tensor. In torch 2.11 it lies a word further than in 2.13."""
    count = tensor_layout._LEAST_TENSOR_WORDS + further
    keys, tensors = [11, 22, 33], []
    for key in keys:
        words = [random.randrange(100, 2**60) for _ in range(count - 1)] + [key]
        tensors.append((ctypes.c_uint64 * count)(*words))
    found, place = tensor_layout._key_set(list(map(ctypes.addressof, tensors)), keys)
    assert place == count - 1 and found == [list(tensor) for tensor in tensors]


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10")
def test_tensors_are_read_in_cpp():
    """With every torch that lends its DLPack functions: checking tensors in Python takes a hundred times as long."""
    assert tensor_layout.arguments(torch.device("cpu")) is not None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, ValueError])
def test_no_layout_where_torch_has_no_such_names(monkeypatch, error):
    def fails(*_):
        raise error

    assert unclear(monkeypatch, "dispatch_keys", fails) is None


def test_no_layout_where_samples_are_of_another_kind(monkeypatch):
    class Kind(torch.Tensor):
        pass

    samples = tensor_layout._samples()
    assert unclear(monkeypatch, "_samples", lambda: [*samples, torch.zeros(3).as_subclass(Kind)]) is None
    assert unclear(monkeypatch, "_samples", lambda: samples[:1]) is None


def test_no_layout_under_a_mode_that_replaces_tensors_and_one_afterwards(monkeypatch):
    monkeypatch.setattr(tensor_layout, "_found", None)
    with FakeTensorMode():
        assert tensor_layout.arguments(torch.device("cpu")) is None
    found = tensor_layout._layout()
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert found is not None and len(found) == 9


def test_optimizers_made_without_a_layout_step_all_the_same(monkeypatch):
    monkeypatch.setattr(tensor_layout, "_found", None)
    monkeypatch.setattr(tensor_layout, "_words", lambda address, count: [0] * count)
    param = Parameter(torch.ones(10))
    optimizer = DeepSpeedCPUAdam([param], lr=0.1)
    assert optimizer._backends[torch.device("cpu")]._reader is None
    param.grad = torch.ones(10)
    optimizer.step()
    assert torch.allclose(param, torch.tensor(0.9))


# The proof -------------------------------------------------------------------------------------------------------


def test_lazy_tensors_are_known_as_such():
    plain = torch.ones(3)
    assert not memory.is_lazy(plain) and memory.in_memory(plain, "a grad") is plain
    for lazy in (torch._neg_view(plain), torch.ones(3, dtype=torch.complex64).conj(), torch._efficientzerotensor(3)):
        assert memory.is_lazy(lazy)
        resolved = memory.in_memory(lazy, "a grad")
        assert not memory.is_lazy(resolved) and torch.equal(resolved, lazy.clone())


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[10:20], lambda t: t[::7], lambda t: t.view(10, 10).t()])
def test_memory_is_there_to_the_last_byte(view):
    tensor = torch.zeros(100)
    seen = view(tensor)
    needed = seen.storage_offset() * 4 + memory._bytes_spanned(seen)
    tensor.untyped_storage().resize_(needed)
    memory.check_memory(seen, "it")
    tensor.untyped_storage().resize_(needed - 1)
    with pytest.raises(ValueError, match="it needs .* bytes, and its storage has"):
        memory.check_memory(seen, "it")


def test_tensors_without_elements_need_no_memory():
    tensor = torch.zeros(0, 5)
    tensor.untyped_storage().resize_(0)
    memory.check_memory(tensor, "it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_misaligned_grad_is_copied_and_a_misaligned_param_refused(dtype):
    size = dtype.itemsize

    def misaligned():
        return torch.frombuffer(bytearray(100 * size + 1), dtype=dtype, count=100, offset=1)

    ours, theirs = (torch.nn.Parameter(torch.ones(100, dtype=dtype)) for _ in range(2))
    ours.grad = misaligned()
    assert ours.grad.data_ptr() % size
    ours.grad.fill_(0.5)
    theirs.grad = ours.grad.clone()
    for param in (ours, theirs):
        optimizer = DeepSpeedCPUAdam([param])
        assert optimizer.clip_grad_norm_(1.0) == pytest.approx(5.0)
        optimizer.step()
    assert torch.equal(ours, theirs)
    param = torch.nn.Parameter(misaligned())
    param.grad = torch.ones(100, dtype=dtype)
    with pytest.raises(ValueError, match=f"param 0 .* is misaligned: its address is not a multiple of {size} bytes"):
        DeepSpeedCPUAdam([param]).step()


@pytest.mark.parametrize("step", list(STEPS))
def test_a_tensor_of_inference_mode_that_was_given_other_data_is_updated(PathAdam, step):
    """It is like any other by its keys, but has no version counter."""
    with torch.inference_mode():
        param = torch.zeros(8)
    param.data = torch.ones(8)
    plain = Parameter(torch.ones(8))
    for tensor in (param, plain):
        tensor.grad = torch.arange(8.0)
        optimizer = PathAdam([tensor], lr=0.1)
        if tensor is param and isinstance(optimizer._backends[tensor.device], TorchBackend):
            with pytest.raises(ValueError, match="of inference mode"):  # as torch.optim does
                STEPS[step](optimizer)
            return
        for _ in range(2):
            STEPS[step](optimizer)
    assert torch.equal(param, plain)


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("spoil", [lambda t: 1.5, lambda t: None, lambda t: t.to("meta"), lambda t: t[0]])
def test_scales_that_are_none_are_refused(PathAdam, step, spoil):
    params, optimizer = trained(PathAdam, STATES["8bit"])
    optimizer.state[params[1]]["block_scales"] = spoil(optimizer.state[params[1]]["block_scales"])
    assert_refused(optimizer, params, step, "param group 1, param 0.*(block_scales|8-bit)")


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("value", [None, "word", torch.zeros(3), torch.zeros(N, dtype=torch.float16)])
def test_what_a_step_does_not_need_of_a_state_is_left_alone(PathAdam, step, value):
    """As with torch.optim; each path takes it."""
    params, optimizer = trained(PathAdam, STATES["float32"])
    for key in ("master_param", "param_remainder", "max_exp_avg_sq", "momentum"):
        optimizer.state[params[1]][key] = value
    STEPS[step](optimizer)
    assert int(optimizer.state[params[1]]["step"]) == 2
    assert all(optimizer.state[params[1]][key] is value for key in ("master_param", "param_remainder", "momentum"))


def test_a_clipped_zero_tensor_stays_one_when_other_grads_are_replaced(PathAdam):
    params, optimizer = trained(PathAdam, STATES["float32"])
    params[0].grad = torch._efficientzerotensor((N,), dtype=torch.float32)
    optimizer.clip_grad_norm_(0.1)
    clipped = params[1].grad
    params[0].grad = torch.ones(N)
    before = clipped.norm()
    optimizer.step()
    torch.testing.assert_close(clipped.norm(), 0.1 / (before + 1e-6) * before)
    params[0].grad = torch._efficientzerotensor((N,), dtype=torch.float32)
    optimizer.clip_grad_norm_(0.1)
    params[1].grad = torch.ones(N)
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 3


def test_clipped_grads_that_are_expanded_are_multiplied_once(PathAdam):
    params, optimizer = trained(PathAdam, STATES["float32"])
    params[0].grad = torch.ones(()).expand(N)
    norm = optimizer.clip_grad_norm_(0.1)
    params[1].grad = torch.ones(N)
    optimizer.step()
    torch.testing.assert_close(params[0].grad, torch.full((N,), float(0.1 / (norm + 1e-6))))


class FreesMemory(torch.Tensor):
    """A subclass whose Python code frees another tensor's memory at a chosen call."""

    victim, calls = None, 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        FreesMemory.calls -= 1
        if FreesMemory.calls == 0:
            FreesMemory.victim.untyped_storage().resize_(0)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("call", range(1, 60, 3))
@pytest.mark.parametrize("what", ["clip", "load"])
def test_memory_that_a_subclass_frees_meanwhile_is_not_touched(Adam, what, call):
    params = [torch.nn.Parameter(torch.zeros(1 << 16)), torch.nn.Parameter(torch.zeros(64))]
    optimizer = Adam(params)
    if what == "clip":
        params[0].grad, params[1].grad = torch.ones(1 << 16), torch.ones(64).as_subclass(FreesMemory)
        FreesMemory.victim = params[0].grad
    else:
        params[1].data = params[1].data.as_subclass(FreesMemory)
        values = [torch.ones(1 << 16), torch.ones(64).as_subclass(FreesMemory)]
        FreesMemory.victim = params[0].detach()
    FreesMemory.calls = call
    try:
        optimizer.clip_grad_norm_(1.0) if what == "clip" else optimizer.load_fp32_params(values)
    except (RuntimeError, TypeError, ValueError):
        pass
    finally:
        FreesMemory.calls = 0

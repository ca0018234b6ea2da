"""No call leaves a half-done step: after an error or a signal all of it is done, or none."""

import contextlib
import random
import signal
import sys
import threading

import pytest
import torch
from optimizers import PATHS, STATES, state_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from adamops import DeepSpeedCPUAdam
from adamops.optim import async_step as background
from adamops.optim import interrupts
from adamops.optim.backends.torch import TorchBackend

N = 4096  # the fewest elements that get 8-bit states


def groups_of(make, states, count=3, layouts=False, steps=1):
    """An optimizer of groups of one param each, that has made some steps."""
    settings, dtype = states
    params = [Parameter(torch.randn(64, N // 64).to(dtype)) for _ in range(count)]
    if layouts:
        params[1].data = params[1].data.t().contiguous().t()
    optimizer = make([{"params": [param]} for param in params], lr=0.1, **settings)
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def snapshot(optimizer, params):
    """Copies of all that a step writes but for grads, for each param."""
    return [
        (
            param.detach().clone(),
            {key: value.clone() for key, value in state_tensors(optimizer, param).items()} if state else {},
            int(state["step"]) if state else 0,
        )
        for param in params
        for state in [optimizer.state.get(param)]
    ]


def equal(one, other):
    (param, tensors, step), (other_param, others, other_step) = one, other
    return (
        torch.equal(param, other_param)
        and step == other_step
        and all(torch.equal(value, others[key]) for key, value in tensors.items() if key in others)
    )


BAD = {
    "lr": ["1e-3", None, torch.ones(2), torch.ones((), device="meta"), 1j, [1.0]],
    "betas": ["ab", None, (0.9,), (0.9, "x"), (0.9, None), torch.ones(3), (0.9, 1.0), (0.9, float("nan"))],
    "eps": ["x", None, torch.ones(2)],
    "weight_decay": ["x", None, torch.ones(2)],
}


@pytest.mark.parametrize(("setting", "value"), [(key, value) for key, values in BAD.items() for value in values])
@pytest.mark.parametrize("in_background", [False, True])
def test_hyper_parameters_of_all_groups_are_numbers_before_the_first_is_updated(
    PathAdam, setting, value, in_background
):
    params, optimizer = groups_of(PathAdam, STATES["float32"])
    before = snapshot(optimizer, params)
    optimizer.param_groups[-1][setting] = value
    with pytest.raises((TypeError, ValueError), match="param group 2"):
        optimizer.step_async().wait() if in_background else optimizer.step()
    assert all(map(equal, before, snapshot(optimizer, params)))


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_what_a_grad_scaler_sets_is_a_number(PathAdam, name):
    params, optimizer = groups_of(PathAdam, STATES["float32"])
    before = snapshot(optimizer, params)
    optimizer.grad_scale = optimizer.found_inf = None
    setattr(optimizer, name, "x")
    with pytest.raises(TypeError, match=name):
        optimizer.step()
    assert all(map(equal, before, snapshot(optimizer, params)))


def numpy_numbers():
    numpy = pytest.importorskip("numpy")
    return [numpy.float32(0.125), numpy.float64(0.125), numpy.array(0.125)]


def test_numbers_of_numpy_are_numbers(PathAdam):
    results = []
    for value in (0.125, *numpy_numbers()):
        param = Parameter(torch.ones(8))
        optimizer = PathAdam([param], lr=value, weight_decay=value, eps=value, betas=(value, value))
        param.grad = torch.ones(8)
        optimizer.step()
        optimizer.step_async().wait()
        results.append(param.detach())
    assert all(torch.equal(result, results[0]) for result in results)


class Interrupt(Exception):
    """What a signal's handler raises."""


@pytest.mark.parametrize("layouts", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("zero_grads", [False, True])
def test_a_signal_at_any_line_finds_a_whole_step_or_none(PathAdam, layouts, first, zero_grads):
    """The signal comes at a line of Python that is drawn, as signals of Python do: between bytecodes."""

    def handler(number, frame):
        raise Interrupt

    former = signal.signal(signal.SIGUSR1, handler)
    outcomes = set()
    try:
        for _ in range(25):
            state = torch.get_rng_state()
            params, optimizer = groups_of(PathAdam, STATES["8bit, amsgrad"], layouts=layouts, steps=0 if first else 1)
            torch.set_rng_state(state)
            twins, twin = groups_of(PathAdam, STATES["8bit, amsgrad"], layouts=layouts, steps=0 if first else 1)
            before = snapshot(twin, twins)
            twin.step()
            after = snapshot(twin, twins)
            left = random.randrange(400)

            def trace(frame, event, argument):
                nonlocal left
                if event == "line":
                    left -= 1
                    if left == 0:
                        signal.raise_signal(signal.SIGUSR1)
                return trace

            with contextlib.suppress(Interrupt):
                sys.settrace(trace)
                try:
                    optimizer.step(zero_grads=zero_grads)
                finally:
                    sys.settrace(None)
            now = snapshot(optimizer, params)
            is_none, is_whole = all(map(equal, before, now)), all(map(equal, after, now))
            assert is_none or is_whole, left
            if zero_grads:
                assert [bool(param.grad.any()) for param in params] == [not is_whole] * len(params)
            outcomes.add(is_whole)
            assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGUSR1, former)
    assert outcomes


def test_all_handlers_are_back_and_called_if_one_raises():
    calls = []

    def raising(number, frame):
        calls.append(number)
        raise Interrupt

    former = {number: signal.signal(number, raising) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        with pytest.raises(Interrupt), interrupts.deferred_signals():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            assert not calls
        assert sorted(calls) == [signal.SIGUSR1, signal.SIGUSR2]
        assert all(signal.getsignal(number) is raising for number in former)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_all_handlers_are_back_if_one_raises_while_they_are_put_back(monkeypatch):
    def raising(number, frame):
        raise Interrupt

    former = {number: signal.signal(number, raising) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    set_signal, left = signal.signal, [1]

    def set_and_interrupt(number, handler):
        before = set_signal(number, handler)
        if number == signal.SIGUSR1 and handler is raising and left:
            left.clear()
            signal.raise_signal(number)
        return before

    try:
        monkeypatch.setattr(interrupts, "set_handler", set_and_interrupt)
        with pytest.raises(Interrupt), interrupts.deferred_signals():
            pass
        monkeypatch.undo()
        assert all(signal.getsignal(number) is raising for number in former)
    finally:
        monkeypatch.undo()
        for number, handler in former.items():
            signal.signal(number, handler)


def test_signals_are_left_alone_in_other_threads():
    seen = []

    def work():
        with interrupts.deferred_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_an_interrupt_while_a_background_step_begins_leaves_none_that_nobody_knows_of(PathAdam, monkeypatch):
    """Thread.start() waits for the thread, and an interrupt ends that wait, not the thread."""
    params, optimizer = groups_of(PathAdam, STATES["float32"])

    def handler(number, frame):
        raise Interrupt

    class Thread(threading.Thread):
        def start(self):
            super().start()
            signal.raise_signal(signal.SIGUSR1)

    gate = threading.Event()
    run_updates = background.run_updates
    monkeypatch.setattr(background, "run_updates", lambda updates: (gate.wait(5), run_updates(updates)))
    monkeypatch.setattr(background.threading, "Thread", Thread)
    former = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Interrupt):
            optimizer.step_async()
        assert optimizer._running is not None
        threading.Timer(0.1, gate.set).start()
        entries = optimizer.state_dict()["state"].values()  # waits
        assert [int(entry["step"]) for entry in entries] == [2] * len(params)
    finally:
        gate.set()
        signal.signal(signal.SIGUSR1, former)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("layouts", [False, True])
def test_a_grad_of_several_groups_is_zeroed_once_all_have_read_it(PathAdam, states, in_background, layouts):
    settings, dtype = states
    shape = (64, N // 64)
    grad = torch.randn(shape).to(dtype)
    params = [Parameter(torch.ones(shape, dtype=dtype)) for _ in range(3)]
    given = grad.clone()
    if layouts:
        params[1].data = params[1].data.t().contiguous().t()
    params.append(Parameter(torch.ones(N, dtype=dtype)))
    alone = [Parameter(param.detach().clone()) for param in params]
    for some, is_shared in ((params, True), (alone, False)):
        optimizer = PathAdam([{"params": [param]} for param in some], lr=0.1, **settings)
        for param in some:
            param.grad = (given if is_shared else grad.clone()).view(param.shape)
        if not is_shared:
            optimizer.step()
        elif in_background:
            optimizer.step_async(zero_grads=True).wait()
        else:
            optimizer.step(zero_grads=True)
    assert not given.any()
    for shared, own in zip(params, alone, strict=True):
        assert torch.equal(shared, own)


@pytest.mark.parametrize("zero", [lambda o: o.step(zero_grads=True), lambda o: o.zero_grad(set_to_none=False)])
def test_no_grad_is_zeroed_if_another_cannot_be(PathAdam, zero, mesh):
    """In a step that is skipped, torch zeroes all grads, of whatever kind; so does zero_grad()."""
    first, second = Parameter(torch.randn(8)), Parameter(distribute_tensor(torch.randn(8), mesh, [Shard(0)]))
    optimizer = PathAdam([first, second])
    first.grad, second.grad = torch.randn(8), distribute_tensor(torch.randn(8), mesh, [Shard(0)])
    second.grad._local_tensor = torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.qint8)
    optimizer.found_inf = torch.tensor(1.0)
    before = first.grad.clone()
    # The CUDA op skips the step itself, and so refuses the grad before.
    with pytest.raises(TypeError, match="torch cannot set it to zero|has a grad of torch.qint8"):
        zero(optimizer)
    assert torch.equal(first.grad, before)


def test_shared_grads_beside_a_zero_tensor_are_zeroed(PathAdam):
    params = [Parameter(torch.ones(8)) for _ in range(3)]
    optimizer = PathAdam([{"params": [param]} for param in params], lr=0.1)
    params[0].grad = params[1].grad = torch.ones(8)
    params[2].grad = torch._efficientzerotensor(8)
    optimizer.step(zero_grads=True)
    assert torch.equal(params[0], params[1]) and (params[2] == 1).all() and not params[0].grad.any()


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("spoil", ["master", "inference", "lazy"])
def test_copies_that_torch_is_to_write_are_checked_before_the_step(PathAdam, has_grad, spoil):
    """Those of params without a grad, and all where steps are done in pure PyTorch, are written after the step."""
    params = [torch.nn.Parameter(torch.randn(8).bfloat16()) for _ in range(2)]
    optimizer = PathAdam(params, lr=0.1, master_weight_bits=24)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    outs = [torch.zeros(8, dtype=torch.bfloat16) for _ in params]
    if spoil == "master":
        optimizer.state[params[1]]["param_remainder"] = torch.zeros(3, dtype=torch.int8)
    elif spoil == "inference":
        with torch.inference_mode():
            outs[1] = torch.zeros(8, dtype=torch.bfloat16)
    else:
        outs[1] = torch._efficientzerotensor((8,), dtype=torch.bfloat16)
    if not has_grad:
        params[1].grad = None
    before = [param.detach().clone() for param in params]
    try:
        optimizer.step(lowp_out=outs)
    except (TypeError, ValueError) as error:
        assert "param" in str(error)
        assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
        assert int(optimizer.state[params[0]]["step"]) == 1 and not outs[0].any()
    else:
        assert spoil == "inference" and torch.equal(outs[0], params[0])


@pytest.mark.parametrize("change", ["slow path", "copy", "zeroed", "zeroed last"])
def test_a_step_that_torch_would_only_record_is_refused(PathAdam, change):
    """Under FakeTensorMode torch's own operations write nothing: what needs one may not begin."""
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(2)]
    optimizer = PathAdam(params, lr=0.1)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    arguments = {}
    if change == "slow path":
        params[1].grad = torch.randn(16)[::2]
    elif change == "copy":
        arguments["lowp_out"] = [None, torch.zeros(8, dtype=torch.bfloat16)]
    else:
        if change == "zeroed last":  # after all have been read, as they share memory
            params[1].grad = params[0].grad
        else:
            params[1].grad = torch.randn(16)[::2]
        arguments["zero_grads"] = True
    before = [param.detach().clone() for param in params]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match="FakeTensor"):
        optimizer.step(**arguments)
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    optimizer.step(**arguments)
    assert int(optimizer.state[params[0]]["step"]) == 2


def inference_count():
    with torch.inference_mode():
        return torch.tensor(1.0).share_memory_()


@pytest.mark.parametrize(
    ("make_count", "error", "words"),
    [
        (inference_count, ValueError, "of inference mode"),
        (lambda: torch.tensor(127, dtype=torch.int8).share_memory_(), ValueError, "cannot be 128"),
        (lambda: torch.tensor(2.0**24).share_memory_(), ValueError, "cannot be 16777217"),
        (lambda: torch.tensor(True).share_memory_(), TypeError, "torch.bool"),
    ],
)
@pytest.mark.parametrize("in_background", [False, True])
def test_shared_step_counts_that_cannot_count_on_are_refused_before_the_step(make_count, error, words, in_background):
    for make in (DeepSpeedCPUAdam, PATHS["DeepSpeedCPUAdam, slow path"], PATHS["FusedAdam, pure PyTorch"]):
        params, optimizer = groups_of(make, STATES["float32"])
        optimizer.state[params[0]]["step"] = make_count()
        before = [param.detach().clone() for param in params]
        with pytest.raises(error, match=f"param group 0, param 0.*{words}"):
            optimizer.step_async().wait() if in_background else optimizer.step()
        assert all(map(torch.equal, params, before))


class Meddler(torch.Tensor):
    """A subclass whose Python does something while a step looks at it."""

    meddle = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if cls.meddle:
            cls.meddle()
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("what", ["data", "storage", "grad", "state"])
def test_a_tensors_own_python_cannot_free_what_another_group_is_to_update(in_background, what):
    param = torch.nn.Parameter(torch.zeros(1_000_000))
    other = torch.ones(4).as_subclass(Meddler).requires_grad_()
    optimizer = DeepSpeedCPUAdam([{"params": [param]}, {"params": [other]}])
    param.grad, other.grad = torch.ones_like(param), torch.ones(4)
    optimizer.step()

    def meddle():
        if what == "data":
            param.data = torch.empty(0)
        else:
            tensor = {"storage": param, "grad": param.grad, "state": optimizer.state[param]["exp_avg"]}[what]
            tensor.untyped_storage().resize_(0)

    Meddler.meddle = meddle
    try:
        with pytest.raises(ValueError, match="param group 0, param 0"):
            optimizer.step_async().wait() if in_background else optimizer.step()
    finally:
        Meddler.meddle = None
    assert int(optimizer.state[param]["step"]) == 1 and optimizer.state[other]["step"] == 1


@pytest.mark.parametrize("without_op", [False, True])
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_tensors_own_python_cannot_free_memory_at_any_moment_of_a_step(groups, in_background, without_op):
    """At each call of a function on one of two params of a subclass, the other loses its memory."""
    outcomes = []
    for moment in range(1000):
        first, second = (torch.ones(300_000).as_subclass(Meddler).requires_grad_() for _ in range(2))
        optimizer = DeepSpeedCPUAdam([first, second] if groups == 1 else [{"params": [first]}, {"params": [second]}])
        if without_op:
            optimizer._backends = {torch.device("cpu"): TorchBackend()}
        for param in (first, second):
            param.grad = torch.ones(300_000)
        optimizer.step()
        calls = 0

        def meddle(first=first, moment=moment):
            nonlocal calls
            calls += 1
            if calls == moment:
                Meddler.meddle = None
                first.untyped_storage().resize_(0)
                Meddler.meddle = meddle

        Meddler.meddle = meddle
        try:
            optimizer.step_async().wait() if in_background else optimizer.step()
        except (RuntimeError, ValueError) as error:
            outcomes.append(str(error))
        else:
            outcomes.append("done")
        finally:
            Meddler.meddle = None
        if calls < moment:
            break
    assert len(outcomes) > 10 and any("was freed" in outcome for outcome in outcomes)
    if not without_op:
        assert any("while the step was prepared" in outcome for outcome in outcomes)

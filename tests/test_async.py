"""Steps in the background: step_async() and its handle."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamops import DeepSpeedCPUAdam

SECONDS = 60  # to wait for what must come, before a test fails


def params_and_twins(shapes=((3, 4), (5000,), ()), dtype=torch.float32):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return params, [torch.nn.Parameter(param.detach().clone()) for param in params]


def set_grads(params, twins):
    for param, twin in zip(params, twins, strict=True):
        param.grad = torch.randn(param.shape).to(param.dtype)
        twin.grad = param.grad.clone()


def assert_same(optimizer, other):
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, entry in ours["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][key][name])), name
    for one, two in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert all(map(torch.equal, one["params"], two["params"]))


class Gate:
    """Stands in for the CPU op: a step waits until the gate is opened."""

    def __init__(self, module):
        self._module, self._open, self.entered = module, threading.Event(), threading.Event()
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._module, name)

    def steps(self, calls):
        self.entered.set()
        self.calls += [(threading.current_thread(), threads, torch.is_grad_enabled()) for *_, threads in calls]
        assert self._open.wait(SECONDS)
        self._module.steps(calls)

    def open(self):
        self._open.set()


def gated(optimizer):
    """Has the steps of the optimizer wait at a gate."""
    backend = optimizer._backends[torch.device("cpu")]
    backend.module = Gate(backend.module)
    return backend.module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"state_dtype": "8bit", "stochastic_rounding": True}])
def test_steps_have_the_bits_of_steps_in_front(Adam, dtype, arguments):
    params, twins = params_and_twins(dtype=dtype)
    torch.manual_seed(5)
    ours = Adam(params, lr=0.1, **arguments)
    torch.manual_seed(5)
    theirs = Adam(twins, lr=0.1, **arguments)
    for step in range(5):
        set_grads(params, twins)
        ours.clip_grad_norm_(0.5)
        handle = ours.step_async(threads=1 + step % 3)
        for group in ours.param_groups:
            group["lr"] *= 0.5  # the next step's
        for param in params:
            param.grad = None
        theirs.clip_grad_norm_(0.5)
        theirs.step()
        for group in theirs.param_groups:
            group["lr"] *= 0.5
        handle.wait()
        assert handle.done()
        assert_same(ours, theirs)


def test_a_step_runs_beside_its_caller_on_the_threads_it_was_given():
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    gate = gated(optimizer)
    set_grads(params, twins)
    before = [param.detach().clone() for param in params]
    handle = optimizer.step_async(threads=7)
    assert gate.entered.wait(SECONDS)
    assert not handle.done()
    assert all(map(torch.equal, params, before))
    gate.open()
    handle.wait()
    assert handle.done()
    handle.wait()
    ((thread, threads, grad_enabled),) = gate.calls
    assert thread is not threading.current_thread()
    assert (threads, grad_enabled) == (7, False)
    optimizer.step_async().wait()
    assert gate.calls[1][1] == torch.get_num_threads()


USES = {
    "step": lambda o: o.step(),
    "step_async": lambda o: o.step_async().wait(),
    "zero_grad": lambda o: o.zero_grad(),
    "clip_grad_norm_": lambda o: o.clip_grad_norm_(1.0),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(o.state_dict()),
    "add_param_group": lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    "fp32_params": lambda o: o.fp32_params(),
    "load_fp32_params": lambda o: o.load_fp32_params([p.detach() for g in o.param_groups for p in g["params"]]),
    "step_param": lambda o: o.step_param(0, 0),
    "deepcopy": copy.deepcopy,
    "step_subgroup": lambda o: o.step_subgroup(1),
    "rollback_subgroup": lambda o: o.rollback_subgroup(1),
}


@pytest.mark.parametrize("use", USES)
def test_methods_wait_for_the_step(use):
    params, twins = params_and_twins(shapes=((40,),))
    optimizer = DeepSpeedCPUAdam(params)
    if "subgroup" in use:
        set_grads(params, twins)
        optimizer.step_subgroup(1)
    gate = gated(optimizer)
    set_grads(params, twins)
    optimizer.step_async()
    assert gate.entered.wait(SECONDS)
    user = threading.Thread(target=USES[use], args=(optimizer,))
    user.start()
    user.join(0.05)
    assert user.is_alive()
    assert len(gate.calls) == 1
    gate.open()
    user.join(SECONDS)
    assert not user.is_alive()
    assert optimizer._running is None or optimizer._running.done()


@pytest.mark.smoke
def test_errors_come_out_of_wait_and_nothing_is_written():
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    set_grads(params, twins)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    params[1].grad = params[1].grad.to_sparse()
    handle = optimizer.step_async()
    assert handle.done()
    for _ in range(2):
        with pytest.raises(TypeError, match="param group 0, param 1 .*sparse grads are not supported"):
            handle.wait()
    assert all(map(torch.equal, params, before))
    set_grads(params, twins)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("in_background", [True, False])
def test_an_error_that_nobody_waited_for_comes_with_the_next_use(in_background):
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    set_grads(params, twins)
    backend = optimizer._backends[torch.device("cpu")]
    module = backend.module
    if in_background:
        backend.module = Gate(module)
        backend.module.open()
        backend.module.steps = None  # not callable
    else:
        params[0].grad.data = torch.randn(7)
    optimizer.step_async()
    with pytest.raises(TypeError if in_background else ValueError, match="not callable|has a grad of shape"):
        optimizer.zero_grad()
    backend.module = module
    set_grads(params, twins)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_threads_less_than_one_are_refused():
    params, _ = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"Invalid threads: {threads}; expected 1 or more"):
            optimizer.step_async(threads=threads)


def test_hooks_after_the_step_are_refused():
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    called = []
    before = optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: called.append("after"))
    set_grads(params, twins)
    with pytest.raises(RuntimeError, match="hooks after the step cannot be called; use step"):
        optimizer.step_async()
    assert not called
    after.remove()
    optimizer.step_async().wait()
    assert called == ["before"]
    before.remove()


@pytest.mark.filterwarnings("error")
def test_learning_rate_schedules_see_the_step():
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(3):
        set_grads(params, twins)
        optimizer.step_async()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.5 ** (step + 1)
    optimizer.zero_grad()


@pytest.mark.smoke
def test_grads_are_zeroed_and_copies_written_in_the_background():
    params, twins = params_and_twins()
    ours, theirs = DeepSpeedCPUAdam(params), DeepSpeedCPUAdam(twins)
    outs = [torch.empty(param.shape, dtype=torch.bfloat16) for param in params]
    for _ in range(2):
        set_grads(params, twins)
        ours.step_async(zero_grads=True, lowp_out=outs).wait()
        theirs.step()
        assert_same(ours, theirs)
        assert all(param.grad.eq(0).all() for param in params)
        assert all(torch.equal(out, param.bfloat16()) for out, param in zip(outs, params, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_that_the_step_is_not_its_own():
    params, twins = params_and_twins()
    optimizer = DeepSpeedCPUAdam(params)
    gate = gated(optimizer)
    set_grads(params, twins)
    handle = optimizer.step_async()
    assert gate.entered.wait(SECONDS)
    child = os.fork()
    if child == 0:
        try:
            handle.wait()
        except RuntimeError as error:
            os._exit(3 if "has ended here" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    gate.open()
    handle.wait()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["step", "step_async", "zero_grad", "clip_grad_norm_", "state_dict"]), max_size=12))
def test_any_order_of_calls_is_that_of_calls_in_front(calls):
    params, twins = params_and_twins(((100_000,), (30,)))
    ours, theirs = DeepSpeedCPUAdam(params, lr=0.1), DeepSpeedCPUAdam(twins, lr=0.1)
    set_grads(params, twins)
    for call in calls:
        for optimizer in (ours, theirs):
            name = "step" if optimizer is theirs and call == "step_async" else call
            if name == "clip_grad_norm_":
                optimizer.clip_grad_norm_(0.1)
            elif name == "zero_grad":
                optimizer.zero_grad(set_to_none=False)
            else:
                getattr(optimizer, name)()
    assert_same(ours, theirs)


INTERRUPTED = """
import faulthandler, signal, sys, torch
from adamops import DeepSpeedCPUAdam

faulthandler.dump_traceback_later(240, exit=True)

class Interrupt(BaseException):
    pass

def handler(*_):
    raise Interrupt

def interrupted_at(event, call):
    '''Whether the call was interrupted, as a signal arrived at that event of the interpreter.'''
    count = 0
    def profile(frame, kind, argument):
        nonlocal count
        count += 1
        if count == event:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)
    sys.setprofile(profile)
    try:
        try:
            call()
        finally:
            sys.setprofile(None)
    except Interrupt:
        return True
    return False

signal.signal(signal.SIGUSR1, handler)
param = torch.nn.Parameter(torch.ones(5000))
optimizer = DeepSpeedCPUAdam([param], lr=0.1, state_dtype="8bit")
param.grad = torch.ones_like(param)
optimizer.step()
for name, call in {
    "step_async": lambda: optimizer.step_async(threads=1),
    "wait": lambda: handle.wait(),
    "state_dict": lambda: optimizer.state_dict(dequantize=True),
    "step": lambda: optimizer.step(),
    "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1e9),
}.items():
    event, goes_on = 0, True
    while goes_on:
        event += 1 + event // 50
        handle = optimizer.step_async(threads=1) if name == "wait" else None
        goes_on = interrupted_at(event, call)
        optimizer._settle()
        before, count = param.detach().clone(), optimizer.state[param]["step"]
        optimizer.step()
        assert optimizer.state[param]["step"] == count + 1 and not torch.equal(param, before), (name, event)
        assert "quantized_exp_avg" in optimizer.state_dict()["state"][0], (name, event)
    assert event > 3, name
print("done")
"""


def test_an_interrupt_at_any_event_of_the_interpreter_loses_no_step(tmp_path):
    """Also one that arrives in the Python of the standard library, with a lock in its hands."""
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("call", ["step", "step_subgroup"])
def test_a_pre_hook_may_take_a_step_of_its_own(call):
    results = []
    for asynchronous in (False, True):
        param = torch.nn.Parameter(torch.zeros(4))
        optimizer = DeepSpeedCPUAdam([param], lr=0.1)
        param.grad, seen = torch.ones(4), []

        def hook(optimizer, args, kwargs, seen=seen, param=param):
            if not seen:
                seen.append(None)
                optimizer.step() if call == "step" else optimizer.step_subgroup(5)
                seen.append(param[0].item())  # the hook's own step is done when it returns

        optimizer.register_step_pre_hook(hook)
        optimizer.step_async().wait() if asynchronous else optimizer.step()
        results.append((param.tolist(), seen, [state["step"] for state in optimizer.state.values()]))
    assert results[0] == results[1]


def test_a_step_of_another_thread_is_not_handed_to_the_background(monkeypatch):
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    optimizer, counts = DeepSpeedCPUAdam([param], lr=0.1), []
    optimizer.step()
    step_settings = optimizer._step_settings

    def slow(*args, **kwargs):  # while step_async() prepares its step, another thread takes one
        monkeypatch.setattr(optimizer, "_step_settings", step_settings)
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
        counts.append(optimizer.state[param]["step"])
        return step_settings(*args, **kwargs)

    monkeypatch.setattr(optimizer, "_step_settings", slow)
    optimizer.step_async().wait()
    counts.append(optimizer.state[param]["step"])
    assert counts == [2, 3] and torch.allclose(param, torch.tensor(-0.3))


@pytest.mark.parametrize("threads", [2.5, "2", float("nan")])
def test_threads_that_are_no_integer_are_refused_at_the_call(threads):
    param = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        DeepSpeedCPUAdam([param]).step_async(threads=threads)

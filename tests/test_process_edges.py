"""First loads in threads and in forked children, daemon threads when the interpreter exits, huge thread counts."""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from adamops.op_builder import OpBuilder, OpUnavailableError
from adamops.op_builder.python_extension import extension_suffix
from test_process import run_python

from adamops import DeepSpeedCPUAdam

# What scripts about forks begin with. The params are small enough for torch itself to keep to one thread, as its own
# operations hang in a forked child.
FORKS = """
    import multiprocessing, os, sys, threading, time
    import torch
    torch.set_num_threads(3)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(30_000)) for _ in range(10)]
    for p in params: p.grad = torch.full_like(p, 0.5)
    use_threads = lambda: (torch.randn(4_000_000) * 2).sum()
    def train():
        from adamops import DeepSpeedCPUAdam
        optimizer = DeepSpeedCPUAdam(params, lr=0.1)
        for _ in range(3): optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        assert (params[0].detach() != start).all()
    start = params[0].detach().clone()
    def in_a_thread(work):
        failed = []
        def run():
            try: work()
            except BaseException as error: failed.append(error)
        thread = threading.Thread(target=run); thread.start(); thread.join()
        if failed: raise failed[0]
    def in_a_fork(work):
        child = os.fork()
        if child == 0:
            try: work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    def in_a_process(work):
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start(); process.join()
        assert process.exitcode == 0
"""


@pytest.mark.parametrize(
    "work",
    [
        "in_a_fork(train)",
        "in_a_process(train)",
        "in_a_fork(lambda: in_a_fork(train))",
        "in_a_process(lambda: in_a_fork(lambda: in_a_process(train)))",
        "in_a_thread(lambda: (use_threads(), in_a_fork(train)))",
        "in_a_fork(lambda: in_a_thread(train))",
        "in_a_fork(lambda: in_a_thread(lambda: (train(), in_a_fork(train), train())))",
        "in_a_fork(lambda: (train(), in_a_fork(train), train()))",
        "(train(), in_a_fork(train), train())",
        "in_a_fork(lambda: [in_a_thread(train) for _ in range(3)] and train())",
    ],
)
def test_an_op_loaded_after_a_fork(tmp_path, work):
    """A child does not have the threads that the OpenMP runtime believes in; waiting for them would take for ever."""
    code = FORKS + f"\n    use_threads()\n    {work}\n    use_threads(); train(); print('done')"
    assert run_python(code, tmp_path, timeout=60) == "done\n"


def test_a_process_that_is_no_forked_child_uses_the_threads_of_torch(tmp_path):
    """Started by exec(), in whatever way: no thread comes and goes with a step."""
    code = (
        FORKS
        + """
    use_threads()
    train()
    def thread_ids(): return sorted(os.listdir("/proc/self/task"))
    before = thread_ids()
    from adamops import DeepSpeedCPUAdam
    optimizer = DeepSpeedCPUAdam(params)
    for _ in range(5): optimizer.step()
    print(before == thread_ids(), len(before) >= 3)
    """
    )
    assert run_python(code, tmp_path) == "True True\n"
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    nested = "import subprocess, sys; print(subprocess.check_output([sys.executable, 'script.py'], text=True), end='')"
    assert run_python(nested, tmp_path) == "True True\n"


@pytest.mark.parametrize("cls", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_first_optimizers_made_in_several_threads_at_once(tmp_path, cls):
    """Without a compiler, so that whoever does not find the prebuilt op would be left with pure PyTorch."""
    code = f"""
        import threading, warnings, torch
        warnings.simplefilter("error")
        gate, failed = threading.Barrier(8), []
        def first():
            try:
                param = torch.nn.Parameter(torch.randn(1000))
                param.grad = torch.randn(1000)
                gate.wait()
                from adamops import {cls}
                optimizer = {cls}([param])
                optimizer.step()
                assert optimizer._backends[torch.device("cpu")].name == "cpu_adam"
            except BaseException as error:
                failed.append(repr(error))
        threads = [threading.Thread(target=first) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(failed)
    """
    for _ in range(3):
        assert run_python(code, tmp_path, CXX="/nonexistent/c++") == "[]\n"


def test_the_suffix_of_extensions_is_known_while_sysconfig_is_not_ready(monkeypatch):
    """Another thread that asks sysconfig for the first time leaves its variables empty for a moment."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    assert extension_suffix() == suffix


class SlowBuilder(OpBuilder):
    NAME = "slow"
    MODULE = "nowhere.slow"

    def __init__(self, outcome):
        super().__init__()
        self.outcome, self.loads, self.begun, self.may_end = outcome, 0, threading.Event(), threading.Event()

    def load_prebuilt(self):
        self.loads += 1
        self.begun.set()
        self.may_end.wait(30)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def jit_load(self):
        raise RuntimeError("no compiler")


def load_in_threads(builder, count=6):
    """What each of several threads gets of load(), begun at once."""
    results = []

    def load():
        try:
            results.append(builder.load())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=load) for _ in range(count)]
    for thread in threads:
        thread.start()
    assert builder.begun.wait(30)
    time.sleep(0.05)
    builder.may_end.set()
    for thread in threads:
        thread.join(30)
    return results


def test_threads_that_load_at_once_load_once():
    builder = SlowBuilder(json)
    assert builder.loaded() is None
    assert load_in_threads(builder) == [json] * 6
    assert builder.loads == 1
    assert builder.loaded() is json


def test_threads_that_load_at_once_get_one_failure():
    builder = SlowBuilder(ImportError("not here"))
    results = load_in_threads(builder)
    assert builder.loads == 1
    assert len({id(error) for error in results}) == 1
    assert isinstance(results[0], OpUnavailableError)
    assert builder.loaded() is None


def test_an_interrupted_load_is_no_failure():
    builder = SlowBuilder(KeyboardInterrupt())
    builder.may_end.set()
    with pytest.raises(KeyboardInterrupt):
        builder.load()
    builder.outcome = json
    assert builder.load() is json


def test_a_builder_that_asks_for_another_and_for_itself_while_it_loads():
    builder, other = SlowBuilder(json), SlowBuilder(os)
    builder.may_end.set()
    other.may_end.set()
    builder.prepare = lambda module: (module, other.load(), builder.loaded())
    assert builder.load() == (json, os, None)


def test_a_fork_while_another_thread_loads():
    """Nobody in the child would release the lock."""
    builder = SlowBuilder(json)
    thread = threading.Thread(target=builder.load)
    thread.start()
    assert builder.begun.wait(30)
    child = os.fork()
    if child == 0:
        builder.may_end = threading.Event()
        builder.may_end.set()
        os._exit(0 if builder.load() is json else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    builder.may_end.set()
    thread.join()
    assert ended == (child, 0)


DAEMON = """
    import random, sys, threading, time
    import torch
    from adamops import DeepSpeedCPUAdam, FusedAdam
    torch.set_num_threads(2)
    params = [torch.nn.Parameter(torch.randn(300_000)) for _ in range(4)]
    for p in params: p.grad = torch.randn_like(p)
    settings = {settings}
    optimizer = {cls}(params, **settings)
    optimizer.step()
    {setup}
    def loop():
        while True:
            {call}
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    time.sleep(random.uniform(0.0, 0.1))
    assert thread.is_alive()
    print("end", flush=True)
"""
CALLS = {
    "step": "optimizer.step()",
    "zeroing": "optimizer.step(zero_grads=True)",
    "async": "optimizer.step_async().wait()",
    # Not clip_grad_norm_() and first steps: operations of torch in them take the GIL again by themselves, and abort.
    "zero_fill": "module.zero_fill([params[0].grad.data_ptr()], [300_000], 4, 2)",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("cls", "settings"), [("DeepSpeedCPUAdam", {}), ("FusedAdam", {}), ("DeepSpeedCPUAdam", {"state_dtype": "8bit"})]
)
def test_the_interpreter_exits_while_a_daemon_thread_is_in_a_step(tmp_path, cls, settings, call):
    """Python ends the thread where it takes the GIL again; that must not unwind through C++."""
    setup = "from adamops import op_builder; module = op_builder.get('cpu_adam').load()"
    code = DAEMON.format(cls=cls, settings=settings, setup=setup, call=CALLS[call])
    for _ in range(2):
        assert run_python(code, tmp_path) == "end\n"


@pytest.mark.parametrize("call", ["step"])
def test_the_interpreter_exits_while_a_daemon_thread_is_in_the_cuda_op(tmp_path, cuda_op, call):
    setup = (
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]; import pathlib, cuda_emulation, optimizers; "
        f"optimizers.EmulatedFusedAdam.module = cuda_emulation.load(pathlib.Path({cuda_op.__file__!r})); "
        "optimizer = optimizers.EmulatedFusedAdam(params); optimizer.step()"
    )
    code = DAEMON.format(cls="FusedAdam", settings={}, setup=setup, call=CALLS[call])
    for _ in range(3):
        assert run_python(code, tmp_path) == "end\n"


def test_the_interpreter_waits_for_a_step_in_the_background(tmp_path):
    """The thread of step_async() is no daemon: the params are whole when the interpreter exits."""
    code = """
        import atexit, threading, torch
        from adamops import DeepSpeedCPUAdam
        param = torch.nn.Parameter(torch.zeros(20_000_000))
        param.grad = torch.ones(20_000_000)
        optimizer = DeepSpeedCPUAdam([param], lr=0.5)
        atexit.register(lambda: print(param.detach().unique().tolist()))
        optimizer.step_async(threads=1)
    """
    assert run_python(code, tmp_path) == "[-0.5]\n"


@pytest.mark.parametrize("threads", [100_000, 2**31 - 1, 10**12])
@pytest.mark.parametrize("cls", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_huge_thread_counts_are_cut(tmp_path, cls, threads):
    """The OpenMP runtime ends the process where the system refuses it a thread; here it may have 200 more."""
    code = f"""
        import os, resource, torch
        from adamops import {cls}
        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.zeros(8192 * 3000))
        param.grad = torch.ones(8192 * 3000)
        optimizer = {cls}([param], lr=0.5)
        optimizer.step_async(threads={threads}).wait()
        module = optimizer._backends[torch.device("cpu")].module
        count = min({threads}, 2**31 - 1)
        module.zero_fill([param.grad.data_ptr()], [param.numel()], 4, count)
        print(module.grad_norm([param.data_ptr()], [param.numel()], [0], 2.0, count) > 0)
        print(param.detach().unique().tolist(), param.grad.any().item(), len(os.listdir("/proc/self/task")) < 200)
    """
    assert run_python(code, tmp_path) == "True\n[-0.5] False True\n"


def test_a_huge_thread_count_of_torch_is_cut(tmp_path):
    """With tensors of sizes that torch itself keeps to one thread."""
    code = """
        import os, torch
        from adamops import DeepSpeedCPUAdam
        params = [torch.nn.Parameter(torch.zeros(30_000)) for _ in range(1000)]
        for p in params: p.grad = torch.ones(30_000)
        torch.set_num_threads(5_000)
        of_torch = len(os.listdir("/proc/self/task"))  # which starts as many for pools of its own
        optimizer = DeepSpeedCPUAdam(params, lr=0.5)
        optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        print(len(os.listdir("/proc/self/task")) - of_torch < 200, flush=True)
        os._exit(0)  # torch itself may crash as it ends so many
    """
    assert run_python(code, tmp_path) == "True\n"


@pytest.mark.parametrize("threads", [2, 100])
def test_cut_thread_counts_change_no_bit(threads):
    start, grad = torch.randn(8192 * 120), torch.randn(8192 * 120)
    results = []
    for count in (1, threads, 10**9):
        param = torch.nn.Parameter(start.clone())
        param.grad = grad
        DeepSpeedCPUAdam([param]).step_async(threads=count).wait()
        results.append(param.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_an_optimizer_given_to_a_spawned_process_shares_its_step_counts(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import torch, torch.multiprocessing as mp
        from adamops import DeepSpeedCPUAdam

        def train(param, optimizer, steps):
            torch.set_num_threads(1)
            for _ in range(steps):
                param.grad = torch.full_like(param, 1e-3)
                optimizer.step()

        if __name__ == "__main__":
            param = torch.nn.Parameter(torch.zeros(800))
            param.share_memory_()
            optimizer = DeepSpeedCPUAdam([param], lr=1e-3, weight_decay=0.0)
            train(param, optimizer, 1)
            process = mp.get_context("spawn").Process(target=train, args=(param, optimizer, 200))
            process.start()
            process.join()
            before = param[0].item()
            train(param, optimizer, 1)
            print(int(optimizer.state[param]["step"]), round((param[0].item() - before) * 1e6))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "202 -1000\n"

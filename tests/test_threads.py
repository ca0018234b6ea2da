"""How many threads a step uses: by the call, the environment, torch, torchrun, the cores and their quota."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import adamops
from adamops import _limits, report, threads
from adamops._report_text import rows_of_machine

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}

# Prints how many threads a step runs on, as the system counts them, and how many it is said to use.
STEP = """
    import os, torch, adamops
    def used():
        param = torch.nn.Parameter(torch.randn(1_000_000))
        param.grad = torch.randn(1_000_000)
        before = len(os.listdir("/proc/self/task"))
        adamops.DeepSpeedCPUAdam([param]).step()
        return 1 + len(os.listdir("/proc/self/task")) - before, adamops.get_num_threads()
"""


@pytest.fixture(autouse=True)
def found_out_anew(monkeypatch):
    for name in ("ADAMOPS_NUM_THREADS", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "_rule", None)
    yield
    torch.set_num_threads(before)


def has(monkeypatch, cores, torchs=1, **variables):
    monkeypatch.setattr(_limits, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "_rule", None)


@pytest.mark.parametrize(
    ("cores", "torchs", "variables", "count", "why"),
    [
        (8, 4, {}, 4, "as many as torch uses"),
        (8, 1, {}, 1, "as many as torch uses"),
        (4, 64, {}, 4, "as many as torch uses (64), but this process has no more cores"),
        (8, 4, {"ADAMOPS_NUM_THREADS": "3"}, 3, "ADAMOPS_NUM_THREADS=3"),
        (2, 1, {"ADAMOPS_NUM_THREADS": "3"}, 2, "ADAMOPS_NUM_THREADS=3 (3), but this process has no more cores"),
        (8, 1, {"ADAMOPS_NUM_THREADS": "1", **TORCHRUN}, 1, "ADAMOPS_NUM_THREADS=1"),
        (
            8,
            1,
            TORCHRUN,
            8,
            "share of the cores (8) by processes here (1): OMP_NUM_THREADS=1 is taken for torchrun's own",
        ),
        (8, 1, {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, 2, None),
        (2, 1, {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, 1, None),
        (8, 2, TORCHRUN, 2, "as many as torch uses"),  # torch.set_num_threads(2) was a choice
        (8, 1, {**TORCHRUN, "OMP_NUM_THREADS": "1,1"}, 1, "as many as torch uses"),
        (8, 1, {**TORCHRUN, "LOCAL_WORLD_SIZE": ""}, 1, "as many as torch uses"),
        (8, 1, {**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, 1, "as many as torch uses"),
        (8, 1, {"OMP_NUM_THREADS": "1"}, 1, "as many as torch uses"),
    ],
)
def test_the_rule(monkeypatch, cores, torchs, variables, count, why):
    has(monkeypatch, cores, torchs, **variables)
    assert adamops.get_num_threads() == count
    found = threads.explained()
    assert found.number == count and found.why == (why or found.why)
    adamops.set_num_threads(5)
    assert adamops.get_num_threads() == min(5, cores)
    assert threads.explained().why.startswith("set by adamops.set_num_threads()")
    adamops.set_num_threads(None)
    assert threads.explained() == found


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", torch.tensor([1, 2])])
def test_no_other_numbers_are_taken(count):
    adamops.set_num_threads(1)
    with pytest.raises((TypeError, ValueError)):
        adamops.set_num_threads(count)
    assert adamops.get_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_bad_variable_is_an_error_before_anything_is_written(monkeypatch, value, cpu_adam):
    monkeypatch.setenv("ADAMOPS_NUM_THREADS", value)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = adamops.DeepSpeedCPUAdam([param])
    with pytest.raises(ValueError, match=f"ADAMOPS_NUM_THREADS='{value}' is not valid; use a positive integer"):
        optimizer.step()
    assert param.tolist() == [1, 1, 1] and not optimizer.state
    found = report.collect()
    assert not found["ok"] and found["machine"]["step_threads"]["number"] is None


def run(code, tmp_path, *prefix, **environment):
    """The standard output of code in processes of their own, away from the checkout. `prefix` precedes the command."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STEP) + textwrap.dedent(code))
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [*prefix, *([] if sys.executable in prefix else [sys.executable]), str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_two_cores = pytest.mark.skipif(CORES < 2, reason="one core")


@needs_two_cores
@pytest.mark.parametrize("variables", [{}, {"ADAMOPS_NUM_THREADS": "2"}])
def test_a_step_uses_the_threads_that_are_set(tmp_path, variables, cpu_adam):
    code = """
        torch.set_num_threads(1)
        print(used())
        adamops.set_num_threads(2)
        print(used())
        adamops.set_num_threads(1)
        print(used())
    """
    first = 2 if variables else 1
    counts = run(code, tmp_path, **variables).splitlines()
    # Threads are started once: the second step finds those of the first.
    assert counts == [f"({first}, {first})", f"({1 if variables else 2}, 2)", "(1, 1)"]


@needs_two_cores
def test_a_process_bound_to_one_core_uses_one_thread(tmp_path, cpu_adam):
    core = str(min(os.sched_getaffinity(0)))
    code = "adamops.set_num_threads(8); print(used())"
    assert run(code, tmp_path, "taskset", "-c", core) == "(1, 1)\n"


@needs_two_cores
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bound", [False, True])
def test_under_torchrun_each_process_gets_its_share(tmp_path, ranks, bound, cpu_adam):
    """Which sets OMP_NUM_THREADS to 1 if there are several processes and nobody has chosen a number."""
    cores = sorted(os.sched_getaffinity(0))[: 1 if bound else None]
    prefix = ["taskset", "-c", ",".join(map(str, cores))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    code = """
        import sys
        sys.stdout.write(f"{os.environ.get('OMP_NUM_THREADS')} {used()}\\n")
    """
    lines = run(code, tmp_path, *prefix, *torchrun).splitlines()
    share = max(1, len(cores) // ranks)
    by_torch = "None" if ranks == 1 else "1"
    assert len(lines) == ranks
    for line in lines:
        told, _, rest = line.partition(" ")
        assert told in (by_torch, "1") and rest == f"({share}, {share})"


@needs_two_cores
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("stepped_before", [True, False])
def test_children_use_as_many_threads(tmp_path, method, stepped_before, cpu_adam):
    code = f"""
        import multiprocessing
        def child(queue):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
            if {method == "spawn"}:
                torch.set_num_threads(2)
            queue.put((os.getppid() != 1, adamops.get_num_threads(), used()[1]))
        if __name__ == "__main__":
            torch.set_num_threads(2)
            if {stepped_before}:
                used()
            context = multiprocessing.get_context({method!r})
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            print(queue.get(timeout=100))
            process.join()
            print(adamops.get_num_threads())
    """
    assert run(code, tmp_path) == "(True, 1, 1)\n2\n"


def test_the_report_says_how_many_and_why(monkeypatch, cpu_adam):
    has(monkeypatch, 8, 1, **TORCHRUN)
    rows = dict(rows_of_machine(report.collect()["machine"]))
    assert rows["threads of a step"] == f"8: {threads.explained().why}"


def test_the_report_is_not_ok_without_an_openmp_runtime(monkeypatch, cpu_adam):
    builder = type(adamops.op_builder.get("cpu_adam"))
    facts = builder.facts
    monkeypatch.setattr(builder, "facts", lambda self, module: {**facts(self, module), "openmp_runtime": None})
    for torchs, ok in ((1, True), (2, False)):
        has(monkeypatch, 8, torchs)
        found = report.collect()
        (op,) = [op for op in found["ops"] if op["name"] == "cpu_adam"]
        assert op["ok"] is ok and ("no OpenMP runtime in this process" in op.get("error", "")) is not ok
        assert found["ok"] is ok


def test_steps_on_other_numbers_of_threads_have_the_same_bits(cpu_adam):
    value, grad = torch.randn(2, 100_000)
    found = []
    for count in (1, 2, None):
        adamops.set_num_threads(count)
        param = torch.nn.Parameter(value.clone())
        optimizer = adamops.DeepSpeedCPUAdam([param], state_dtype="8bit")
        param.grad = grad.clone()
        found.append((optimizer.clip_grad_norm_(1.0), optimizer.step(), param.detach()))
    for norm, _, result in found:
        assert norm == found[0][0] and torch.equal(result, found[0][2])

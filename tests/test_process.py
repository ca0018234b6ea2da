"""Threads, forks and other guests of the process: one OpenMP runtime, torch's thread count, the GIL, imports."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from adamops.op_builder.compiler import Compiler


def run_python(code, tmp_path, timeout=120, **environment):
    """Runs code in a fresh interpreter, away from the checkout; returns its standard output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_one_openmp_runtime_in_the_process(tmp_path, cpu_adam):
    code = """
        import os, re, torch
        from adamops import DeepSpeedCPUAdam, op_builder
        param = torch.nn.Parameter(torch.randn(1_000_000))
        param.grad = torch.randn(1_000_000)
        DeepSpeedCPUAdam([param]).step()
        maps = open("/proc/self/maps").read()
        print(sorted(set(re.findall(r"\\S*lib(?:g|i)?omp\\S*", maps))))
        print([os.path.realpath(op_builder.get("cpu_adam").load().openmp_runtime())])
    """
    found, used = run_python(code, tmp_path).splitlines()
    assert found == used
    assert found.count("omp") >= 1


def test_threads_are_those_of_torch(tmp_path):
    """With as many threads as cores set in torch, a step runs on those, and starts none of its own."""
    code = """
        import os, torch
        from adamops import DeepSpeedCPUAdam
        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        count = lambda: len(os.listdir("/proc/self/task"))
        (torch.randn(4_000_000) * 2).sum()
        after_torch = count()
        param = torch.nn.Parameter(torch.randn(1_000_000))
        param.grad = torch.randn(1_000_000)
        optimizer = DeepSpeedCPUAdam([param])
        for _ in range(5):
            optimizer.step()
        print(after_torch == count(), after_torch >= threads)
    """
    assert run_python(code, tmp_path) == "True True\n"


def test_no_more_threads_than_cores(tmp_path):
    """With more threads set in torch than there are cores, a step runs on as many as there are cores."""
    code = """
        import os, torch
        from adamops import DeepSpeedCPUAdam
        torch.set_num_threads(1)
        param = torch.nn.Parameter(torch.randn(1_000_000))
        param.grad = torch.randn(1_000_000)
        before = len(os.listdir("/proc/self/task"))
        torch.set_num_threads(len(os.sched_getaffinity(0)) + 3)
        optimizer = DeepSpeedCPUAdam([param])
        optimizer.step()
        print(len(os.listdir("/proc/self/task")) - before - len(os.sched_getaffinity(0)) + 1)
    """
    assert run_python(code, tmp_path) == "0\n"


def test_one_thread_starts_none(tmp_path):
    code = """
        import os, torch
        torch.set_num_threads(1)
        from adamops import DeepSpeedCPUAdam
        before = len(os.listdir("/proc/self/task"))
        param = torch.nn.Parameter(torch.zeros(1_000_000))
        param.grad = torch.zeros(1_000_000)
        DeepSpeedCPUAdam([param]).step()
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run_python(code, tmp_path) == "0\n"


@pytest.mark.parametrize("stepped_before", [True, False])
def test_parent_and_child_step_after_a_fork(tmp_path, stepped_before):
    """The child of a fork has none of the parent's threads; waiting for them would take for ever."""
    code = f"""
        import ctypes, os, sys, torch
        from adamops import DeepSpeedCPUAdam
        torch.set_num_threads(3)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(1_000_000))
        param.grad = torch.randn(1_000_000)
        optimizer = DeepSpeedCPUAdam([param])
        if {stepped_before}:
            optimizer.step()
        digest = lambda: hash(ctypes.string_at(param.data_ptr(), 4_000_000))
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        for _ in range(3):
            optimizer.step()
        if child == 0:
            os.write(write, str(digest()).encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(os.read(read, 100).decode() == str(digest()))
    """
    assert run_python(code, tmp_path, timeout=60, PYTHONHASHSEED="0") == "True\n"


def test_dataloader_workers_do_not_disturb_training(tmp_path):
    code = """
        import torch
        from adamops import DeepSpeedCPUAdam
        from torch.utils.data import DataLoader, TensorDataset
        model = torch.nn.Linear(300, 300)
        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(2):
            for (batch,) in DataLoader(TensorDataset(torch.ones(64, 300)), batch_size=8, num_workers=2):
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        print(losses[-1] < losses[0])
    """
    assert run_python(code, tmp_path) == "True\n"


def test_the_gil_is_released(tmp_path):
    """Another Python thread goes on while a long step runs."""
    code = """
        import threading, time, torch
        from adamops import DeepSpeedCPUAdam
        param = torch.nn.Parameter(torch.zeros(20_000_000))
        param.grad = torch.zeros(20_000_000)
        optimizer = DeepSpeedCPUAdam([param])
        optimizer.step()
        beats, running = [], True
        def beat():
            while running:
                beats.append(time.perf_counter())
                time.sleep(0.0005)
        thread = threading.Thread(target=beat)
        thread.start()
        inside = 0
        for _ in range(20):
            start = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            inside += sum(start < b < end for b in beats)
        running = False
        thread.join()
        print(inside > 0)
    """
    assert run_python(code, tmp_path) == "True\n"


def test_optimizers_step_in_several_python_threads(tmp_path):
    code = """
        import threading, torch
        from adamops import DeepSpeedCPUAdam
        def train(results, i):
            generator = torch.Generator().manual_seed(i % 2)
            param = torch.nn.Parameter(torch.randn(200_000, generator=generator))
            optimizer = DeepSpeedCPUAdam([param])
            for _ in range(20):
                param.grad = torch.randn(200_000, generator=generator)
                optimizer.step()
            results[i] = param.detach()
        results = {}
        threads = [threading.Thread(target=train, args=(results, i)) for i in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(all(torch.equal(results[i], results[i % 2]) for i in range(6)))
    """
    assert run_python(code, tmp_path) == "True\n"


def test_importing_adamops_imports_neither_torch_nor_cpuinfo(tmp_path):
    code = """
        import sys, adamops
        print([name for name in ("torch", "cpuinfo", "setuptools", "pybind11", "rich") if name in sys.modules])
        assert "DeepSpeedCPUAdam" in dir(adamops)
        import torch
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        adamops.DeepSpeedCPUAdam([param]).step()
        print("cpuinfo" in sys.modules)
    """
    assert run_python(code, tmp_path) == "[]\nFalse\n"


def test_the_first_steps_do_not_import_the_compiler_of_torch(tmp_path):
    """Optimizer's own methods import torch._dynamo when they are first called, which takes a second."""
    code = """
        import sys, torch
        from adamops import DeepSpeedCPUAdam
        model = torch.nn.Linear(3, 2)
        optimizer = DeepSpeedCPUAdam(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        print("torch._dynamo" in sys.modules)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            optimizer.zero_grad()
            compiled(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        print(len(optimizer.param_groups))
    """
    assert run_python(code, tmp_path) == "False\n2\n"


def test_an_openmp_runtime_without_global_visibility_is_found(tmp_path):
    """As torch's wheels for AArch64 load it: with torch's library, here an empty one of that name."""
    library = tmp_path / "libtorch_cpu.so"
    linking = ["-shared", f"-Wl,-soname,{library.name}", "-Wl,--no-as-needed", "-lgomp", "-o", str(library)]
    Compiler.find().run(["-x", "c++", os.devnull, "-x", "none", *linking])
    code = f"""
        import ctypes, sys
        from adamops import op_builder
        module = op_builder.get("cpu_adam").load()
        print([module.openmp_runtime()])
        ctypes.CDLL({str(library)!r})
        print("libgomp" in module.openmp_runtime(), "torch" in sys.modules)
    """
    assert run_python(code, tmp_path) == "['']\nTrue False\n"


def test_the_module_works_before_torch_is_imported(tmp_path):
    """It finds torch's OpenMP runtime whenever that comes."""
    code = """
        from adamops import op_builder
        module = op_builder.get("cpu_adam").load()
        assert module.openmp_runtime() == ""
        import torch
        from adamops import DeepSpeedCPUAdam
        param = torch.nn.Parameter(torch.ones(1_000_000))
        param.grad = torch.ones(1_000_000)
        DeepSpeedCPUAdam([param]).step()
        print("omp" in module.openmp_runtime())
    """
    assert run_python(code, tmp_path) == "True\n"


@pytest.mark.parametrize("target", ["avx2", "baseline"])
def test_adamops_simd_forces_a_target(tmp_path, cpu_adam, target):
    if target not in cpu_adam.supported_targets():
        pytest.skip(f"this CPU or build has no {target}")
    code = "from adamops import op_builder; print(op_builder.get('cpu_adam').load().target())"
    assert run_python(code, tmp_path, ADAMOPS_SIMD=target) == f"{target}\n"


def test_an_unknown_adamops_simd_is_an_error_that_names_the_valid_ones(tmp_path):
    code = """
        import torch
        from adamops import DeepSpeedCPUAdam
        try:
            DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(3))])
        except ValueError as error:
            print(error)
    """
    message = run_python(code, tmp_path, ADAMOPS_SIMD="avx9000")
    assert message.startswith("ADAMOPS_SIMD='avx9000' is not valid on this machine; use one of ")
    assert "baseline" in message


def test_without_the_op_torch_calls_take_over_with_one_warning(tmp_path):
    """Nothing prebuilt and no compiler: the same training, slower, and said so once."""
    code = """
        import warnings, torch
        from adamops import DeepSpeedCPUAdam, op_builder
        builder = op_builder.get("cpu_adam")
        builder.MODULE = "adamops._native.missing"
        params = [torch.nn.Parameter(torch.randn(50).to(d)) for d in (torch.float32, torch.bfloat16)]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            slow = DeepSpeedCPUAdam(params, lr=1e-2, weight_decay=0.1, amsgrad=True)
        print(len(caught), caught[0].category.__name__, caught[0].filename)
        print(caught[0].message)
        del builder.MODULE
        builder._failure = None
        fast = DeepSpeedCPUAdam(twins, lr=1e-2, weight_decay=0.1, amsgrad=True)
        host = torch.device("cpu")
        assert (slow._backends[host].name, fast._backends[host].name) == ("torch_adam", "cpu_adam")
        for _ in range(20):
            for p, q in zip(params, twins):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            slow.step()
            fast.step()
        for p, q in zip(params, twins):
            torch.testing.assert_close(p, q, rtol=1e-5 if p.dtype == torch.float32 else 2e-2, atol=1e-5)
    """
    out = run_python(code, tmp_path, PATH="/nonexistent", ADAMOPS_CACHE_DIR=str(tmp_path / "cache"))
    assert out.startswith("1 RuntimeWarning <string>\n")
    assert "prebuilt extension: none came with this installation" in out
    assert "build at run time: no C++ compiler found (set CXX, or install g++ or clang++)" in out
    assert "python -m adamops.report" in out


def test_set_num_threads_between_steps(cpu_adam):
    from adamops import DeepSpeedCPUAdam

    results = []
    for counts in ((1, 1, 1), (1, 2, 8), (5, 3, 1)):
        generator = torch.Generator().manual_seed(5)
        param = torch.nn.Parameter(torch.randn(300_001, generator=generator))
        optimizer = DeepSpeedCPUAdam([param])
        for count in counts:
            torch.set_num_threads(count)
            param.grad = torch.randn(300_001, generator=generator)
            optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("numel", [1, 37, 1_100_000])
def test_grads_in_memory_that_may_only_be_read(tmp_path, numel):
    """A step that does not zero them writes none, not even the last ones in place of themselves."""
    (tmp_path / "grads").write_bytes(torch.randn(numel).numpy().tobytes())
    code = f"""
        import mmap, torch, warnings
        from adamops import DeepSpeedCPUAdam
        warnings.simplefilter("ignore")  # torch's, that the memory may only be read
        file = open("grads", "rb")
        param = torch.nn.Parameter(torch.zeros({numel}))
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        param.grad = torch.frombuffer(memory, dtype=torch.float32)
        DeepSpeedCPUAdam([param], lr=0.5).step()
        print(torch.equal(param.detach().sign(), -param.grad.sign()))
    """
    assert run_python(code, tmp_path).strip() == "True"

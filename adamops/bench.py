"""Times the optimizers against their peers and against merely moving the bytes: `python -m adamops.bench`.

All implementations work on the same memory, because where large tensors happen to lie can change times by a tenth.
Ratios are taken within a round, because the memory of a shared machine may be twice as fast in one second as in the
next.

Must not know how any of them works: it calls what users call. Only the bandwidth probe and the SIMD target come from
the op itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import __version__, functional, op_builder
from ._bench_models import MODELS, described
from ._bench_text import PROBE, draw, header, in_words, lines_of, numbered
from ._counts import count
from ._installation import installation
from ._limits import cores, free_memory
from .ops.adam import DeepSpeedCPUAdam
from .optim.state.precision import DTYPES
from .report import cpu_name
from .threads import get_num_threads, set_num_threads

OURS = "adamops"
PREFETCH_BYTES = (0, 256, 512, 1024, 2048, 4096)
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

# Rounds that are not counted: the first creates the states, the second finds them in memory.
WARMUP_ROUNDS = 2

_PROCESS_BYTES = 500_000_000  # of torch itself, before any case

# About how many bytes the params, grads and states take per element, and how many with peers: these make states before
# they share ours, and torch's foreach has intermediates. A case without a row is as fp32.
_BYTES_PER_ELEMENT = {
    "fp32": (16, 28),
    "bf16-params": (12, 20),
    "bf16": (8, 14),
    "bf16-grads": (26, 30),
    "8bit": (10, 30),
}

# Elements in the untimed work before each call; see _as_after_a_backward_pass().
WARM_ELEMENTS = 2_000_000


class Unavailable(Exception):
    """An implementation cannot take part; the message says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command line. If `repeat` is None, each case uses its own number of rounds."""

    elements: int
    repeat: int | None
    threads: int
    peers: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """The tensors of a case: their sizes in elements, the dtype of params and grads, and the dtype of the states."""

    numels: list[int]
    dtype: torch.dtype
    state_dtype: torch.dtype


@dataclasses.dataclass
class Result:
    """The times of a case in milliseconds, for each implementation in call order.

    `ours` is the implementation that the others are compared with. `skipped` maps names to reasons. `probe` has the
    bandwidth probe's times for every prefetch distance; `times` has only the best of them.
    """

    title: str
    times: dict[str, list[float]]
    ours: str = OURS
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    probe: dict[int, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, name: str) -> float:
        """The implementation's median time in milliseconds."""
        return statistics.median(self.times[name])

    def speed(self, other: str) -> float:
        """Our speed relative to the other's, as the median over the rounds. Above 1, ours is faster."""
        rounds = zip(self.times[other], self.times[self.ours], strict=True)
        return statistics.median(theirs / ours for theirs, ours in rounds)

    def as_json(self) -> dict[str, Any]:
        """All measurements, and the figures derived from them."""
        implementations = {
            name: {
                "median_ms": self.median(name),
                "min_ms": min(times),
                "adamops_speed": self.speed(name),
                "times_ms": times,
            }
            for name, times in self.times.items()
        }
        return {
            "title": self.title,
            "ours": self.ours,
            "implementations": implementations,
            "skipped": self.skipped,
            "probe_times_ms_by_prefetch_bytes": self.probe,
        }


# Implementations ---------------------------------------------------------------------------------------------------


def new_params(numels: Sequence[int], dtype: torch.dtype) -> list[Parameter]:
    """Params with grads, filled with normally distributed random values."""
    params = [Parameter(torch.randn(numel, dtype=dtype)) for numel in numels]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def share_states(leader: Optimizer, other: Optimizer) -> None:
    """Makes `other` use the averages of `leader`, an optimizer of the same params, as its own."""
    for param in leader.state:
        for key in ("exp_avg", "exp_avg_sq"):
            other.state[param][key] = leader.state[param][key]


def adamops_optimizer(params: list[Parameter], state_dtype: torch.dtype) -> Optimizer:
    """Ours."""
    return DeepSpeedCPUAdam(params, **HYPER, fp32_optimizer_states=state_dtype == torch.float32)


def torch_optimizer(kind: str, params: list[Parameter], state_dtype: torch.dtype) -> Optimizer:
    """torch.optim.AdamW, its "fused" or its "foreach" implementation."""
    if params[0].dtype != state_dtype:
        raise Unavailable("torch.optim.AdamW keeps its states in the dtype of the params")
    settings = {**HYPER, kind: True}
    return torch.optim.AdamW(params, **settings)


@functools.cache
def deepspeed_adam() -> type[Optimizer]:
    """DeepSpeed's class. Raises Unavailable if it cannot be imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    # Its build at first use looks for ninja on the PATH, which may not include this environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam as DeepSpeeds
    except Exception as error:  # its import runs a lot of code
        raise Unavailable(f"cannot be imported: {last_line(error)}") from error
    return DeepSpeeds


def deepspeed_optimizer(params: list[Parameter], state_dtype: torch.dtype) -> Optimizer:
    """DeepSpeed's. Its op is compiled at first use, in a minute or so."""
    deepspeeds: Callable[..., Optimizer] = deepspeed_adam()
    try:
        return deepspeeds(params, **HYPER, adamw_mode=True, fp32_optimizer_states=state_dtype == torch.float32)
    except Exception as error:  # so does its build
        raise Unavailable(f"cannot be built: {last_line(error)}") from error


OPTIMIZERS: dict[str, Callable[[list[Parameter], torch.dtype], Optimizer]] = {
    OURS: adamops_optimizer,
    "torch fused": functools.partial(torch_optimizer, "fused"),
    "torch foreach": functools.partial(torch_optimizer, "foreach"),
    "DeepSpeed": deepspeed_optimizer,
}


def eight_bit_optimizer(params: list[Parameter], _: torch.dtype) -> Optimizer:
    """Ours with quantized states."""
    return DeepSpeedCPUAdam(params, **HYPER, state_dtype="8bit")


def peers_eight_bit_optimizer(module: str, params: list[Parameter], _: torch.dtype) -> Optimizer:
    """AdamW8bit from bitsandbytes, which has a CPU path since 0.46, or from torchao, which compiles its step."""
    try:
        peer = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {last_line(error)}") from error
    optimizer: Optimizer = peer.AdamW8bit(params, **HYPER)
    return optimizer


EIGHT_BIT_OPTIMIZERS: dict[str, Callable[[list[Parameter], torch.dtype], Optimizer]] = {
    OURS: eight_bit_optimizer,
    "adamops fp32": adamops_optimizer,
    "torch fused fp32": functools.partial(torch_optimizer, "fused"),
    "bitsandbytes": functools.partial(peers_eight_bit_optimizer, "bitsandbytes.optim"),
    "torchao": functools.partial(peers_eight_bit_optimizer, "torchao.optim"),
}


def chosen_implementations(options: Options) -> list[str]:
    """The names of the optimizers to time."""
    return list(OPTIMIZERS) if options.peers else [OURS]


def last_line(error: Exception) -> str:
    """An error as one line: the end of a compiler's log is what matters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


class BandwidthProbe:
    """Moves the bytes that an optimizer's step would, without computing or changing anything."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.module = op_builder.get("cpu_adam").load()
        codes = {dtype: self.module.DTYPES[str(dtype).removeprefix("torch.")] for dtype in DTYPES}
        rows = []
        self.tensors: list[Tensor] = []  # kept alive here, as the table owns nothing
        for param, state in optimizer.state.items():
            if param.grad is None:
                continue
            tensors = [param, param.grad, state["exp_avg"], state["exp_avg_sq"]]
            self.tensors += tensors
            addresses = [tensor.data_ptr() for tensor in tensors]
            rows.append(
                {
                    "param": addresses[0],
                    "grad": addresses[1],
                    "states": addresses[2:],
                    "numel": param.numel(),
                    "param_dtype": codes[param.dtype],
                    "grad_dtype": codes[param.grad.dtype],
                    "state_dtype": codes[state["exp_avg"].dtype],
                    "step": 1,
                }
            )
        self.table = self.module.table_of_rows(rows, state_count=2)

    def __call__(self, prefetch_bytes: int) -> None:
        """Moves all bytes once with this prefetch distance in bytes; 0 means no prefetch."""
        self.module.bandwidth_probe(self.table, prefetch_bytes, torch.get_num_threads())


# Timing ------------------------------------------------------------------------------------------------------------


def time_in_rounds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times every call once per round, in milliseconds. Each round has a different order.

    The order is random but the same for every run. No call profits from what a fixed predecessor leaves in the caches.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-WARMUP_ROUNDS, rounds):
        for name in order.sample(list(calls), len(calls)):
            _as_after_a_backward_pass()
            start = time.perf_counter()
            calls[name]()
            took = time.perf_counter() - start
            if i >= 0:
                times[name].append(1e3 * took)
    return times


def _as_after_a_backward_pass() -> None:
    """Keeps torch's threads busy for a moment, so that every call finds them awake, as a step in training does.

    Waking them from a longer sleep may take scheduler ticks: 8 ms were measured after a pause of 20 ms. Also, a peer
    may bring its own OpenMP runtime, whose idle threads spin for a while; they have stopped when the call begins.
    """
    torch.linspace(0, 1, WARM_ELEMENTS).sin_()


def time_work(title: str, work: Work, options: Options, rounds: int, shared: bool = True) -> Result:
    """Times the steps of all optimizers, and the bandwidth probe. With `shared`, all use the same memory."""
    params = new_params(work.numels, work.dtype)
    ours = OPTIMIZERS[OURS](params, work.state_dtype)
    ours.step()
    calls: dict[str, Callable[[], object]] = {OURS: ours.step}
    skipped = {}
    for name in chosen_implementations(options)[1:]:
        try:
            peer = OPTIMIZERS[name](params if shared else new_params(work.numels, work.dtype), work.state_dtype)
        except Unavailable as reason:
            skipped[name] = str(reason)
            continue
        if shared:
            peer.step()
            share_states(ours, peer)
        calls[name] = peer.step
    return time_beside_the_probe(title, ours, calls, skipped, options.repeat or rounds)


def time_beside_the_probe(
    title: str, ours: Optimizer, calls: dict[str, Callable[[], object]], skipped: dict[str, str], rounds: int
) -> Result:
    """Times calls, and the bandwidth probe on the tensors of our optimizer."""
    probe = BandwidthProbe(ours)
    probes = {f"{PROBE} {distance}": distance for distance in PREFETCH_BYTES}
    calls |= {name: functools.partial(probe, distance) for name, distance in probes.items()}
    times = time_in_rounds(calls, rounds)
    by_distance = {distance: times.pop(name) for name, distance in probes.items()}
    times[PROBE] = min(by_distance.values(), key=statistics.median)
    return Result(title, times, skipped=skipped, probe=by_distance)


# How a training script imports each.
IMPORTS = {
    OURS: "from adamops import DeepSpeedCPUAdam",
    "DeepSpeed": "from deepspeed.ops.adam import DeepSpeedCPUAdam",
}


# Cases -------------------------------------------------------------------------------------------------------------


def human(count: int) -> str:
    """A count for a title, such as "100 M"."""
    return f"{count / 1e6:g} M" if count >= 1_000_000 else str(count)


def one_fp32_tensor(options: Options) -> Result:
    """One large fp32 tensor."""
    work = Work([options.elements], torch.float32, torch.float32)
    return time_work(f"{human(options.elements)}, fp32", work, options, rounds=15)


def one_bf16_tensor_with_fp32_states(options: Options) -> Result:
    """One large tensor, with bf16 params and grads and fp32 states."""
    work = Work([options.elements], torch.bfloat16, torch.float32)
    return time_work(f"{human(options.elements)}, bf16 params and grads, fp32 states", work, options, rounds=15)


def one_bf16_tensor(options: Options) -> Result:
    """One large tensor, with bf16 params, grads and states."""
    work = Work([options.elements], torch.bfloat16, torch.bfloat16)
    return time_work(f"{human(options.elements)}, bf16 params, grads and states", work, options, rounds=15)


def fp32_params_with_bf16_grads(options: Options) -> Result:
    """One large fp32 tensor with bf16 grads, which the others must widen first."""
    title = f"{human(options.elements)}, fp32, bf16 grads"
    (param,) = new_params([options.elements], torch.float32)
    if not hasattr(param, "grad_dtype"):
        return Result(title, {}, skipped={OURS: "before torch 2.10 a float32 param takes no bfloat16 grad"})
    grad, twin = param.grad, Parameter(param.detach())  # of the same memory
    twin.grad, param.grad = grad, None
    param.grad_dtype = torch.bfloat16
    param.grad = torch.randn_like(param, dtype=torch.bfloat16)
    ours = adamops_optimizer([param], torch.float32)
    ours.step()
    calls: dict[str, Callable[[], object]] = {OURS: ours.step}
    skipped = {}
    for name in chosen_implementations(options):
        try:
            other = OPTIMIZERS[name]([twin], torch.float32)
        except Unavailable as reason:
            skipped[name] = str(reason)
            continue
        other.step()
        other.state[twin].update({key: ours.state[param][key] for key in ("exp_avg", "exp_avg_sq")})
        calls[f"{name} after widening"] = functools.partial(_widen_and_step, param, twin, other)
    return time_beside_the_probe(title, ours, calls, skipped, options.repeat or 15)


def _widen_and_step(param: Parameter, twin: Parameter, optimizer: Optimizer) -> None:
    twin.grad.copy_(param.grad)  # type: ignore[union-attr, arg-type]
    optimizer.step()


def eight_bit_states(options: Options) -> Result:
    """One large fp32 tensor with 8-bit states, and with fp32 states for comparison."""
    params = new_params([options.elements], torch.float32)
    optimizers: dict[str, Optimizer] = {}
    skipped = {}
    for name, make in EIGHT_BIT_OPTIMIZERS.items():
        if name != OURS and not options.peers:
            continue
        try:
            optimizer = make(params, torch.float32)
            optimizer.step()
        except Exception as reason:  # a peer's step may need a compiler or a GPU
            skipped[name] = str(reason) if isinstance(reason, Unavailable) else f"cannot step: {last_line(reason)}"
        else:
            optimizers[name] = optimizer
    if "torch fused fp32" in optimizers:
        share_states(optimizers["adamops fp32"], optimizers["torch fused fp32"])
    calls = {name: optimizer.step for name, optimizer in optimizers.items()}
    title = f"{human(options.elements)}, fp32, 8-bit states"
    return Result(title, time_in_rounds(calls, options.repeat or 5), skipped=skipped)


def clip_step_and_zero(options: Options) -> Result:
    """Clipping to a maximum norm, a step, and zeroing the grads, for 200 tensors."""
    sizes = [max(1, options.elements // 200)] * 200
    params = new_params(sizes, torch.float32)
    ours = adamops_optimizer(params, torch.float32)
    assert isinstance(ours, DeepSpeedCPUAdam)
    ours.step()

    def step_of_ours() -> None:
        ours.clip_grad_norm_(1.0)
        ours.step(zero_grads=True)

    calls: dict[str, Callable[[], object]] = {OURS: step_of_ours}
    if options.peers:
        theirs = torch_optimizer("fused", params, torch.float32)
        theirs.step()
        share_states(ours, theirs)

        def step_of_torch() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            theirs.step()
            theirs.zero_grad(set_to_none=False)

        calls["torch fused"] = step_of_torch
    title = f"clip, step, zero grads: 200 tensors of {human(sizes[0])}"
    return Result(title, time_in_rounds(calls, options.repeat or 15))


def many_tensors(options: Options) -> Result:
    """A thousand small tensors, where overhead counts. Memory is not shared, as the caches hold many of them."""
    numel = max(1, min(4000, options.elements // 1000))
    work = Work([numel] * 1000, torch.float32, torch.float32)
    return time_work(f"1000 tensors of {numel}, fp32", work, options, rounds=50, shared=False)


def time_model(name: str, options: Options) -> Result:
    """The params of a real model, in fp32."""
    work = Work(MODELS[name](), torch.float32, torch.float32)
    return time_work(described(name), work, options, rounds=15)


def functional_call(options: Options) -> Result:
    """adamops.functional beside a step, on the same tensors: a thousand small ones."""
    numel = max(1, min(4000, options.elements // 1000))
    params = new_params([numel] * 1000, torch.float32)
    optimizer = adamops_optimizer(params, torch.float32)
    optimizer.step()
    states = [[optimizer.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq")]
    grads = [param.grad for param in params]
    settings = {name: HYPER[name] for name in ("lr", "eps", "weight_decay")}
    ours, step = f"{OURS}.functional", f"{OURS} step"
    call = functools.partial(functional.adamw_, params, grads, *states, step=2, **settings)
    calls: dict[str, Callable[[], object]] = {ours: call, step: optimizer.step}
    title = f"functional call, 1000 tensors of {numel}, fp32"
    return Result(title, time_in_rounds(calls, options.repeat or 50), ours)


def forced_avx2(options: Options) -> Result:
    """AVX2 on a CPU that supports more: one optimizer, with its SIMD target switched between steps."""
    module = op_builder.get("cpu_adam").load()
    best, title = module.target(), f"{human(options.elements)}, fp32, AVX2 forced"
    ours, other = f"{OURS} avx2", f"{OURS} {best}"
    if best == "avx2" or "avx2" not in module.supported_targets():
        return Result(title, {}, ours, {ours: f"the SIMD target here is {best}"})
    optimizer = adamops_optimizer(new_params([options.elements], torch.float32), torch.float32)

    def step_with(target: str) -> None:
        module.use_target(target)
        optimizer.step()

    calls = {ours: functools.partial(step_with, "avx2"), other: functools.partial(step_with, best)}
    try:
        return Result(title, time_in_rounds(calls, options.repeat or 15), ours)
    finally:
        module.use_target(best)


def import_after_torch(options: Options) -> Result:
    """Importing the optimizer after torch, each time in a new process."""
    code = "import time, torch; start = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - start))"
    codes = {name: code.format(IMPORTS[name]) for name in chosen_implementations(options) if name in IMPORTS}
    return time_processes("import after torch, in a new process", codes, options)


def first_step(options: Options) -> Result:
    """Constructing the optimizer and taking its first step on a small model, each time in a new process."""
    code = "from adamops import bench; print(bench.first_step_ms({!r}, {}))"
    codes = {name: code.format(name, options.threads) for name in chosen_implementations(options)}
    return time_processes("first step of a small model, in a new process", codes, options)


def time_processes(title: str, codes: Mapping[str, str], options: Options) -> Result:
    """Runs each implementation's code in new processes, in rounds. The last word it prints is its milliseconds."""
    result = Result(title, {})
    for _ in range(options.repeat or 3):
        for name, code in codes.items():
            if name in result.skipped:
                continue
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode == 0:
                result.times.setdefault(name, []).append(float(done.stdout.split()[-1]))
            else:
                reason = done.stderr.strip().splitlines()[-1]
                result.skipped[name] = reason.removeprefix("adamops.bench.Unavailable: ")
                result.times.pop(name, None)
    return result


def use_threads(count: int) -> None:
    """The number of threads for all implementations."""
    torch.set_num_threads(count)
    set_num_threads(count)


def first_step_ms(name: str, threads: int) -> float:
    """Milliseconds to construct the named optimizer and take a step, after all imports and a backward pass."""
    use_threads(threads)
    if name == "DeepSpeed":
        deepspeed_adam()
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    model(torch.randn(32, 64)).square().mean().backward()
    start = time.perf_counter()
    OPTIMIZERS[name](list(model.parameters()), torch.float32).step()
    return 1e3 * (time.perf_counter() - start)


# Those that never call DeepSpeed's op, which it compiles first.
_WITHOUT_DEEPSPEEDS_OP = {"8bit", "clip", "functional", "avx2", "import"}

CASES: dict[str, Callable[[Options], Result]] = {
    "fp32": one_fp32_tensor,
    "bf16-params": one_bf16_tensor_with_fp32_states,
    "bf16": one_bf16_tensor,
    "bf16-grads": fp32_params_with_bf16_grads,
    "many-tensors": many_tensors,
    "8bit": eight_bit_states,
    "clip": clip_step_and_zero,
    "functional": functional_call,
    "avx2": forced_avx2,
    "import": import_after_torch,
    "first-step": first_step,
}


# Command line ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd_target": op_builder.get("cpu_adam").load().target(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed,
        "adamops": __version__,
    }


def elements_of(name: str, elements: int) -> int:
    """About how many params a case has, where the large tensors have this many elements."""
    if name in MODELS:
        return sum(MODELS[name]())
    return {"import": 0, "first-step": 20_000, "many-tensors": 4_000_000, "functional": 4_000_000}.get(name, elements)


def bytes_needed(name: str, elements: int, peers: bool) -> int:
    """About how much memory a case takes."""
    alone, with_peers = _BYTES_PER_ELEMENT.get(name, _BYTES_PER_ELEMENT["fp32"])
    return _PROCESS_BYTES + elements_of(name, elements) * (with_peers if peers else alone)


def seconds_needed(cases: Sequence[str], options: Options) -> float:
    """About how long the cases take here, by how fast memory is copied."""
    source = torch.zeros(2**24)
    target = torch.zeros_like(source)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(3))
    per_element = 28 / (8 * 2**24 / copy)  # a step reads 16 bytes and writes 12
    calls = len(PREFETCH_BYTES) + (5 if options.peers else 1)
    rounds = WARMUP_ROUNDS + (options.repeat or 15)
    processes = (options.repeat or 3) * (4 if options.peers else 1) * 3.0  # each imports torch
    return sum(
        processes
        if name in ("import", "first-step")
        else 2 + rounds * calls * elements_of(name, options.elements) * per_element
        for name in cases
    )


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def plan(cases: Sequence[str], options: Options, deepspeed: str | None) -> str:
    """What a run will take, in words. `deepspeed` is the version of DeepSpeed, if it is installed."""
    memory = max(bytes_needed(name, options.elements, options.peers) for name in cases)
    compiles = options.peers and deepspeed and not _WITHOUT_DEEPSPEEDS_OP.issuperset(cases)
    more = ", and more where DeepSpeed compiles its op first" if compiles else ""
    return (
        f"{numbered(len(cases), 'case')}: about {in_words(seconds_needed(cases, options))} where nothing else runs"
        f"{more}, with up to {memory / 1e9:.1f} GB of memory. Ctrl-C keeps what is finished."
    )


def output_file(text: str) -> Path:
    """A file that can be written, for argparse. It is not changed."""
    path = Path(text)
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from None
    return path


def chart_file(text: str) -> Path:
    """A file that matplotlib can draw into, for argparse."""
    path = output_file(text)
    if path.suffix[1:] and importlib.util.find_spec("matplotlib"):  # without a suffix, it adds one
        from matplotlib.backend_bases import FigureCanvasBase

        if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
            raise argparse.ArgumentTypeError(f"{text}: matplotlib does not write {path.suffix}; use .png, .svg or .pdf")
    return path


def threads(text: str) -> int:
    """A number of threads for which this process has the cores, for argparse. With more, a call may never end."""
    number = count(text)
    if number > cores():
        raise argparse.ArgumentTypeError(f"{text} is too many: this process has {numbered(cores(), 'core')}")
    return number


def why_too_large(cases: Sequence[str], elements: int, peers: bool) -> str | None:
    """Why the cases do not fit into memory, and what would; None if they do, or if the system does not say."""
    needed, largest = max((bytes_needed(name, elements, peers), name) for name in cases)
    free = free_memory()
    if free is None or needed <= free:
        return None
    smaller = f"leave out --models {largest}" if largest in MODELS else "use a smaller --elements"
    return f"needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: {smaller}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m adamops.bench", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=None, metavar="CASE",
                        help=f"which to run: {', '.join(CASES)} (default: all, unless --models is given)")  # fmt: skip
    parser.add_argument("--models", nargs="*", choices=list(MODELS), metavar="MODEL",
                        help=f"the params of real models: {', '.join(MODELS)}; all, if none is named")  # fmt: skip
    parser.add_argument("--elements", type=count, default=100_000_000, help="of the large tensors (default: 100M)")
    parser.add_argument("--repeat", type=count, help="rounds that are counted (default: as suits the case)")
    parser.add_argument("--threads", type=threads, help="for all implementations (default: adamops.get_num_threads())")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all times there, case by case")
    parser.add_argument("--plot", type=chart_file, metavar="FILE", help="also draw a chart there; needs matplotlib")
    parser.add_argument("--no-peers", action="store_true", help="time only adamops and the bandwidth probe")
    args = parser.parse_args(arguments)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and args.no_peers:
        parser.error("--plot draws adamops beside its peers, and --no-peers leaves them out")
    models = list(MODELS) if args.models == [] else args.models or []
    args.names = list(dict.fromkeys([*(args.cases or ([] if models else CASES)), *models]))
    if reason := why_too_large(args.names, args.elements, not args.no_peers):
        parser.error(reason)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, which is 1 when the op is not available, 130 after Ctrl-C."""
    args = parse(arguments)
    try:
        op_builder.get("cpu_adam").load()
        use_threads(args.threads or get_num_threads())
    except (op_builder.OpUnavailableError, ValueError) as error:  # the latter for an environment variable
        print(error, file=sys.stderr)
        return 1
    options = Options(args.elements, args.repeat, torch.get_num_threads(), not args.no_peers)
    facts = environment()
    report: dict[str, Any] = {"environment": facts, "cases": {}}
    show(*header(facts, plan(args.names, options, facts["deepspeed"]), installation()["hint"]))
    status, said = 0, set[str]()
    try:
        for name in args.names:
            is_model = name in MODELS
            result = time_model(name, options) if is_model else CASES[name](options)
            case = report["cases"][name] = result.as_json()
            show(*lines_of(f"--{'models' if is_model else 'cases'} {name}", case, said))
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            gc.collect()  # a reference cycle may keep an optimizer alive, and gigabytes with it
    except KeyboardInterrupt:
        show("", f"Interrupted after {len(report['cases'])} of {len(args.names)} cases.")
        status = 130
    if args.plot and report["cases"]:
        draw(report["cases"], facts, args.plot)
    return status


def show(*lines: str) -> None:
    """Prints lines at once, also into a pipe."""
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Times FusedAdam on a GPU, in rounds, against the Adam of torch, apex and DeepSpeed, and against copying memory.

Part of ci/gpu.sh. Needs torch only; peers are included if they are installed. Times are medians between two events on
the GPU's stream, so they include host time whenever the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable

import torch

from adamops import FusedAdam

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
GPU = "cuda"


def gpt2_sizes(layers: int = 12, width: int = 768) -> list[int]:
    """The tensor sizes of a GPT-2; by default 124 M elements in 148 tensors."""
    block = [width, width, 3 * width * width, 3 * width, width * width, width, width, width]
    block += [4 * width * width, 4 * width, 4 * width * width, width]
    return [50257 * width, 1024 * width, *(block * layers), width, width]


def peers() -> dict[str, Callable]:
    """Factories of the peers' optimizers: they take the params and whether to keep masters; None if unsupported."""
    found: dict[str, Callable] = {
        "torch fused": lambda params, masters: None if masters else torch.optim.AdamW(params, **HYPER, fused=True),
        "torch foreach": lambda params, masters: None if masters else torch.optim.AdamW(params, **HYPER, foreach=True),
    }
    try:
        from apex.optimizers import FusedAdam as Apex

        found["apex"] = lambda params, m: Apex(params, **HYPER, capturable=m, master_weights=m)
    except Exception as error:
        print(f"apex does not take part: {type(error).__name__}: {error}")
    try:
        from deepspeed.ops.adam import FusedAdam as DeepSpeeds

        DeepSpeeds([torch.nn.Parameter(torch.zeros(1, device=GPU))])  # triggers its build at first use
        found["DeepSpeed"] = lambda params, masters: None if masters else DeepSpeeds(params, **HYPER)
    except Exception as error:
        print(f"DeepSpeed does not take part: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    return found


def milliseconds(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each round has its own random order, the same in every run; the first three rounds are warm-up."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name in order.sample(list(calls), len(calls)):
            took = milliseconds(calls[name])
            if i >= 3:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(elements: int) -> float:
    """The bandwidth of a device-to-device copy in bytes per second, counting both reads and writes."""
    source = torch.zeros(min(elements, 2**28), device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (medians({"copy": lambda: target.copy_(source)}, 20)["copy"] * 1e-3)


def case(title: str, sizes: list[int], dtype: torch.dtype, masters: bool, bandwidth: float, rounds: int) -> None:
    makers: dict[str, Callable] = {
        "adamops": lambda params, masters: FusedAdam(params, **HYPER, master_weights=masters),
        "adamops capturable": lambda params, m: FusedAdam(params, **HYPER, master_weights=m, capturable=True),
        **peers_found,
    }
    calls = {}
    for name, make in makers.items():
        params = [torch.nn.Parameter(torch.randn(size, device=GPU, dtype=dtype)) for size in sizes]
        for param in params:
            param.grad = torch.randn_like(param)
        if dtype != torch.float32 and name.startswith("torch"):
            continue  # its states would be 16-bit
        try:
            optimizer = make(params, masters)
        except Exception as error:  # raised by a peer
            print(f"{name} does not take part in {title}: {type(error).__name__}: {error}")
            continue
        if optimizer is None:
            continue
        calls[name] = optimizer.step
        if name == "adamops capturable":
            calls["adamops in a graph"] = graph_of(optimizer)
    found = medians(calls, rounds)
    width = dtype.itemsize
    each = 2 * 8 + 2 * width + (2 * 4 if masters else width)  # states; grad in, param out; master or param
    print(f"\n{title}: {sum(sizes) / 1e6:.1f} M elements in {len(sizes)} tensors, {each} bytes per element")
    for name, took in found.items():
        part = each * sum(sizes) / (took * 1e-3) / bandwidth
        print(
            f"  {name:20} {took:9.3f} ms   {took / found['adamops']:6.2f} x adamops   {part:5.2f} of a copy's bandwidth"
        )


def graph_of(optimizer: FusedAdam) -> Callable[[], None]:
    """The optimizer's step, captured in a CUDA graph."""
    optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def less_precision(elements: int, bandwidth: float, rounds: int) -> None:
    """Times a bfloat16 tensor with 8-bit states and 24-bit masters; and clip, step and zeroing against torch's."""
    param = torch.nn.Parameter(torch.randn(elements, device=GPU, dtype=torch.bfloat16))
    param.grad = torch.randn_like(param)
    small = FusedAdam([param], **HYPER, state_dtype="8bit", master_weight_bits=24)
    took = medians({"step": small.step}, rounds)["step"]
    each = 2 + 2 * 2 + 2 * 1 + 2 * 2 + 2 / 64  # grad in; param, remainder and states in and out; scales
    part = each * elements / (took * 1e-3) / bandwidth
    print(
        f"\n8-bit states, 24-bit masters: {took:.3f} ms, {each:.2f} bytes per element, {part:.2f} of a copy's bandwidth"
    )

    params = [torch.nn.Parameter(torch.randn(elements // 200, device=GPU)) for _ in range(200)]
    for own in params:
        own.grad = torch.randn_like(own)
    ours, theirs = FusedAdam(params, **HYPER), torch.optim.AdamW(params, **HYPER, fused=True)

    def our_round() -> None:
        ours.clip_grad_norm_(1.0)
        ours.step(zero_grads=True)

    def their_round() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=False)

    found = medians({"adamops": our_round, "torch fused": their_round}, rounds)
    print(f"clip, step and zero, 200 tensors: {found['adamops']:.3f} ms; torch fused {found['torch fused']:.3f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--elements", type=int, default=100_000_000, help="of the large tensors (default: 100 M)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds that are counted (default: 30)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    peers_found = peers()
    speed = copy_bandwidth(options.elements)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; a copy moves {speed / 1e9:.0f} GB/s")
    one, many = [options.elements], [4000] * 1000
    rest = (speed, options.rounds)
    case("one fp32 tensor", one, torch.float32, False, *rest)
    case("one bf16 tensor, fp32 states", one, torch.bfloat16, False, *rest)
    case("one bf16 tensor, fp32 states and masters", one, torch.bfloat16, True, *rest)
    case("1000 fp32 tensors of 4000", many, torch.float32, False, *rest)
    case("GPT-2, fp32", gpt2_sizes(), torch.float32, False, *rest)
    case("GPT-2, bf16 with fp32 masters", gpt2_sizes(), torch.bfloat16, True, *rest)
    less_precision(options.elements, *rest)

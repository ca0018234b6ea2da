"""How much of an offloaded step overlaps, on a stand-in for an accelerator: python ci/offload_overlap.py [--help]

The stand-in's computations are sleeps, and its copies take the time that a bandwidth gives them: a copy in memory, then
a sleep. So the updates have most of the cores, as they would beside a GPU. Each row compares a training step with the
longest of its parts, with what adamops.offload.plan says of these parts, and with all of them one after another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from adamops import DeepSpeedCPUAdam, get_num_threads, set_num_threads
from adamops.offload import OffloadedAdam
from adamops.offload.host_stand_in import HostStandIn
from adamops.offload.plan import MODES, Times, simulated_step

MAX_NORM = 1.0


class Layer(nn.Module):
    """A layer that computes for a given time."""

    def __init__(self, elements, seconds):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.randn(elements).bfloat16()), seconds

    def forward(self, x):
        return Compute.apply(x, self.weight, self.seconds)


class Compute(torch.autograd.Function):
    """A third of the time goes to the forward pass."""

    @staticmethod
    def forward(ctx, x, weight, seconds):
        ctx.seconds, ctx.weight = seconds, weight
        with recorded("compute", "forward"):
            time.sleep(seconds / 3)
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        with recorded("compute", "backward"):
            end = time.perf_counter() + 2 * ctx.seconds / 3
            own = torch.full_like(ctx.weight, 1e-3)
            time.sleep(max(0.0, end - time.perf_counter()))
        return grad, own, None


SPANS = []  # what computes and updates, as HostStandIn.trace has the copies: stream, label, begin and end in seconds


@contextlib.contextmanager
def recorded(stream, label):
    begin = time.perf_counter()
    yield
    SPANS.append((stream, label, begin, time.perf_counter()))


class Nothing:
    """No optimizer: what remains is the time of the forward and backward passes."""

    def __init__(self, weights, model, device, **settings):
        self.weights = list(weights)

    def step(self):
        for weight in self.weights:
            weight.grad = None

    def zero_grad(self):
        pass


class InSeries:
    """All grads go down after the backward pass; then a step; then all params go up."""

    def __init__(self, weights, model, device, **settings):
        self.pairs = [(weight, nn.Parameter(weight.detach().clone())) for weight in weights]
        for _, host in self.pairs:
            host.grad = torch.empty_like(host)
        self.inner = DeepSpeedCPUAdam([host for _, host in self.pairs], **settings)
        self.device, self.stream = device, device.new_stream("copies")

    def clip_grad_norm_(self, max_norm):
        self.bring_down()
        self.inner.clip_grad_norm_(max_norm)

    def bring_down(self):
        for weight, host in self.pairs:
            if weight.grad is not None:
                self.device.download(host.grad, weight.grad, self.stream, "grad")
        self.device.synchronize(self.device.record(self.stream))
        for weight, _ in self.pairs:
            weight.grad = None

    def step(self):
        self.bring_down()
        self.inner.step()
        for weight, host in self.pairs:
            self.device.upload(weight, host.detach(), self.stream, "param")
        self.device.synchronize(self.device.record(self.stream))

    def zero_grad(self):
        pass


class OnOneStream:
    """The schedule of torchao's CPUOffloadOptimizer (0.15, offload_gradients=True), which itself needs CUDA or XPU.

    One stream has the copies of both directions, and each param has an optimizer of its own.
    """

    def __init__(self, weights, base, model, device, **settings):
        self.device, self.stream, self.arrivals = device, device.new_stream("copies"), {}
        self.hosts, self.optimizers = {}, {}
        for weight in weights:
            host = self.hosts[weight] = nn.Parameter(weight.detach().clone())
            host.grad = torch.empty_like(host)
            self.optimizers[weight] = base([host], **settings)
            weight.register_post_accumulate_grad_hook(self.send)

    def send(self, weight):
        self.device.download(self.hosts[weight].grad, weight.grad, self.stream, "grad")
        self.device.keep(weight.grad, self.stream)
        self.arrivals[weight] = self.device.record(self.stream)
        weight.grad = None

    def step(self):
        for weight, arrival in self.arrivals.items():
            self.device.synchronize(arrival)
            self.optimizers[weight].step()
            self.device.upload(weight, self.hosts[weight].detach(), self.stream, "param")
        self.device.synchronize(self.device.record(self.stream))
        self.arrivals.clear()

    def zero_grad(self):
        pass


EIGHT_BIT = {"state_dtype": "8bit", "master_weight_bits": 24}
PEERS = {
    "torchao's schedule, torch's AdamW": {"base": torch.optim.AdamW, "fused": True},  # bf16 states, no master weights
    "torchao's schedule, our optimizer": {"base": DeepSpeedCPUAdam, **EIGHT_BIT},
}


def milliseconds_of_steps(make, options, clips, **arguments):
    """The median time of a step, and the sums of what its copies and computations take, by stream."""
    device = HostStandIn(options.gbps)
    model = nn.Sequential(*(Layer(options.elements, options.compute_ms / 1e3) for _ in range(options.layers)))
    optimizer = make(model.parameters(), **{"lr": 1e-3, "device": device, "model": model} | arguments)
    if make is OffloadedAdam:
        record_updates(optimizer)
    times = []
    for i in range(options.steps + 2):
        if i != options.steps + 1:  # of the last two steps
            device.trace.clear()
            SPANS.clear()
        begin = time.perf_counter()
        model(torch.ones((), requires_grad=True)).backward()
        if clips:
            optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - begin))
    SPANS.extend(device.trace)
    parts = Counter()
    for stream, _, begin, end in SPANS:
        parts[stream] += 1e3 * (end - begin) / 2
    return statistics.median(times[2:]), parts


def record_updates(optimizer):
    update = optimizer._inner._step_params

    def recorded_update(*arguments, **named):
        with recorded("update", "update"):
            update(*arguments, **named)

    optimizer._inner._step_params = recorded_update


def write_trace(path):
    """What lies in SPANS, for chrome://tracing or ui.perfetto.dev."""
    tracks = ["compute", "down", "update", "up"]
    begin = min(span[2] for span in SPANS)
    events = [
        {"name": label, "ph": "X", "pid": 0, "tid": tracks.index(stream), "ts": 1e6 * (b - begin), "dur": 1e6 * (e - b)}
        for stream, label, b, e in SPANS
    ]
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": t}} for i, t in enumerate(tracks)]
    path.write_text(json.dumps({"traceEvents": names + events}))


def draw(axes, title):
    """What lies in SPANS, as bars."""
    tracks = {"up": "tab:green", "update": "tab:red", "down": "tab:blue", "compute": "tab:gray"}
    start = min(span[2] for span in SPANS)
    for y, (track, color) in enumerate(tracks.items()):
        bars = [(1e3 * (b - start), 1e3 * (e - b)) for stream, _, b, e in SPANS if stream == track]
        axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.3)
    axes.set_yticks(range(len(tracks)), list(tracks))
    axes.set_title(title, loc="left")


def milliseconds_of_an_update(options, clips):
    """The median time of the norm and the update of all params on the host, with nothing beside it."""
    hosts = [nn.Parameter(torch.randn(options.elements).bfloat16()) for _ in range(options.layers)]
    optimizer = DeepSpeedCPUAdam(hosts, **EIGHT_BIT)
    set_num_threads(options.threads or get_num_threads())
    times = []
    for _ in range(options.steps + 2):
        for host in hosts:
            host.grad = torch.full_like(host, 1e-3)
        begin = time.perf_counter()
        if clips:
            optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def plot(path, pictures):
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 14, "axes.titlesize": 14})  # to be read in a narrow window, too
    figure, rows = plt.subplots(len(pictures), 1, sharex=True, figsize=(8, 1.5 * len(pictures)), layout="constrained")
    for axes, (title, spans) in zip(rows, pictures, strict=True):
        SPANS[:] = spans
        draw(axes, title)
    rows[-1].set_xlabel("ms, two steps")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--elements", type=int, default=2_000_000, help="of each layer")
    parser.add_argument("--compute-ms", type=float, default=6.0, help="of each layer, forward and backward")
    parser.add_argument("--gbps", type=float, default=2.0, help="GB/s of copies in each direction")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of our updates; the stand-in's copies need cores too")
    parser.add_argument("--trace", type=Path, help="file for the last two steps of the last row, as Chrome trace JSON")
    parser.add_argument("--plot", type=Path, help="file for a picture of two steps of each row; needs matplotlib")
    options = parser.parse_args()
    pictures = []
    print(f"{options.layers} layers of {options.elements} bf16 params; ms of a step; the last three are ratios")
    print(f"{'':36}  compute  down  update    up    step  to longest part  to plan  in series to step")
    for clips in (False, True):
        update = milliseconds_of_an_update(options, clips)
        norm = update - milliseconds_of_an_update(options, False) if clips else 0.0
        compute, _ = milliseconds_of_steps(Nothing, options, False)
        in_series, _ = milliseconds_of_steps(InSeries, options, clips, **EIGHT_BIT)
        chunk = {"chunk_mb": 2 * options.elements / 2**20, "threads": options.threads}
        for name, mode in MODES.items():
            if clips and mode.get("in_backward"):
                continue
            arguments = {"update_in_backward": mode.get("in_backward", False)}
            arguments |= {} if mode.get("by_block") else {"model": None}
            step, parts = milliseconds_of_steps(OffloadedAdam, options, clips, **EIGHT_BIT, **chunk, **arguments)
            parts = [compute, parts["down"], update, parts["up"]]
            times = Times(compute / 3, 2 * compute / 3, parts[1], update - norm, parts[3], norm)
            planned = simulated_step(times, options.layers, **mode)
            title = name + (", clipping" if clips else "")
            columns = "{:36}{:9.0f}{:6.0f}{:8.0f}{:6.0f}{:8.0f}{:17.2f}{:9.2f}{:19.2f}"
            print(columns.format(title, *parts, step, step / max(parts), step / planned, in_series / step), flush=True)
            pictures.append((title, list(SPANS)))
            if name == "model=":
                ours = step
        for title, arguments in {} if clips else PEERS.items():
            step, _ = milliseconds_of_steps(OnOneStream, options, clips, **arguments)
            print(f"{title:36}{'':29}{step:8.0f}  {step / ours:.2f} x that of ours with model=", flush=True)
    if options.trace:
        write_trace(options.trace)
    if options.plot:
        plot(options.plot, pictures)


if __name__ == "__main__":
    main()

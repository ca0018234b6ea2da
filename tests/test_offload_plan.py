"""The plan of an offloaded step: its bytes are those that are allocated, its seconds those of the pipeline.

The pipeline runs on a device whose clock says how long copies, updates and computations would have taken.
"""

import random
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from offload_twins import InOrder
from torch import nn

from adamops import OffloadedAdam
from adamops.offload import __main__ as planner
from adamops.offload.host_stand_in import HostStandIn
from adamops.offload.plan import DTYPES, STATES, Precision, Times, copy_bandwidth, simulated_step

ELEMENTS = 8


class Clock(threading.local):
    """The time of a thread, in seconds."""

    now = 0.0


class ClockedDevice(InOrder):
    """Copies are done when they are enqueued; streams and events have the times at which they would have been."""

    def __init__(self, clock, seconds_of_copy):
        self.clock, self.seconds_of_copy = clock, seconds_of_copy

    def new_stream(self, name):
        return SimpleNamespace(name=name, free=0.0)

    def current_stream(self):
        return None

    def record(self, stream):
        return self.clock.now if stream is None else max(stream.free, self.clock.now)

    def wait(self, stream, event):
        if stream is None:
            self.clock.now = max(self.clock.now, event)
        else:
            stream.free = max(stream.free, event)

    def synchronize(self, event):
        self.clock.now = max(self.clock.now, event)

    def download(self, host, device, stream, label):
        host.copy_(device)
        stream.free = max(stream.free, self.clock.now) + self.seconds_of_copy[stream.name]

    upload = download


class Passes(torch.autograd.Function):
    """The passes of a layer take their time."""

    @staticmethod
    def forward(ctx, x, weight, clock, seconds):
        ctx.weight, ctx.clock, ctx.seconds = weight, clock, seconds
        clock.now += seconds[0]
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.seconds[1]
        return grad, torch.ones_like(ctx.weight), None, None


class Layer(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.weight, self.clock, self.seconds = nn.Parameter(torch.ones(ELEMENTS)), clock, seconds

    def forward(self, x):
        return Passes.apply(x, self.weight, self.clock, self.seconds)


def seconds_of_a_step(times, chunks, in_backward, by_block):
    """Those of the pipeline, once every step takes as long."""
    clock = Clock()
    copies = {"down": times.down / chunks, "up": times.up / chunks}
    model = nn.Sequential(*(Layer(clock, (times.forward / chunks, times.backward / chunks)) for _ in range(chunks)))
    optimizer = OffloadedAdam(
        model.parameters(),
        chunk_mb=1e-6,
        update_in_backward=in_backward,
        model=model if by_block else None,
        device=ClockedDevice(clock, copies),
    )
    pool, update = optimizer._pipeline._pool, optimizer._inner._step_params

    def submit(function, *arguments):
        submitted = clock.now

        def task():
            clock.now = max(clock.now, submitted)
            return function(*arguments)

        return pool.submit(task)

    def timed_update(*arguments, **named):
        update(*arguments, **named)
        clock.now += times.update / chunks

    optimizer._pipeline._pool = SimpleNamespace(submit=submit)
    optimizer._inner._step_params = timed_update
    for _ in range(6):
        begin = clock.now
        model(torch.ones((), requires_grad=True)).backward()
        if times.norm:
            optimizer.clip_grad_norm_(1.0)
            clock.now += times.norm
        optimizer.step()
        optimizer.zero_grad()
    return clock.now - begin


@pytest.mark.parametrize("_", range(40))
def test_the_plan_is_what_the_pipeline_does(_, seed):
    draw = random.Random(seed)
    times = Times(*(draw.random() for _ in range(5)), draw.choice([0.0, 0.3]))
    chunks = draw.randrange(1, 10)
    for by_block in (False, True):
        for in_backward in (False, True) if not times.norm else (False,):
            planned = simulated_step(times, chunks, in_backward, by_block)
            assert seconds_of_a_step(times, chunks, in_backward, by_block) == pytest.approx(planned, rel=1e-9)


@pytest.mark.parametrize(
    "arguments, masters, accumulate",
    [
        (("bf16", "8bit", 24), 24, 1),
        (("bf16", "fp32", 32), 32, 1),
        (("bf16", "fp32"), None, 1),
        (("fp32", "fp32"), None, 3),
    ],
)
def test_bytes_are_those_of_the_plan(arguments, masters, accumulate, seed):
    plan = Precision(*arguments, **{"accumulate": accumulate} if accumulate > 1 else {})
    device, count = HostStandIn(), 300_000
    param = nn.Parameter(torch.randn(count).to(DTYPES[plan.param_dtype]))
    settings = {"state_dtype": STATES[plan.state_dtype], "master_weight_bits": masters, "accumulate": accumulate}
    optimizer = OffloadedAdam([param], device=device, **settings)
    param.grad = torch.randn_like(param)
    optimizer.step()
    (entry,) = optimizer._chunks[0].entries
    tensors = [t for t in optimizer.state[param].values() if isinstance(t, torch.Tensor)]
    tensors += [entry.total] if accumulate > 1 else []
    ordinary = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert device.pinned_bytes / count == pytest.approx(plan.pinned, rel=1e-3)
    assert optimizer.pinned_bytes == plan.pinned * count
    megabytes = f"{plan.pinned * count / 1e6:.1f} MB of pinned memory"
    assert repr(optimizer).startswith(f"OffloadedAdam, with {megabytes}, on the host: DeepSpeedCPUAdam (\n")
    assert ordinary / count == pytest.approx(plan.ordinary, rel=1e-3)
    assert plan.pinned + plan.ordinary <= {24: 7.2, 32: 14.2, None: 20}[masters]


def test_the_simulated_step_by_hand():
    """Two chunks; forward 1, backward 2, down 1, update 3, up 1 second each."""
    times = Times(forward=2, backward=4, down=2, update=6, up=2)
    assert times.in_series == 16
    # Backward ends at 6. In step(): the last layer's update from 6 to 9, the first one's from 9 to 12, up until 13.
    assert simulated_step(times, 2) == 13
    # The first layer's update comes first: from 7 to 10, up until 11. Its forward pass is from 11 to 12, the other's
    # from 14 to 15, backward until 19, and so on every 13 seconds.
    assert simulated_step(times, 2, by_block=True) == 13
    # Updates take 6 of every step, and go on during all of it but the forward pass of the first layer.
    assert simulated_step(times, 2, by_block=True, in_backward=True) < 13
    clipped = Times(forward=2, backward=4, down=2, update=6, up=2, norm=1)
    assert simulated_step(clipped, 2) == 6 + 1 + 1 + 6 + 1


@pytest.mark.parametrize("_", range(20))
def test_a_simulated_step_is_no_faster_than_its_longest_part(_, seed):
    draw = random.Random(seed)
    times = Times(*(draw.random() for _ in range(5)), draw.choice([0.0, 0.1]))
    chunks = draw.randrange(1, 40)
    longest = max(times.forward + times.backward, times.down, times.update, times.up)
    for by_block in (False, True):
        for in_backward in (False, True) if not times.norm else (False,):
            seconds = simulated_step(times, chunks, in_backward, by_block)
            assert longest - 1e-9 <= seconds <= times.in_series + 1e-9


def test_the_planner_prints_bytes_and_times(capsys):
    planner.main(["--params", "7e9", "--state-dtype", "8bit", "--masters", "24", "--compute", "8"])
    text = capsys.readouterr().out
    assert re.search(r"host, in all +7\.02 +49\.1", text)
    assert len(re.findall(r"x as fast", text)) == 4
    assert re.search(r"without offloading: params, grads, states +7\.02 ", text)
    planner.main(["--params", "1e9", "--param-dtype", "fp32", "--clip", "--gbps", "50"])
    text = capsys.readouterr().out
    assert "Give --compute" in text and "copies of 50 GB/s, as given" in text
    planner.main(["--params", "1e9", "--compute", "1", "--gbps", "0.1"])
    assert "FusedAdam on the device is faster" in capsys.readouterr().out
    planner.main(["--params", "1e6", "--compute", "8"])
    assert "Offloading is nearly free" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--params", "--gbps", "--compute", "--chunks", "--accumulate"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_that_are_none(option, value, capsys):
    with pytest.raises(SystemExit):
        planner.main(["--params", "1e9", f"{option}={value}"])
    assert f"argument {option}: {value!r} is not a" in capsys.readouterr().err


def test_the_bandwidth_of_copies_is_that_of_the_device():
    """At most: a machine under load is slower."""
    assert 0 < copy_bandwidth(HostStandIn(gigabytes_per_second=0.1), "cpu", 2**20) <= 0.1e9


def test_advice_that_is_followed_is_not_given():
    assert "(--accumulate) or 8-bit states make that less." in planner._advice(1.0, 5.0, "fp32")
    assert "(--accumulate) make that less." in planner._advice(1.0, 5.0, "8bit")
    assert "nearly free" in planner._advice(4.5, 5.0, "8bit")

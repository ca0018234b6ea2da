"""Says what offloading a model takes: python -m adamops.offload --params 7e9 --compute 2 [--help]"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from .._counts import count
from .device import CudaDevice
from .plan import DTYPES, MODES, STATES, Precision, Times, copy_bandwidth, seconds_per_param, simulated_step

_WITHOUT_DEVICE = 20e9  # bytes per second: PCIe 4.0 x16


def positive(text: str) -> float:
    """Parses a number of more than 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of more than 0")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adamops.offload", description=__doc__.partition(":")[0])
    parser.add_argument("--params", type=count, required=True, help="how many, such as 7e9 or 7B")
    parser.add_argument("--param-dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--state-dtype", choices=STATES, default="fp32")
    parser.add_argument("--masters", type=int, choices=[24, 32], help="bits of split master weights")
    parser.add_argument("--accumulate", type=count, default=1, help="backward passes in a step")
    parser.add_argument("--gbps", type=positive, help="GB/s of copies each way (default: as measured here, on CUDA)")
    parser.add_argument("--compute", type=positive, help="seconds of forward and backward passes in a step")
    parser.add_argument("--chunks", type=count, default=32, help="of params, updated one after another")
    parser.add_argument("--clip", action="store_true", help="with clip_grad_norm_()")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    count = options.params
    precision = Precision(options.param_dtype, options.state_dtype, options.masters, options.accumulate)
    rows = {
        "device, without offloading: params, grads, states": 2 * precision.param + precision.states,
        "device, with offloading: params": precision.param,
        "host, pinned: params and grads on their way": precision.pinned,
        "host, ordinary: states, remainders, sums of grads": precision.ordinary,
        "host, in all": precision.pinned + precision.ordinary,
        "down in a step, grads": precision.param * options.accumulate,
        "up in a step, params": precision.param,
    }
    print(f"{'':50}bytes per param        GB")
    for name, size in rows.items():
        print(f"{name:50}{size:15.2f}{size * count / 1e9:10.1f}")
    print("The device also holds activations, and each grad until it has been copied to the host.\n")
    bandwidth, origin = _copy_bandwidth(options.gbps)
    update, norm = seconds_per_param(precision)
    copies = precision.param * count / bandwidth
    compute = options.compute or 0.0
    norm = norm * count if options.clip else 0.0
    times = Times(compute / 3, 2 * compute / 3, copies * options.accumulate, update * count, copies, norm)
    print(f"Seconds of the parts of a step: down {times.down:.2f}, update {times.update:.2f}", end="")
    print(f", norm {times.norm:.2f}" if options.clip else "", end="")
    print(f", up {times.up:.2f} (updates as measured here, copies of {bandwidth / 1e9:.3g} GB/s, {origin})")
    if options.compute is None:
        print("Give --compute, the seconds of the forward and backward passes, for the time of a step.")
        return
    print(f"A step with {options.chunks} chunks, one part after another: {times.in_series:.2f} s")
    best = times.in_series
    for name, mode in MODES.items():
        if options.clip and mode.get("in_backward"):
            continue
        seconds = simulated_step(times, options.chunks, **mode)
        best = min(best, seconds)
        print(
            f"{name:40}{seconds:8.2f} s, {times.in_series / seconds:.2f} x as fast, {compute / seconds:4.0%} computing"
        )
    print(_advice(compute, best, options.state_dtype))


def _copy_bandwidth(gigabytes: float | None) -> tuple[float, str]:
    """Bytes per second of copies each way, and where the number comes from."""
    if gigabytes is not None:
        return 1e9 * gigabytes, "as given"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return copy_bandwidth(CudaDevice(device), str(device)), "as measured here"
    return _WITHOUT_DEVICE, "assumed, as there is no CUDA device here"


def _advice(compute: float, seconds: float, state_dtype: str) -> str:
    """Who should offload, and what else would make the device wait less."""
    if compute >= 0.8 * seconds:
        return "Offloading is nearly free: little of a step is not computing."
    smaller_states = "" if state_dtype == "8bit" else "or 8-bit states "
    return (
        "If the first row fits beside the activations, FusedAdam on the device is faster. Otherwise the device "
        f"waits for {1 - compute / seconds:.0%} of a step: more micro-batches in a step (--accumulate) {smaller_states}"
        "make that less."
    )


if __name__ == "__main__":
    main()

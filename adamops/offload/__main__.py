"""Says what offloading a model takes: python -m adamops.offload --params 7e9 --compute 2 [--help]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .plan import DTYPES, STATES, Precision, Times, seconds_per_param, simulated_step

MODES = {
    "step() waits": {},
    "model= given": {"by_block": True},
    "model= and update_in_backward=True": {"by_block": True, "in_backward": True},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adamops.offload", description=__doc__.partition(":")[0])
    parser.add_argument("--params", type=float, required=True, help="how many, such as 7e9")
    parser.add_argument("--param-dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--state-dtype", choices=STATES, default="fp32")
    parser.add_argument("--masters", type=int, choices=[24, 32], help="bits of split master weights")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes in a step")
    parser.add_argument("--gbps", type=float, default=20.0, help="GB/s of copies each way (default: %(default)s)")
    parser.add_argument("--compute", type=float, help="seconds of forward and backward passes in a step")
    parser.add_argument("--chunks", type=int, default=32, help="of params, updated one after another")
    parser.add_argument("--clip", action="store_true", help="with clip_grad_norm_()")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    count = options.params
    precision = Precision(options.param_dtype, options.state_dtype, options.masters, options.accumulate)
    rows = {
        "device, params": precision.param,
        "host, pinned: params and grads on their way": precision.pinned,
        "host, ordinary: states, remainders, sums of grads": precision.ordinary,
        "host, in all": precision.pinned + precision.ordinary,
        "down in a step, grads": precision.param * options.accumulate,
        "up in a step, params": precision.param,
    }
    print(f"{'':50}  bytes a param        GB")
    for name, size in rows.items():
        print(f"{name:50}{size:15.2f}{size * count / 1e9:10.1f}")
    update, norm = seconds_per_param(precision)
    copies = precision.param * count / options.gbps / 1e9
    compute = options.compute or 0.0
    times = Times(compute / 3, 2 * compute / 3, copies, update * count, copies, norm * count if options.clip else 0.0)
    print(f"\nSeconds of the parts of a step: down {times.down:.2f}, update {times.update:.2f}", end="")
    print(f", norm {times.norm:.2f}" if options.clip else "", end="")
    print(f", up {times.up:.2f} (updates as measured here, copies at {options.gbps:g} GB/s)")
    if options.compute is None:
        print("Give --compute, the seconds of the forward and backward passes, for the time of a step.")
        return
    print(f"A step with {options.chunks} chunks, one part after another: {times.in_series:.2f} s")
    for name, mode in MODES.items():
        if options.clip and mode.get("in_backward"):
            continue
        seconds = simulated_step(times, options.chunks, **mode)
        print(
            f"{name:40}{seconds:8.2f} s, {times.in_series / seconds:.2f} x as fast, {compute / seconds:4.0%} computing"
        )


if __name__ == "__main__":
    main()

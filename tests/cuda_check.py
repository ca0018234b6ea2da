"""Runs the emulated CUDA op beside the CPU op, without torch: `python cuda_check.py CUDA_MODULE CPU_MODULE`.

A script, so that it can run under the address sanitizer.
"""

import array
import copy
import itertools
import random
import sys

from kernel_check import (
    BFLOAT16,
    COMBINATIONS,
    FLOAT32,
    canonical,
    load,
    random_values,
    scalars_of,
    small_tensors,
    stored,
    table_of,
)

SIZES = [0, 1, 8, 17, 255, 4096, 4099]
SCALARS = (1.0, 0.9, 1 - 0.9, 0.999, 1 - 0.999, -1e-3, 1.0, 1e-8, 1.0)


def table_of_rows(module, rows, offset, kind, amsgrad, with_master, steps=None):
    """The table of rows of arrays: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master."""
    columns = [[row[k].buffer_info()[0] + offset * row[k].itemsize for row in rows] for k in range(6)]
    return table_of(
        module,
        [*columns[:4], columns[4] if amsgrad else None, columns[5] if with_master else None],
        SIZES,
        kind,
        steps or [1] * len(SIZES),
        counts_on_device=steps is not None,
    )


def step_by_device_counts(cuda, rows, offset, kind, amsgrad, with_master, l2):
    """A step, the first, with counts and scalars on the device, without bias correction, so that they are SCALARS."""
    counts = [array.array("f", [0.0]) for _ in SIZES]  # each in memory of its own
    scalars, found_inf = array.array("f", [0.0] * 11 * len(SIZES)), array.array("f", [0.0])
    places = [count.buffer_info()[0] for count in counts]
    table = table_of_rows(cuda, rows, offset, kind, amsgrad, with_master, places)
    decay = 0.01 if l2 else 0.0
    there = scalars.buffer_info()[0], found_inf.buffer_info()[0]
    numbers = (1e-3, 0.9, 0.999, 1e-8, decay, False, not l2)
    cuda.count_steps(table, there[0], numbers, False, 0, 0, 0, 0, there[1], device=0, stream=0)
    cuda.step_with_scalars(table, [], int(l2), *there, 0, 0)
    assert [count[0] for count in counts] == [1.0] * len(SIZES)


def check_small_tensors(cuda, cpu, rng):
    """Quantized states, split master weights and so on, two steps each."""
    for tensor in small_tensors(rng, (1, 8, 255, 257, 1000)):
        twin = copy.deepcopy(tensor)
        for step in (1, 2):
            scalars, modes = [scalars_of(step, False, False)], (tensor.zero_grads, tensor.stochastic_rounding)
            cuda.step_with_scalars(tensor.table(cuda, step), scalars, 0, 0, 0, 0, 0, *modes)
            cpu.step_with_scalars(twin.table(cpu, step), scalars, 0, 1, *modes)
            assert tensor.bits() == twin.bits(), (vars(tensor), step)


def main(cuda_path, cpu_path):
    cuda, cpu = load(cuda_path, "fused_adam"), load(cpu_path)
    rng = random.Random(7)
    modes = itertools.product(COMBINATIONS, (False, True), (False, True), (False, True), (False, True))
    for (param, grad, state), l2, amsgrad, with_master, device_counts in modes:
        if with_master and (param == FLOAT32 or state != FLOAT32):
            continue
        dtypes = (param, grad, state, state, state, FLOAT32)
        kind = (param, grad, state)
        for offset in (0, 1) if (param, state) in ((FLOAT32, FLOAT32), (BFLOAT16, FLOAT32)) else (0,):
            ours = [
                [
                    stored(random_values(rng, size + offset, positive=k in (3, 4)), dtype)
                    for k, dtype in enumerate(dtypes)
                ]
                for size in SIZES
            ]
            theirs = [[x[:] for x in row] for row in ours]
            scalars = [(*SCALARS, 0.01 if l2 else 0.0)]
            if device_counts:
                step_by_device_counts(cuda, ours, offset, kind, amsgrad, with_master, l2)
            else:
                table = table_of_rows(cuda, ours, offset, kind, amsgrad, with_master)
                cuda.step_with_scalars(table, scalars, int(l2), 0, 0, 0, 0)
            table = table_of_rows(cpu, theirs, offset, kind, amsgrad, with_master)
            cpu.step_with_scalars(table, scalars, int(l2), 1)
            for our_row, their_row in zip(ours, theirs, strict=True):
                for x, y, dtype in zip(our_row, their_row, dtypes, strict=True):
                    assert canonical(x, dtype) == canonical(y, dtype), (dtypes, l2, amsgrad, with_master, offset)
    check_small_tensors(cuda, cpu, rng)
    print("all equal")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Runs the emulated CUDA op beside the CPU op, without torch: `python cuda_check.py CUDA_MODULE CPU_MODULE`.

A script, so that it can run under the address sanitizer.
"""

import itertools
import random
import sys

from kernel_check import BFLOAT16, COMBINATIONS, FLOAT32, canonical, load, random_values, stored

SIZES = [0, 1, 8, 17, 255, 4096, 4099]


def main(cuda_path, cpu_path):
    cuda, cpu = load(cuda_path, "fused_adam"), load(cpu_path)
    rng = random.Random(7)
    for (param, grad, state), l2, amsgrad in itertools.product(COMBINATIONS, (False, True), (False, True)):
        dtypes = (param, grad, state, state, state)
        for offset in (0, 1) if (param, state) in ((FLOAT32, FLOAT32), (BFLOAT16, FLOAT32)) else (0,):
            ours = [
                [stored(random_values(rng, size + offset, positive=k > 2), dtype) for k, dtype in enumerate(dtypes)]
                for size in SIZES
            ]
            theirs = [[x[:] for x in row] for row in ours]
            scalars = [(1.0, 0.9, 0.1, 0.999, 0.001, -1e-3, 1.0, 1e-8, 1.0, 0.01 if l2 else 0.0)]
            code = [param + 3 * grad + 9 * state] * len(SIZES)
            columns = [[row[k].buffer_info()[0] + offset * row[k].itemsize for row in ours] for k in range(5)]
            maxima = columns[4] if amsgrad else None
            table = cuda.table_of_addresses(*columns[:4], maxima, SIZES, code, [1] * len(SIZES))
            cuda.adam_step(table, scalars, l2, 0, 0, 0, 0)
            columns = [[row[k].buffer_info()[0] + offset * row[k].itemsize for row in theirs] for k in range(5)]
            maxima = columns[4] if amsgrad else None
            table = cpu.table_of_addresses(*columns[:4], maxima, SIZES, code, [1] * len(SIZES))
            cpu.adam_step(table, scalars, l2, 1)
            for our_row, their_row in zip(ours, theirs, strict=True):
                for x, y, dtype in zip(our_row, their_row, dtypes, strict=True):
                    assert canonical(x, dtype) == canonical(y, dtype), (param, grad, state, l2, amsgrad, offset)
    print("all equal")


if __name__ == "__main__":
    main(*sys.argv[1:])

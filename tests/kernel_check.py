"""Drives the extension module without torch, on the standard library alone, and prints a digest of all results.

    python kernel_check.py PATH_OF_EXTENSION [TARGET]

Run under an emulator of another CPU it shows that the right target is chosen and the bits are the same. The last line
is `TARGET DIGEST`, and the exit status is 1 if the digest is not DIGEST. Must not import anything that needs a newer
CPU than the extension does.
"""

import array
import hashlib
import importlib.machinery
import importlib.util
import itertools
import random
import struct
import sys

FLOAT32, BFLOAT16, FLOAT16 = range(3)
COMBINATIONS = [(FLOAT32, FLOAT32, FLOAT32)] + [
    (p, g, s) for p in (BFLOAT16, FLOAT16) for g in (p, FLOAT32) for s in (p, FLOAT32)
]
SIZES = (1, 7, 31, 32, 33, 64, 130, 1000)
# What every wheel gives on every CPU. It changes with what is fed below, or with the update rule, and nothing else.
DIGEST = "ecd989e8ff5be1d84ccc663195d404f08f5dfa372d7509e17ddd19ea2629ada3"


def load(path, name="cpu_adam"):
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    loader.exec_module(module)
    return module


def stored(values, dtype):
    """An array of the values as they lie in memory."""
    if dtype == FLOAT32:
        return array.array("f", values)
    if dtype == FLOAT16:
        return array.array("H", [struct.unpack("H", struct.pack("e", max(-6e4, min(6e4, x))))[0] for x in values])
    return array.array("H", [struct.unpack("I", struct.pack("f", x))[0] >> 16 for x in values])


def random_values(rng, size, positive=False):
    """Values over many decades, zeros and subnormals among them."""
    values = [rng.gauss(0, 1) * 10.0 ** rng.randint(-12, 3) for _ in range(size)]
    for i in range(0, size, 17):
        values[i] = rng.choice((0.0, -0.0, 1e-40, -3e-42, 1e-38, 5e-8))
    return [abs(x) for x in values] if positive else values


def canonical(data, dtype):
    """The bytes with every NaN made the same: payloads are not promised."""
    if dtype == FLOAT32:
        bits = array.array("I", data.tobytes())
        return array.array("I", [0x7FC00000 if b & 0x7FFFFFFF > 0x7F800000 else b for b in bits]).tobytes()
    infinity = 0x7F80 if dtype == BFLOAT16 else 0x7C00
    return array.array("H", [0x7FFF if b & 0x7FFF > infinity else b for b in data]).tobytes()


def digest(module, threads=1):
    """A digest of params and states after two steps, over all dtypes, modes and tails."""
    sha = hashlib.sha256()
    rng = random.Random(20260101)
    modes = itertools.product(COMBINATIONS, (0, 1), (0, 1), (0, 1), (0, 1))
    for (param, grad, state), l2, amsgrad, maximize, with_master in modes:
        if with_master and (param == FLOAT32 or state != FLOAT32):
            continue
        code = param + 3 * grad + 9 * state
        for size in SIZES:
            data = [
                stored(random_values(rng, size), param),
                stored(random_values(rng, size), grad),
                stored(random_values(rng, size), state),
                stored(random_values(rng, size, positive=True), state),
                stored(random_values(rng, size, positive=True), state),
                stored(random_values(rng, size), FLOAT32),
            ]
            addresses = [[x.buffer_info()[0]] for x in data]
            max_exp_avg_sqs, masters = addresses[4] if amsgrad else None, addresses[5] if with_master else None
            for step in (1, 2):
                table = module.table_of_addresses(*addresses[:4], max_exp_avg_sqs, [size], [code], [step], masters)
                bias1, bias2 = 1 - 0.9**step, 1 - 0.999**step
                scalars = (-1.0 if maximize else 1.0, 0.9, 1 - 0.9, 0.999, 1 - 0.999, -1e-3 / bias1, bias2**-0.5, 1e-8)
                scalars += (1.0, 0.01) if l2 else (1 - 1e-5, 0.0)
                module.adam_step(table, [scalars], bool(l2), threads)
            for x, dtype in zip(data, (param, grad, state, state, state, FLOAT32), strict=True):
                sha.update(canonical(x, dtype))
    return sha.hexdigest()


if __name__ == "__main__":
    op = load(sys.argv[1])
    if len(sys.argv) > 2:
        op.use_target(sys.argv[2])
    print("supported:", " ".join(op.supported_targets()))
    found = digest(op)
    print(op.target(), found)
    sys.exit(0 if found == DIGEST else f"the bits are not those of other machines: {DIGEST}")

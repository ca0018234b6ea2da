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
NO_MASTER, FP32_MASTER, REMAINDER_8, REMAINDER_16 = range(4)  # enum Master of csrc/tensor.h
# What every wheel gives on every CPU. It changes with what is fed below, the update rule, the codes, the noise of
# codes and of bfloat16 averages, or the order in which a norm is added up, and nothing else.
DIGEST = "a8ddf96884954b78a6fb8ac45e508355d1a37730f6b41e15e789280d176552a9"


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


class SmallTensor:
    """A tensor that keeps less than float32: quantized states, a remainder, rounding at random, a copy in 16 bits."""

    def __init__(self, rng, kind, size):
        self.param, self.master, self.amsgrad, self.stochastic_rounding = kind
        self.size, self.zero_grads, self.rng_offset = size, self.amsgrad, rng.getrandbits(32)
        blocks, averages = -(-size // 256), 3 if self.amsgrad else 2

        def numbers(typecode, low, high, count=size):
            return array.array(typecode, [rng.randint(low, high) for _ in range(count)])

        scales = stored([10.0 ** rng.randint(-12, 2) for _ in range(blocks * averages)], BFLOAT16)
        for block in range(0, blocks, 3):
            scales[block * averages] |= 0x8000  # has elements that are not finite, -128
        rest = numbers("b", -128, 127) if self.master == REMAINDER_8 else numbers("h", -32768, 32767)
        self.columns = [
            stored(random_values(rng, size), self.param),
            stored(random_values(rng, size), self.param),
            numbers("b", -128, 127),
            numbers("B", 0, 255),
            numbers("B", 0, 255) if self.amsgrad else None,
            rest if self.master else None,
            scales,
            stored([0.0] * size, BFLOAT16) if self.param == FLOAT32 else None,
        ]
        for i in range(size):
            if not scales[i // 256 * averages] & 0x8000 and self.columns[2][i] == -128:
                self.columns[2][i] = 0

    def dtypes(self):
        """Of the columns that are floats, others None."""
        return [self.param, self.param, None, None, None, None, None, BFLOAT16]

    def bits(self):
        """All that is stored, every NaN made the same."""
        columns = zip(self.columns, self.dtypes(), strict=True)
        return [None if x is None else x.tobytes() if dtype is None else canonical(x, dtype) for x, dtype in columns]

    def table(self, module, step, addresses=None):
        """The table of this tensor alone, in the memory that it has or where it was copied to."""
        addresses = addresses or [None if x is None else x.buffer_info()[0] for x in self.columns]
        return table_of(
            module,
            [None if address is None else [address] for address in addresses],
            [self.size],
            (self.param, self.param, module.DTYPES["quantized"]),
            [step],
            master=self.master,
            lowp_dtype=BFLOAT16,
            rng_offset=self.rng_offset,
        )


COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "scales", "lowp_out")


def table_of(module, columns, numels, dtypes, steps, master=None, counts_on_device=False, lowp_dtype=0, rng_offset=0):
    """A table of columns of addresses, in the order of COLUMNS; one that is None, or left out, exists for no tensor.

    `dtypes` are those of params, grads and states; `master` is by default FP32_MASTER if there are any.
    """
    columns = dict(itertools.zip_longest(COLUMNS, columns))
    amsgrad = columns["max_exp_avg_sq"] is not None
    rows = []
    for i, (numel, step) in enumerate(zip(numels, steps, strict=True)):
        row = {name: None if column is None else column[i] for name, column in columns.items()}
        row["states"] = [row.pop(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")][: 3 if amsgrad else 2]
        row |= dict(zip(("param_dtype", "grad_dtype", "state_dtype"), dtypes, strict=True))
        rows.append(row | {"numel": numel, "step": step, "lowp_dtype": lowp_dtype, "rng_offset": rng_offset})
    if master is None:
        master = FP32_MASTER if columns["master"] is not None else NO_MASTER
    return module.table_of_rows(rows, 3 if amsgrad else 2, master, counts_on_device)


def small_tensors(rng, sizes):
    """Tensors of every kind that keeps less than float32."""
    for kind in itertools.product((FLOAT32, BFLOAT16, FLOAT16), (NO_MASTER, REMAINDER_8, REMAINDER_16), *2 * [(0, 1)]):
        param, master, _, stochastic_rounding = kind
        if (param != FLOAT32 or master == NO_MASTER) and not (master == REMAINDER_16 and stochastic_rounding):
            for size in sizes:
                yield SmallTensor(rng, kind, size)


def scalars_of(step, maximize, l2):
    """The scalars of a step, near enough to what Adam has."""
    bias1, bias2 = 1 - 0.9**step, 1 - 0.999**step
    scalars = (-1.0 if maximize else 1.0, 0.9, 1 - 0.9, 0.999, 1 - 0.999, -1e-3 / bias1, bias2**-0.5, 1e-8)
    return scalars + ((1.0, 0.01) if l2 else (1 - 1e-5, 0.0))


def norms(module, rng, threads):
    """The norms of grads of all dtypes and orders: short ones, whole chunks of the sum, and what is left of one."""
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        grads = [stored(random_values(rng, 1000), dtype) * 67, *(stored(random_values(rng, n), dtype) for n in SIZES)]
        columns = [grad.buffer_info()[0] for grad in grads], [len(grad) for grad in grads], [dtype] * len(grads)
        for order in (1.0, 2.0, float("inf")):
            yield module.grad_norm(*columns, order, threads)


def digest(module, threads=1):
    """A digest of params and states after two steps, over all dtypes, modes and tails, and of norms."""
    sha = hashlib.sha256()
    rng = random.Random(20260101)
    modes = itertools.product(COMBINATIONS, (0, 1), (0, 1), (0, 1), (0, 1))
    for (param, grad, state), l2, amsgrad, maximize, with_master in modes:
        if with_master and (param == FLOAT32 or state != FLOAT32):
            continue
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
                columns = [*addresses[:4], max_exp_avg_sqs, masters]
                table = table_of(module, columns, [size], (param, grad, state), [step])
                module.step_with_scalars(table, [scalars_of(step, maximize, l2)], l2, threads)
            for x, dtype in zip(data, (param, grad, state, state, state, FLOAT32), strict=True):
                sha.update(canonical(x, dtype))
    for tensor in small_tensors(rng, (1, 255, 256, 257, 1000)):
        for step in (1, 2):
            scalars = [scalars_of(step, False, False)]
            module.step_with_scalars(tensor.table(module, step), scalars, 0, threads, tensor.amsgrad,
                                     tensor.stochastic_rounding)  # fmt: skip
        for data in filter(None, tensor.bits()):
            sha.update(data)
    for norm in norms(module, rng, threads):
        sha.update(struct.pack("<d", norm))
    return sha.hexdigest()


if __name__ == "__main__":
    op = load(sys.argv[1])
    if len(sys.argv) > 2:
        op.use_target(sys.argv[2])
    print("supported:", " ".join(op.supported_targets()))
    found = digest(op)
    print(op.target(), found)
    sys.exit(0 if found == DIGEST else f"the bits are not those of other machines: {DIGEST}")

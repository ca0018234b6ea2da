"""The update rule of docs/numerics.md in numpy: written from the text, one rounding an operation, and slow.

`exact` gives the very bits that every kernel must give; `float64` computes the same in double, to measure errors
against.
"""

import numpy as np

F32, F64 = np.float32, np.float64


def fma(a, b, c):
    """a * b + c of float32 arrays, rounded once.

    In float64 the product is exact; the sum is rounded to odd (last bit set if anything was lost), after which rounding
    to float32 is as good as rounding the exact value.
    """
    product, c = F64(a) * F64(b), np.asarray(c, F64)
    total = product + c
    with np.errstate(invalid="ignore"):
        part = total - product
        lost = (product - (total - part)) + (c - part)
    bits = total.view(np.int64) if isinstance(total, np.ndarray) else np.array([total]).view(np.int64)
    inexact = np.isfinite(lost) & (lost != 0)
    away = inexact & ((lost > 0) != (total > 0))
    odd = np.where(inexact, (bits - away) | 1, bits).astype(np.int64)
    return odd.view(F64).astype(F32)


def to_bf16_bits(x):
    """uint16 bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16_bits(bits):
    return (bits.astype(np.uint32) << 16).view(F32)


def widen(stored, dtype):
    """float32 values of an array as it is stored: float32, uint16 bits of bfloat16, or float16."""
    if dtype == "bfloat16":
        return from_bf16_bits(stored)
    return stored.astype(F32)


def narrow(x, dtype):
    if dtype == "bfloat16":
        return to_bf16_bits(x)
    with np.errstate(over="ignore"):
        return x.astype(np.float16) if dtype == "float16" else x.copy()


NOISE_STRIDES = {"exp_avg": 0x9E37, "exp_avg_sq": 0xC13F}


def narrow_average(x, dtype, name, step):
    """The state of that name as it is stored after a step: bfloat16 averages are rounded with the noise of the step.

    Of the values between two bfloat16 neighbours, those are rounded away from zero whose place between them, counted in
    65536ths, is 65536 less the noise or more.
    """
    if dtype != "bfloat16" or name not in NOISE_STRIDES:
        return narrow(x, dtype)
    noise = step * NOISE_STRIDES[name] % 65536
    toward_zero, place = np.divmod(x.view(np.uint32).astype(np.int64), 65536)
    away = place >= 65536 - noise
    if name == "exp_avg_sq":
        away |= (toward_zero == 0) & (place > 0)  # only zero is stored as zero
    stored = np.where(np.isfinite(x), toward_zero + away, toward_zero | np.where(np.isnan(x), 0x40, 0))
    return stored.astype(np.uint16)


@np.errstate(all="ignore")
def exact(p, g, m, v, max_v, scalars, l2, amsgrad):
    """New (p, m, v, max_v) in float32, each operation rounded once."""
    s, b1, c1, b2, c2, neg_a, r, e, w, decay = (F32(x) for x in scalars)
    full = [np.full_like(p, x) for x in (b1, b2, r, e, neg_a, decay)]
    b1s, b2s, rs, es, neg_as, decays = full
    g = g * s
    if l2:
        g = fma(decays, p, g)
    m = fma(b1s, m, c1 * g)
    v = fma(b2s, v, (c2 * g) * g)
    if amsgrad:
        max_v = np.where(np.isnan(max_v) | (max_v > v), max_v, v)
    d = fma(np.sqrt(max_v if amsgrad else v), rs, es)
    p = fma(neg_as, m / d, p * w)
    return p, m, v, max_v


@np.errstate(all="ignore")
def float64(p, g, m, v, max_v, scalars, l2, amsgrad):
    """The same in float64, from the same float32 scalars."""
    s, b1, c1, b2, c2, neg_a, r, e, w, decay = (F64(F32(x)) for x in scalars)
    p, g, m, v, max_v = (x.astype(F64) for x in (p, g, m, v, max_v))
    g = g * s
    if l2:
        g = decay * p + g
    m = b1 * m + c1 * g
    v = b2 * v + c2 * g * g
    if amsgrad:
        max_v = np.maximum(max_v, v)
    d = np.sqrt(max_v if amsgrad else v) * r + e
    return p * w + neg_a * (m / d), m, v, max_v

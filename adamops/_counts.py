"""Counts on a command line. Must not know what is counted."""

from __future__ import annotations

import argparse

_FACTORS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def count(text: str) -> int:
    """Parses a positive whole number, such as 100000000, 100M or 1e8, for argparse."""
    factor = _FACTORS.get(text[-1:].upper(), 1)
    digits = text if factor == 1 else text[:-1]
    try:
        value = (int(digits) if digits.isdigit() else float(digits)) * factor
        whole = int(value)
    except (ValueError, OverflowError):  # no number, or no finite one
        whole = value = 0
    if whole < 1 or whole != value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer, such as 100000000, 100M or 1e8")
    return whole

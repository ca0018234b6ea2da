"""Counts on a command line, and python -m adamops with a tool."""

import argparse
import subprocess
import sys

import pytest

from adamops._counts import count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("100M", 10**8),
        ("100m", 10**8),
        ("1e6", 10**6),
        ("7e9", 7 * 10**9),
        ("1.5G", 15 * 10**8),
        ("7B", 7 * 10**9),
    ],
)
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e-3", "many", "M", "nan", "inf", "1e400", "0.0001K"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a positive integer, such as"):
        count(text)


def test_a_tool_by_its_name():
    done = subprocess.run(
        [sys.executable, "-m", "adamops", "offload", "--params", "1M"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "bytes" in done.stdout
    done = subprocess.run([sys.executable, "-m", "adamops", "reprot"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'reprot' is none of the tools of adamops: report, bench, offload, deepspeed" in done.stderr

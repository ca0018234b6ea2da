"""What the system and its cgroups allow this process: cores and memory."""

import os

import pytest

from adamops import _limits


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Makes a system whose files have these texts, and this process a member of cgroups."""

    def make(files, membership):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        if membership is not None:
            (tmp_path / "membership").write_text(membership)
        monkeypatch.setattr(_limits, "_CGROUPS", tmp_path)
        monkeypatch.setattr(_limits, "_MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(_limits, "_MEMINFO", tmp_path / "meminfo")

    return make


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 1),
        ("0::/gone\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "nonsense"}, 64),
        ("3:cpuset:/x\n1:cpu,cpuacct:/c\n0::/\n", {"cpu/c/cpu.cfs_quota_us": "30", "cpu/c/cpu.cfs_period_us": "10"}, 3),
        ("1:cpu:/c\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("1:cpu:/c\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "0"}, 64),
        (None, {}, 64),
    ],
)  # fmt: skip
def test_quotas_of_cgroups(monkeypatch, system, membership, files, cores):
    system(files, membership)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert _limits.cores() == cores


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        (None, {}, None),
        (None, {"meminfo": "MemTotal:  9 kB\nMemAvailable:    5 kB"}, 5120),
        ("0::/a\n", {"a/memory.max": "max", "memory.max": "4096", "meminfo": "MemAvailable:    5 kB"}, 4096),
        ("0::/a\n", {"a/memory.max": "8192", "meminfo": "MemAvailable:    5 kB"}, 5120),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "2048", "meminfo": "MemAvailable:    5 kB"}, 2048),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712", "meminfo": "MemAvailable: 5 kB"},
            5120,
        ),
    ],
)
def test_free_memory(system, membership, files, free):
    system(files, membership)
    assert _limits.free_memory() == free

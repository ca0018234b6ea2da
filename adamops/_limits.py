"""What this process may use of the machine: cores and memory, by the system and its cgroups (cgroups(7)).

Must work without torch, and must not know what the limits are for.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .op_builder import environment

_CGROUPS, _MEMBERSHIP, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")


def cores() -> int:
    """How many cores this process may use at once: those of its affinity mask, within the quotas of its cgroups."""
    quotas = _of_cgroups("cpu", _quota_of_version_2, _quota_of_version_1)
    return max(1, min([environment.cores(), *map(math.ceil, quotas)]))


def free_memory() -> int | None:
    """How many bytes this process can get without swapping; None if the system does not say.

    A cgroup's limit counts in full: most of what such a group has in use are often cached files, which can be dropped.
    """
    found = [int(limit) for limit in _of_cgroups("memory", _memory_of_version_2, _memory_of_version_1)]
    with contextlib.suppress(OSError):  # not Linux
        found += [1024 * int(text) for text in re.findall(r"^MemAvailable:\s*(\d+) kB", _MEMINFO.read_text(), re.M)]
    return min(found, default=None)


def _of_cgroups(
    controller: str, version_2: Callable[[Path], float], version_1: Callable[[Path], float]
) -> Iterator[float]:
    """What each cgroup around this process allows, read from its folder by the function of its version."""
    try:
        lines = _MEMBERSHIP.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if not controllers:
            root, read = _CGROUPS, version_2
        elif controller in controllers.split(","):
            root, read = _CGROUPS / controller, version_1
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            # No limit, or a folder that this namespace does not show:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                yield read(folder)
            if folder == root:
                break


def _quota_of_version_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" where there is no limit
    return int(quota) / int(period)


def _quota_of_version_1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    if quota <= 0:  # no limit
        raise ValueError
    return quota / int((folder / "cpu.cfs_period_us").read_text())


def _memory_of_version_2(folder: Path) -> float:
    return int((folder / "memory.max").read_text())  # "max" where there is no limit


def _memory_of_version_1(folder: Path) -> float:
    return int((folder / "memory.limit_in_bytes").read_text())  # some 2^63 where there is no limit

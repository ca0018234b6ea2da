"""How many threads a step on the CPU uses, and why. The bits of a step do not depend on it."""

from __future__ import annotations

import operator
import os
from typing import NamedTuple

import torch

from . import _limits
from .op_builder import environment


class Threads(NamedTuple):
    """A number of threads, and what it follows from."""

    number: int
    why: str


class _Rule(NamedTuple):
    """What decides, besides torch's own number.

    Attributes
    ----------
    cores
        How many cores this process may use at once: never more threads.
    fixed
        The number that was set, by a call or in the environment; None if it is automatic.
    share
        For automatic numbers, instead of 1 of torch's threads.
    """

    cores: int
    fixed: Threads | None
    share: Threads


_chosen: int | None = None
_rule: _Rule | None = None  # found out at the first step, and again after set_num_threads() and fork()


def set_num_threads(count: int | None) -> None:
    """Sets how many threads the steps of this process use on the CPU, whatever torch and the environment say.

    Parameters
    ----------
    count
        At least 1; no more are used than the process has cores. None: automatic again, by what the environment says.

    Raises
    ------
    TypeError, ValueError
        If `count` is not an integer, or below 1.
    """
    global _chosen
    if count is not None:
        count = operator.index(count)
        if count < 1:
            raise ValueError(f"Invalid count: {count}; expected 1 or more, or None for the automatic number")
    _chosen = count
    _forget()


def get_num_threads() -> int:
    """How many threads a step on the CPU uses, at most; a step of few elements uses fewer.

    It is what set_num_threads() was given, else ADAMOPS_NUM_THREADS, else torch.get_num_threads(). Where torchrun has
    set OMP_NUM_THREADS to 1 because nobody chose a number, it is this process' share of the cores instead. It never
    exceeds the cores of the process' affinity mask, nor the quota of its cgroup. Raises ValueError if
    ADAMOPS_NUM_THREADS is not a number of threads.
    """
    cores, fixed, share = _rule or _find_rule()
    if fixed is not None:
        return fixed.number
    count = torch.get_num_threads()
    if count == 1:
        return share.number
    return count if count < cores else cores


def explained() -> Threads:
    """The number of get_num_threads(), and what it follows from. Raises what that raises."""
    cores, fixed, share = _rule or _find_rule()
    count = torch.get_num_threads()
    if fixed is not None:
        return fixed
    return share if count == 1 else _at_most(cores, Threads(count, "as many as torch uses"))


def _find_rule() -> _Rule:
    global _rule
    cores, fixed = _limits.cores(), None
    if _chosen is not None:
        fixed = Threads(_chosen, "set by adamops.set_num_threads()")
    elif (count := environment.num_threads()) is not None:
        fixed = Threads(count, f"ADAMOPS_NUM_THREADS={count}")
    _rule = _Rule(cores, fixed and _at_most(cores, fixed), _share(cores))
    return _rule


def _at_most(cores: int, threads: Threads) -> Threads:
    if threads.number <= cores:
        return threads
    return Threads(cores, f"{threads.why} ({threads.number}), but this process has no more cores")


def _share(cores: int) -> Threads:
    """What to use where torch has one thread: more, if torchrun has said so without being asked."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if not by_torchrun or not ranks.isdecimal() or not int(ranks):
        return Threads(1, "as many as torch uses")
    why = f"share of the cores ({cores}) by processes here ({ranks}): OMP_NUM_THREADS=1 is taken for torchrun's own"
    return Threads(max(1, cores // int(ranks)), why)


def _forget() -> None:
    global _rule
    _rule = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a child may be moved to other cores

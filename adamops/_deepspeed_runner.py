"""`python -m adamops.deepspeed`: runs a script, a module or a console script with DeepSpeed patched.

Its command line is Python's own, plus the options that launchers put before a script. Must not know what is patched.

DeepSpeed is patched when the script imports it, not earlier: on import it reads the environment, which the script may
set first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Callable

from ._deepspeed_children import PatchedChildren
from ._import_hooks import when_imported

USAGE = """usage: python -m adamops.deepspeed SCRIPT [ARGUMENT ...]
       python -m adamops.deepspeed -m MODULE [ARGUMENT ...]

Runs a Python script, the console script of a package, or a module with
adamops.deepspeed.patch() done. Options before SCRIPT or -m, such as the
--local_rank=N of launchers, are passed on with the ARGUMENTs."""
_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
_WITH_VALUE = ("--local_rank", "--local-rank")  # launchers write --local_rank=N; people also write --local_rank N


@dataclasses.dataclass
class Command:
    """What to run, a script or a module, and its arguments."""

    target: str
    is_module: bool
    arguments: list[str]


def parse(arguments: list[str]) -> Command | None:
    """Parses a command line. Returns None for --help, or if it names nothing to run."""
    left = list(arguments)
    options: list[str] = []
    while left:
        argument = left.pop(0)
        if argument == "-m" or (argument.startswith("-m") and not argument.startswith("--")):
            module = argument[2:] or (left.pop(0) if left else "")
            return Command(module, True, options + left) if module else None
        if not argument.startswith("-") or argument == "-":
            return Command(argument, False, options + left)
        if argument in ("-h", "--help"):
            return None
        options.append(argument)
        if argument in _WITH_VALUE and left:
            options.append(left.pop(0))
    return None


def main(arguments: list[str], patch: Callable[[], object]) -> None:
    """Runs what the command line names, as Python would, and calls patch() once DeepSpeed is imported."""
    command = parse(arguments)
    if command is None:
        asked = any(argument in ("-h", "--help") for argument in arguments)
        if asked:
            print(USAGE)
        sys.exit(None if asked else USAGE)
    path = None if command.is_module else _script(command.target)
    when_imported("deepspeed", patch)
    PatchedChildren("adamops.deepspeed", shm_comm=False).enable()  # even if only the children import DeepSpeed
    sys.argv = [path or command.target, *command.arguments]
    if path is None:
        with _converting() if command.target == _CONVERTER else contextlib.nullcontext():
            runpy.run_module(command.target, run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - as Python itself does
    runpy.run_path(path, run_name="__main__")


def _script(name: str) -> str:
    """The path of a script, or of a package's console script."""
    if os.path.exists(name):  # noqa: PTH110 - a name that is not a path must stay as it is
        return name
    found = None
    if os.path.basename(name) == name:  # noqa: PTH119
        found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        sys.exit(
            f"python -m adamops.deepspeed: there is no script {name!r}, neither as a file nor as a command; "
            f"for a module: python -m adamops.deepspeed -m {name}"
        )
    return found


def _converting() -> contextlib.AbstractContextManager[None]:
    from ._deepspeed_states import dequantizing_loads
    from .ops.adam.adam import AdamRule

    if "fork" in multiprocessing.get_all_start_methods():  # its worker processes must read files as this one does
        multiprocessing.set_start_method("fork", force=True)
    return dequantizing_loads(AdamRule.states)

"""Runs a function on some ranks: processes of one torch thread each, with gloo between them.

Must not know what is run.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

TIMEOUT = 300.0  # seconds


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `function(rank, world_size, *args)` returns on each rank, by rank.

    The function is one of a module. Raises RuntimeError with the traceback of the rank that failed first, and
    TimeoutError if not all end in time; no process is left.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = (sys.modules[function.__module__].__file__, function.__qualname__)
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, folder, place, args))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder))
            return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _wait(processes: list[Any], folder: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while any(process.exitcode is None for process in processes):
        _raise_failure(processes, folder)
        if time.monotonic() > end:
            running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise TimeoutError(f"ranks {running} have not ended after {TIMEOUT} s")
        time.sleep(0.02)
    _raise_failure(processes, folder)


def _raise_failure(processes: list[Any], folder: Path) -> None:
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if not failed:
        return
    # The others fail as one does; what went wrong is in the oldest traceback.
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(f"rank {errors[0].name.removeprefix('error')}:\n{errors[0].read_text()}")
    raise RuntimeError(f"rank {failed[0]} ended with exit status {processes[failed[0]].exitcode}")


def _run_rank(rank: int, world_size: int, folder: str, place: tuple[str, str], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
        result = _load(*place)(rank, world_size, *args)
        torch.save(result, Path(folder) / f"result{rank}")
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others in a destructor


def _load(file: str, name: str) -> Callable[..., Any]:
    """A function of a module that pytest may have loaded under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"on_a_rank_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)

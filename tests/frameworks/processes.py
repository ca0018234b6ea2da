"""Runs a function in several processes that can talk to each other, as torchrun starts them on one machine.

It must not know what is being tested.
"""

import contextlib
import os
import pickle
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240


def run_on_ranks(function, world_size, *args):
    """What ``function(rank, world_size, *args)`` returns on each rank, in order; a failing rank's traceback is raised.

    The function must be one of a module, so that new processes find it by name. Each has one torch thread and a process
    group of gloo; random numbers of all start from one seed, drawn here.
    """
    seed = int(torch.randint(2**31, ()))
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, seed, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder))
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _rank(rank, world_size, folder, seed, function, args):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = pickle.dumps(function(rank, world_size, *args))
        (Path(folder) / f"result{rank}").write_bytes(result)
        dist.barrier()  # nobody leaves while others talk to it
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)  # others may wait for this rank in a destructor
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _wait(ranks, folder):
    """Returns when all have ended well. The first that fails is the cause, and its traceback is raised."""
    end = time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in ranks):
        _raise_failures(ranks, folder)
        if time.monotonic() > end:
            running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"ranks {running} still ran after {TIMEOUT_S} s")
        time.sleep(0.02)
    _raise_failures(ranks, folder)


def _raise_failures(ranks, folder):
    failed = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if errors and failed:
        raise RuntimeError(f"rank {errors[0].name.removeprefix('error')} failed:\n{errors[0].read_text()}")
    if failed:
        raise RuntimeError("; ".join(f"rank {rank} ended with exit code {code}" for rank, code in failed))

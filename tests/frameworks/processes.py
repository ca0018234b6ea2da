"""Runs functions in several processes that can talk to each other, as torchrun starts them on one machine.

It must not know what is being tested.
"""

import importlib.util
import inspect
import os
import pickle
import sys
import tempfile
import time
import traceback
import types
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240


def run_on_ranks(function, world_size, *args):
    """What ``function(rank, world_size, *args)`` returns on each rank, in order; a failing rank's traceback is raised.

    The function must be one of a module. Each process has one torch thread and a process group of gloo; random numbers
    of all start from one seed, drawn here.
    """
    with Ranks(world_size) as ranks:
        return ranks.run(function, world_size, *args)


class Ranks:
    """Processes that run one function after another, as starting them takes seconds; new ones after a failure.

    A function that leaves nothing behind in the process can be run here; others are for run_on_ranks().
    """

    def __init__(self, most):
        self._most = most
        self._processes, self._pipes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def run(self, function, world_size, *args):
        """As run_on_ranks()."""
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            # The arguments may hold functions of the module, which the process has to load first.
            work = _address(function), world_size, folder, int(torch.randint(2**31, ())), pickle.dumps(args)
            pipes = self._pipes[:world_size]
            for pipe in pipes:
                pipe.send(work)
            try:
                return self._results(pipes)
            except BaseException:
                self._stop()
                raise

    def _start(self):
        context = mp.get_context("spawn")
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=_rank, args=(rank, theirs)))  # may start others
            self._processes[-1].start()
            self._pipes.append(ours)
            theirs.close()

    def _stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _results(self, pipes):
        """Of all ranks. The first that fails is the cause: others then fail as it is gone, or wait for ever."""
        results, end = {}, time.monotonic() + TIMEOUT_S
        while len(results) < len(pipes):
            waiting = [pipe for pipe in pipes if pipe not in results]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {[pipes.index(pipe) for pipe in waiting]} still ran after {TIMEOUT_S} s")
            for pipe in ready:
                try:
                    failure, results[pipe] = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"the process of rank {pipes.index(pipe)} died") from None
                if failure:
                    raise RuntimeError(f"rank {pipes.index(pipe)} failed:\n{failure}")
        return [pickle.loads(results[pipe]) for pipe in pipes]


def _rank(rank, pipe):
    torch.set_num_threads(1)
    while True:
        try:
            address, world_size, folder, seed, args = pipe.recv()
        except EOFError:  # whoever started this process is gone
            return
        torch.manual_seed(seed)
        size = str(world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
            # As bytes: the pipe would pass each tensor as a file descriptor, of which there are not enough.
            run = _function_at(address)
            result = pickle.dumps(run(rank, world_size, *pickle.loads(args)))
            dist.barrier()  # nobody leaves while others talk to it
            if dist.is_initialized():  # the function may have ended it
                dist.destroy_process_group()
            pipe.send((None, result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def _address(function):
    """Where other processes find the function: tests are not on the path by the names that pytest gives them."""
    return function.__module__, str(Path(inspect.getsourcefile(function)).resolve()), function.__name__


def _function_at(address):
    module_name, path, name = address
    if module_name not in sys.modules:
        parent = module_name.rpartition(".")[0]
        while parent:  # pickle wants those too
            sys.modules.setdefault(parent, types.ModuleType(parent))
            parent = parent.rpartition(".")[0]
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return getattr(sys.modules[module_name], name)

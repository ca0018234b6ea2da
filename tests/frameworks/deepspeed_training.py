"""A small training with DeepSpeed's engine on CPUs, for the ranks of the tests.

Imported in processes of their own: what is set here of DeepSpeed's environment touches no other test.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import torch

import adamops

HYPER = {"lr": 5e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
WIDTH, BATCH = 32, 4


def quiet_deepspeed() -> Any:
    """DeepSpeed on its CPU accelerator, saying and compiling nothing but what an optimizer asks for."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import cpuinfo

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # seconds; asked for by each DeepSpeedCPUAdam
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__dict__["__compatible_ops__"] = {}  # found by running compilers; says whether to build shm_comm
    return deepspeed


def config(stage: int, offload: bool, dtype: str, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's config: ZeRO, two micro-batches a step, clipping, a schedule, and our optimizers allowed."""
    zero = {"stage": stage, **zero}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"} | zero.get("offload_optimizer", {})
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": HYPER["lr"], "warmup_num_steps": 4},
        },
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def new_model() -> torch.nn.Module:
    """The same model for all, with tensors of odd sizes."""
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 61), torch.nn.GELU(), torch.nn.Linear(61, WIDTH))


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two param groups, of which one has no decay."""
    params = list(model.parameters())
    decayed = [param for param in params if param.ndim > 1]
    return [{"params": decayed}, {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0}]


def new_engine(deepspeed: Any, settings: dict[str, Any], optimizer: str) -> Any:
    """An engine with a client optimizer (torch, ours, ours-fused) or the one that the config names (config)."""
    model = new_model()
    groups = groups_of(model)
    client = {
        "torch": lambda: torch.optim.AdamW(groups, **HYPER),
        "ours": lambda: adamops.DeepSpeedCPUAdam(groups, **HYPER),
        "ours-fused": lambda: adamops.FusedAdam(groups, **HYPER),
        "config": lambda: None,
    }[optimizer]()
    if client is None:
        settings = settings | {"optimizer": {"type": "AdamW", "params": HYPER}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=client, model_parameters=None if client else groups, config=settings
    )
    return engine


def train(engine: Any, rank: int, steps: range) -> list[float]:
    """The mean loss of each of some steps, of two micro-batches each; each rank has four, again and again."""
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        total = 0.0
        for micro in range(2):
            seed = 10 * rank + 2 * (step % 2) + micro
            data = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))
            loss = (engine(data.to(dtype)).float() - data.roll(1, -1)).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.item() / 2
        losses.append(total)
    return losses


CASES = [
    (stage, offload, dtype)
    for stage, offload, dtype in itertools.product((0, 1, 2, 3), (False, True), ("fp32", "bf16"))
    if stage or not offload
]


def curves(rank: int, world_size: int, with_deepspeeds_own: bool) -> dict[tuple[Any, ...], Any]:
    """The losses of each case by each optimizer, and the class that did the step."""
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    found = {}
    for case in CASES:
        optimizers = ["torch", "ours", "patched"] + ["ours-fused"] * (not case[1]) + ["own"] * with_deepspeeds_own
        for optimizer in optimizers:
            handle = adamops.deepspeed.patch() if optimizer == "patched" else None
            name = "config" if optimizer in ("patched", "own") else optimizer
            engine = new_engine(deepspeed, config(*case), name)
            found[(*case, optimizer)] = train(engine, rank, range(10)), type(engine.basic_optimizer).__name__
            engine.destroy()
            if handle:
                handle.undo()
    return found


def resumed_curves(
    rank: int, world_size: int, tasks: list[tuple[tuple[int, bool, str], str, str]], folder: str
) -> list[tuple[list[float], list[float], list[float]]]:
    """For each case and pair of optimizers: the losses of 4 steps, after which the training is saved; of 4 more steps;
    and of these again, as the other optimizer does them from the checkpoint."""
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    def engine_of(case: tuple[int, bool, str], optimizer: str) -> Any:
        if optimizer != "patched":
            return new_engine(deepspeed, config(*case), "config" if optimizer == "own" else optimizer)
        with adamops.deepspeed.patch():  # an optimizer keeps the op that it was made with
            return new_engine(deepspeed, config(*case), "config")

    found = []
    for i, (case, before, after) in enumerate(tasks):
        first = engine_of(case, before)
        start = train(first, rank, range(4))
        first.save_checkpoint(folder, tag=f"middle{i}")
        unbroken = train(first, rank, range(4, 8))
        first.destroy()
        second = engine_of(case, after)
        second.load_checkpoint(folder, tag=f"middle{i}")
        found.append((start, unbroken, train(second, rank, range(4, 8))))
        second.destroy()
    return found

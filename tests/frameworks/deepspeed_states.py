"""Trainings whose 8-bit states DeepSpeed reads, sets, moves and converts, for the ranks of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from frameworks.deepspeed_training import HYPER, WIDTH, config, quiet_deepspeed, train

import adamops

AVERAGES = ("exp_avg", "exp_avg_sq")
CLASSES = {"DeepSpeedCPUAdam": adamops.DeepSpeedCPUAdam, "FusedAdam": adamops.FusedAdam}


def engine_of(settings: dict[str, Any], cls: str, **precision: Any) -> Any:
    """An engine with an optimizer of adamops, of a model large enough for 8-bit states, with tensors of odd sizes."""
    deepspeed = quiet_deepspeed()
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 301), torch.nn.GELU(), torch.nn.Linear(301, WIDTH))
    client = CLASSES[cls](model.parameters(), **HYPER, **precision)
    return deepspeed.initialize(model=model, optimizer=client, config=settings)[0]


def settings_of(stage: int, cls: str, kind: str = "") -> dict[str, Any]:
    """DeepSpeed's config; offloaded for the CPU's class. `kind` "fp32 grads" is DeepSpeed's BF16_Optimizer."""
    settings = config(stage, cls == "DeepSpeedCPUAdam" and not kind, "bf16")
    return settings | ({"data_types": {"grad_accum_dtype": "fp32"}} if kind else {})


def dtypes_of(engine: Any) -> set[torch.dtype]:
    """Of the averages as the optimizer keeps them."""
    return {state[name].dtype for state in engine.basic_optimizer.state.values() for name in AVERAGES}


def states_read_and_set(rank: int, world_size: int, stage: int, cls: str, kind: str) -> dict[str, Any]:
    """What DeepSpeed's helpers read of 8-bit states, of float32 ones, of the former after one is set; and losses."""
    settings = settings_of(stage, cls, kind)
    coded, floats = engine_of(settings, cls, state_dtype="8bit"), engine_of(settings, cls)
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    def read(engine: Any) -> dict[tuple[str, str], torch.Tensor]:
        params = engine.module.named_parameters()
        return {
            (name, key): safe_get_full_optimizer_state(param, key).clone() for name, param in params for key in AVERAGES
        }

    found: dict[str, Any] = {"losses before": train(coded, rank, range(3))}
    train(floats, rank, range(3))
    found |= {"dtypes": dtypes_of(coded), "8-bit": read(coded), "float32": read(floats)}
    params = dict(coded.module.named_parameters())
    found["set to"] = 0.5 * found["8-bit"]["2.weight", "exp_avg"].abs()
    safe_set_full_optimizer_state(params["2.weight"], found["set to"], "exp_avg")
    found["after"] = read(coded)
    if stage == 3:
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        local = safe_get_local_optimizer_state(params["0.weight"], "exp_avg_sq").clone()
        safe_set_local_optimizer_state(params["0.weight"], 4 * local, "exp_avg_sq")
        found["local"] = local, safe_get_local_optimizer_state(params["0.weight"], "exp_avg_sq").clone()
    found["losses after"] = train(coded, rank, range(3, 12))
    return found


def save_for_conversion(rank: int, world_size: int, stage: int, cls: str, kind: str, folder: str) -> list[float]:
    """The losses of 4 steps after the one that is saved."""
    engine = engine_of(settings_of(stage, cls, kind), cls, state_dtype="8bit")
    train(engine, rank, range(4))
    engine.save_checkpoint(folder, tag="middle")
    return train(engine, rank, range(4, 8))


def resume_converted(
    rank: int, world_size: int, stage: int, cls: str, kind: str, folder: str
) -> dict[str, tuple[set[torch.dtype], list[float], float]]:
    """From a universal checkpoint: dtypes, the next 4 losses and the norm of an average as DeepSpeed reads it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    settings = settings_of(stage, cls, kind) | {"checkpoint": {"load_universal": True}}
    found = {}
    for name, precision, steps in [
        ("8-bit", {"state_dtype": "8bit"}, 0),
        ("8-bit, stepped before", {"state_dtype": "8bit"}, 2),
        ("float32", {}, 0),
    ]:
        engine = engine_of(settings, cls, **precision)
        train(engine, rank, range(steps))
        engine.load_checkpoint(folder, tag="universal")
        average = safe_get_full_optimizer_state(engine.module[2].weight, "exp_avg")
        norm = float(average.norm())
        found[name] = dtypes_of(engine), train(engine, rank, range(4, 8)), norm
    return found


def convert(folder: Path, *through: str) -> subprocess.CompletedProcess[str]:
    """Runs DeepSpeed's converter, through another module or on its own."""
    arguments = ["--input_folder", "middle", "--output_folder", "universal", "--inject_missing_state"]
    return subprocess.run(
        [sys.executable, *through, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments],
        cwd=folder,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(adamops.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def moved_states(rank: int, world_size: int, stage: int, cls: str, folder: str) -> list[tuple[Any, ...]]:
    """Losses without and with states that are moved in between; and again, from a checkpoint saved then."""
    found = []
    for precision in ({}, {"state_dtype": "8bit"}):
        settings = config(stage, False, "bf16")
        unmoved, moved = (engine_of(settings, cls, **precision) for _ in range(2))
        losses = train(moved, rank, range(4))
        moved.offload_states()
        moved.reload_states()
        losses += train(moved, rank, range(4, 6))
        tag = f"stage {stage} {precision}"
        moved.save_checkpoint(folder, tag=tag)
        losses += train(moved, rank, range(6, 8))
        moved.load_checkpoint(folder, tag=tag)
        moved.offload_states()
        moved.reload_states()
        resumed = train(moved, rank, range(6, 8))
        found.append((train(unmoved, rank, range(8)), losses, resumed, dtypes_of(moved)))
    return found


def elastic_checkpoint(rank: int, world_size: int, cls: str, state_dtype: Any, folder: str) -> str:
    """What is said where DeepSpeed would cut states by name."""
    settings = config(2, cls == "DeepSpeedCPUAdam", "bf16", elastic_checkpoint=True)
    engine = engine_of(settings, cls, state_dtype=state_dtype)
    train(engine, rank, range(1))
    try:
        engine.save_checkpoint(folder, tag="elastic")
    except NotImplementedError as error:
        return str(error)
    return ""

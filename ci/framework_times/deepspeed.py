"""Times DeepSpeed's engine.step() with its own optimizer, on DeepSpeed's ops and on adamops' ops, and with torch's.

Compiles DeepSpeed's ops if they are not in its cache, which takes minutes. Must not know how any of them works.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from typing import Any

import torch

from adamops.bench import WARMUP_ROUNDS, deepspeed_adam

LR = {"lr": 1e-4, "weight_decay": 0.01}
ROUNDS = 9

# ZeRO stage, offload, dtype
CASES = {
    "ZeRO-2, offload, bf16": (2, True, "bf16"),
    "ZeRO-3, offload, bf16": (3, True, "bf16"),
    "ZeRO-2, offload, bf16 masters and states": (2, True, "low"),
    "ZeRO-2, fp32": (2, False, "fp32"),
}


def _model() -> torch.nn.Module:
    """12.6 M params in 36 tensors."""
    torch.manual_seed(0)
    blocks = [[torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512), torch.nn.LayerNorm(512)] for _ in range(6)]
    return torch.nn.Sequential(*itertools.chain(*blocks))


def _engine(case: tuple[int, bool, str], optimizer: str) -> Any:
    import deepspeed

    stage, offload, dtype = case
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    bf16: dict[str, Any] = {"enabled": dtype != "fp32"}
    if dtype == "low":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": bf16,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = _model()
    client = None
    if optimizer.startswith("torch"):
        client = torch.optim.AdamW(model.parameters(), **LR, fused="fused" in optimizer)
    else:
        config["optimizer"] = {"type": "AdamW", "params": LR}
    params = None if client else model.parameters()
    return deepspeed.initialize(model=model, optimizer=client, model_parameters=params, config=config)[0]


def _backward(engine: Any) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.randn(1, 512, dtype=dtype)).float().square().mean())


def measure() -> dict[str, dict[str, float]]:
    """Median milliseconds of a step by case and implementation."""
    deepspeed_adam()  # sets the environment variables that DeepSpeed needs
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    import deepspeed
    from deepspeed.utils import logger

    import adamops.deepspeed

    logger.setLevel("ERROR")
    deepspeed.ops.__dict__["__compatible_ops__"] = {}  # skips the op for shared memory, which only inference uses
    results = {}
    for name, case in CASES.items():
        engines = {"DeepSpeed": _engine(case, "config")}
        with adamops.deepspeed.patch():
            engines["DeepSpeed on adamops"] = _engine(case, "config")
        if case[2] != "low":
            engines |= {kind: _engine(case, kind) for kind in ("torch", "torch fused")}
        results[name] = _medians(engines)
        for engine in engines.values():
            engine.destroy()
    return results


def _medians(engines: dict[str, Any]) -> dict[str, float]:
    """As adamops.bench.time_in_rounds(), but each call is preceded by the backward pass that a step needs."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(WARMUP_ROUNDS + ROUNDS):
        for name in order.sample(list(engines), len(engines)):
            _backward(engines[name])
            start = time.perf_counter()
            engines[name].step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(took[WARMUP_ROUNDS:]) for name, took in times.items()}

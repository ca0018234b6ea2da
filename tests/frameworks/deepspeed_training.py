"""A small training with DeepSpeed's engine on CPUs, for the ranks of the tests.

Imported in processes of their own: what is set here of DeepSpeed's environment touches no other test.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
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


LOW_PRECISION = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}

FURTHER = {
    "many subgroups": config(3, True, "bf16", sub_group_size=1000),
    "partly offloaded": config(3, True, "bf16", sub_group_size=1000, offload_optimizer={"ratio": 0.5}),
    "bfloat16 masters, ZeRO-2": config(2, True, "bf16") | {"bf16": LOW_PRECISION},
    "bfloat16 masters, ZeRO-3": config(3, True, "bf16") | {"bf16": LOW_PRECISION},
}


def further_curves(rank: int, world_size: int) -> dict[str, tuple[list[float], list[float]]]:
    """The losses by settings that DeepSpeed's class alone takes, patched; and by torch with plain settings."""
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    found = {}
    for name, settings in FURTHER.items():
        with adamops.deepspeed.patch():
            losses = train(new_engine(deepspeed, settings, "config"), rank, range(6))
        takes_torch = name == "many subgroups"
        reference = config(3, True, "bf16")
        found[name] = (
            losses,
            train(new_engine(deepspeed, settings if takes_torch else reference, "torch"), rank, range(6)),
        )
    return found


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """What DeepSpeed says to our class as a client optimizer where its config does not allow that."""
    deepspeed = quiet_deepspeed()
    found = {}
    for name, settings, left_out in [
        ("untested", config(2, False, "fp32"), "zero_allow_untested_optimizer"),
        ("offload", config(2, True, "fp32"), "zero_force_ds_cpu_optimizer"),
        ("masters", FURTHER["bfloat16 masters, ZeRO-2"], None),
    ]:
        settings = {key: value for key, value in settings.items() if key != left_out}
        try:
            new_engine(deepspeed, settings, "ours")
        except Exception as error:
            found[name] = str(error)
    import adamops.deepspeed

    with adamops.deepspeed.patch():  # knows our classes
        for name, offload in (("patched", False), ("patched, offloaded", True)):
            settings = config(2, offload, "fp32")
            del settings["zero_allow_untested_optimizer"], settings["zero_force_ds_cpu_optimizer"]
            found[name] = type(new_engine(deepspeed, settings, "ours").basic_optimizer).__module__
    return found


def eight_bit_curves(rank: int, world_size: int, folder: str) -> dict[int, tuple[list[float], ...]]:
    """As resumed_curves(), with 8-bit states, by ZeRO stage; the losses with float32 states; and those of the engine
    that a patched DeepSpeed makes of a config with 8-bit states."""
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    def new_model() -> torch.nn.Module:
        torch.manual_seed(7)
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, 300), torch.nn.GELU(), torch.nn.Linear(300, WIDTH))

    def engine_of(stage: int, **precision: Any) -> Any:
        model = new_model()
        client = adamops.DeepSpeedCPUAdam(model.parameters(), **HYPER, **precision)
        return deepspeed.initialize(model=model, optimizer=client, config=config(stage, True, "bf16"))[0]

    def losses_of_config(stage: int) -> list[float]:
        model = new_model()
        optimizer = {"type": "AdamW", "params": HYPER | {"state_dtype": "8bit"}}
        settings = config(stage, True, "bf16") | {"optimizer": optimizer}
        with adamops.deepspeed.patch():
            engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
            losses = train(engine, rank, range(8))
        assert type(engine.basic_optimizer) is adamops.DeepSpeedCPUAdam
        return losses

    found = {}
    for stage in (2, 3):
        first = engine_of(stage, state_dtype="8bit")
        start = train(first, rank, range(4))
        first.save_checkpoint(folder, tag=f"stage{stage}")
        unbroken = train(first, rank, range(4, 8))
        second = engine_of(stage, state_dtype="8bit")
        second.load_checkpoint(folder, tag=f"stage{stage}")
        dtypes = {state["exp_avg"].dtype for state in second.basic_optimizer.state.values()}
        assert dtypes == {torch.int8}, dtypes
        resumed = train(second, rank, range(4, 8))
        plain = train(engine_of(stage), rank, range(8))
        found[stage] = start + unbroken, resumed, plain, losses_of_config(stage)
    return found


def superoffload_steps(rank: int, world_size: int, folder: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What SuperOffload's process makes of a param in three steps and an undone one, and what our class does.

    There is no compiler, and nothing was compiled before.
    """
    os.environ.update(PATH=folder, TORCH_EXTENSIONS_DIR=folder)
    quiet_deepspeed()
    from deepspeed.runtime.superoffload.superoffload_utils import ResultKeys, SuperOffloadCPUOptimizer

    import adamops.deepspeed

    torch.manual_seed(3)
    param = torch.nn.Parameter(torch.randn(1000))
    there = param.detach().clone()
    ours = adamops.DeepSpeedCPUAdam([param], **HYPER)
    found = []
    with adamops.deepspeed.patch():
        process = SuperOffloadCPUOptimizer(HYPER | {"amsgrad": False}, max_grad_numel=1000, pin_memory=False)
    try:
        for step in range(4):
            rollback = step == 3
            if not rollback:
                param.grad = torch.randn(1000)
            (ours.rollback_subgroup if rollback else ours.step_subgroup)(0)
            process.async_step(0, 0, there, param.grad, rollback=rollback)
            while (result := process.get_result()) is None:
                if not process.cpuadam_process.is_alive():
                    raise RuntimeError("SuperOffload's process has ended")
                time.sleep(0.01)
            there = result[ResultKeys.UPDATED_PARAM].clone()
            found.append((there.clone(), param.detach().clone()))
    finally:
        process.close()
    return found


def prepared_by_accelerate(rank: int, world_size: int, cls: str, patched: bool, keys: dict[str, bool]) -> Any:
    """What Accelerate makes of an offloaded client optimizer, and a training's losses; or what is said."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "ACCELERATE_USE_DEEPSPEED": "true"}
    quiet_deepspeed()
    import accelerate

    import adamops.deepspeed

    settings = config(2, True, "bf16") | {"gradient_accumulation_steps": 1}
    del settings["scheduler"], settings["zero_allow_untested_optimizer"], settings["zero_force_ds_cpu_optimizer"]
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=settings | keys)
    if patched:
        adamops.deepspeed.patch()
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16")
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 300), torch.nn.GELU(), torch.nn.Linear(300, WIDTH))
    client = getattr(adamops, cls)(model.parameters(), **HYPER, state_dtype="8bit")
    try:
        engine, _ = accelerator.prepare(model, client)
    except RuntimeError as error:
        return str(error)
    losses = train(engine, rank, range(6))
    dtypes = {state["exp_avg"].dtype for state in client.state.values()}
    return engine.basic_optimizer is client, dtypes, losses

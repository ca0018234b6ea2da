"""What DeepSpeed's engine makes of each way to ask for Adam, and what its optimizer steps. For the tests' ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from frameworks.deepspeed_states import convert
from frameworks.deepspeed_training import HYPER, LOW_PRECISION, WIDTH, config, quiet_deepspeed, train

import adamops
from adamops.optim.backends.cpu import NativeBackend

STAGES = [(stage, offload) for stage, offload in itertools.product((0, 1, 2, 3), (False, True)) if stage or not offload]
KEYS: dict[str, dict[str, Any]] = {"": {}, "8bit": {"state_dtype": "8bit"}, "amsgrad": {"amsgrad": True}}
WAYS = [(way, keys) for keys in KEYS for way in ("client", "config")]


def large_model() -> torch.nn.Module:
    """Large enough for 8-bit states."""
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 301), torch.nn.GELU(), torch.nn.Linear(301, WIDTH))


def engine_by_config(settings: dict[str, Any], dtype: torch.dtype = torch.float32, **params: Any) -> Any:
    """The engine that a patched DeepSpeed makes of a config whose optimizer has these params."""
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    model = large_model().to(dtype)
    settings = settings | {"optimizer": {"type": "AdamW", "params": HYPER | params}}
    with adamops.deepspeed.patch():
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def engine_by_client(settings: dict[str, Any], cls: type[torch.optim.Optimizer], **params: Any) -> Any:
    """The engine of a client optimizer, with DeepSpeed as it is."""
    deepspeed = quiet_deepspeed()
    model = large_model()
    return deepspeed.initialize(model=model, optimizer=cls(model.parameters(), **HYPER, **params), config=settings)[0]


def what_ran(rank: int, world_size: int, dtype: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By stage and way: the class of the engine's inner optimizer, the op that stepped, states and losses.

    Building an op of DeepSpeed is an error.
    """
    quiet_deepspeed()
    from deepspeed.ops.op_builder.builder import OpBuilder

    def jit_load(self: Any, verbose: bool = True) -> None:
        raise AssertionError(f"DeepSpeed compiles {self.NAME}")

    stepped: list[str] = []
    run = NativeBackend._run

    def counting_run(self: NativeBackend, calls: list[Any]) -> None:
        stepped.append(self.module.__file__)
        run(self, calls)

    OpBuilder.jit_load, NativeBackend._run = jit_load, counting_run
    found = {}
    for (stage, offload), (way, keys) in itertools.product(STAGES, WAYS):
        settings, params = config(stage, offload, dtype), KEYS[keys]
        cls = adamops.DeepSpeedCPUAdam if offload else adamops.FusedAdam
        engine = engine_by_client(settings, cls, **params) if way == "client" else engine_by_config(settings, **params)
        inner, ops, losses = engine.basic_optimizer, [], []
        for step in range(4):
            stepped.clear()
            losses += train(engine, rank, range(step, step + 1))
            ops.append(set(stepped))
        found[stage, offload, way, keys] = {
            "class": f"{type(inner).__module__.split('.')[0]}.{type(inner).__name__}",
            "ops": ops,
            "states": {(key, value.dtype) for state in inner.state.values() for key, value in tensors_of(state)},
            "losses": losses,
        }
        engine.destroy()
    return found


def tensors_of(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a param's state."""
    return [(key, value) for key, value in state.items() if isinstance(value, torch.Tensor)]


# Master weights ----------------------------------------------------------------------------------------------------


class Recorder:
    """What an engine's inner optimizer, of one flat param, is given: the param at first, and the grad and lr of each
    step. Plain steps of it can be done again."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.basic_optimizer
        self.first: torch.Tensor | None = None
        self.param: Any = None
        self.steps: list[tuple[torch.Tensor, float]] = []
        self.optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: Any, *_: Any) -> None:
        ((group, self.param),) = [(group, param) for group in optimizer.param_groups for param in group["params"]]
        if self.first is None:
            self.first = self.param.detach().clone()
        self.steps.append((self.param.grad.clone(), float(group["lr"])))

    def again(self, **params: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The param and its state after the same steps by an optimizer of adamops without DeepSpeed."""
        param = torch.nn.Parameter(self.first.clone())
        plain = type(self.optimizer)([param], **HYPER, **params)
        for param.grad, plain.param_groups[0]["lr"] in self.steps:
            plain.step()
        return param.detach(), dict(tensors_of(plain.state[param]))

    def now(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The param and its state as the engine has them."""
        return self.param.detach().clone(), dict(tensors_of(self.optimizer.state[self.param]))


MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}


def with_16_bit_masters(
    rank: int, world_size: int, stage: int, offload: bool, params: dict[str, Any], folder: str
) -> dict[str, Any]:
    """An engine's flat param and state after 6 steps; by plain steps; and by an engine that resumed after 3."""
    settings = config(stage, offload, "bf16") | {"bf16": LOW_PRECISION if params.pop("bf16 states", False) else MASTERS}
    engine = engine_by_config(settings, **params)
    recorder = Recorder(engine)
    train(engine, rank, range(3))
    engine.save_checkpoint(folder, tag="middle")
    losses = train(engine, rank, range(3, 6))
    resumed = engine_by_config(settings, **params)
    resumed.load_checkpoint(folder, tag="middle")
    second = Recorder(resumed)
    losses_resumed = train(resumed, rank, range(3, 6))
    if settings["bf16"] is LOW_PRECISION:
        params = {"state_dtype": torch.bfloat16} | params
    return {
        "class": type(engine.basic_optimizer).__name__,
        "engine": recorder.now(),
        "plain": recorder.again(**params),
        "resumed": second.now(),
        "losses": (losses, losses_resumed),
    }


def without_zero(rank: int, world_size: int, params: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of a bfloat16 model without "bf16" in the config: each param and its state by the engine, and by plain steps."""
    engine = engine_by_config(config(0, False, "fp32"), torch.bfloat16, **params)
    plain_params = [torch.nn.Parameter(param.detach().clone()) for param in engine.module.parameters()]
    plain = adamops.FusedAdam(plain_params, **HYPER, **params)

    def record(optimizer: Any, *_: Any) -> None:
        plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        for param, twin in zip(optimizer.param_groups[0]["params"], plain_params, strict=True):
            twin.grad = param.grad.clone()
        plain.step()

    inner = engine.basic_optimizer
    inner.register_step_pre_hook(record)
    train(engine, rank, range(4))
    return [
        ((param.detach(), dict(tensors_of(inner.state[param]))), (twin.detach(), dict(tensors_of(plain.state[twin]))))
        for param, twin in zip(engine.module.parameters(), plain_params, strict=True)
    ]


FLOAT32_MASTERS = {
    "ZeRO-1": (1, {}),
    "ZeRO-2": (2, {}),
    "ZeRO-3": (3, {}),
    "FP16_Optimizer": (0, {}),
    "BF16_Optimizer": (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "BF16_Optimizer, asked for bfloat16 masters": (
        1,
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": LOW_PRECISION},
    ),
    "ZeRO-2, bfloat16 model": (2, {"bf16": {"enabled": False}}),
}


def where_masters_are_float32(rank: int, world_size: int) -> dict[str, tuple[str, set[torch.dtype], set[str]]]:
    """What is said to `master_weight_bits` in the config; what a client optimizer with it steps, and its states."""
    found = {}
    for name, (stage, keys) in FLOAT32_MASTERS.items():
        settings = config(stage, False, "bf16") | keys
        dtype = torch.bfloat16 if "model" in name else torch.float32
        try:
            engine_by_config(settings, dtype, master_weight_bits=32)
            said = ""
        except ValueError as error:
            said = str(error)
        deepspeed = quiet_deepspeed()
        model = large_model().to(dtype)
        client = adamops.FusedAdam(model.parameters(), **HYPER, master_weight_bits=32)
        dtypes: set[torch.dtype] = set()
        client.register_step_pre_hook(
            lambda optimizer, *_, dtypes=dtypes: dtypes.update(
                param.dtype for group in optimizer.param_groups for param in group["params"]
            )
        )
        engine = deepspeed.initialize(model=model, optimizer=client, config=settings)[0]
        train(engine, rank, range(2))
        found[name] = said, dtypes, {key for state in client.state.values() for key in state}
        engine.destroy()
    return found


def clients_with_16_bit_masters(rank: int, world_size: int) -> list[tuple[str, set[str]]]:
    """What a patched DeepSpeed says to float32 and to bfloat16 states where its config asks for the latter, offloaded;
    by client optimizers, and by the config; and the names of the states after a step."""
    settings = config(2, True, "bf16") | {"bf16": LOW_PRECISION}
    deepspeed = quiet_deepspeed()
    import adamops.deepspeed

    def by_client(state_dtype: torch.dtype | None) -> Any:
        model = large_model()
        client = adamops.DeepSpeedCPUAdam(model.parameters(), **HYPER, master_weight_bits=32, state_dtype=state_dtype)
        with adamops.deepspeed.patch():
            return deepspeed.initialize(model=model, optimizer=client, config=settings)[0]

    found = []
    for make in (
        lambda: by_client(None),
        lambda: engine_by_config(settings, state_dtype="float32"),
        lambda: by_client(torch.bfloat16),
    ):
        try:
            engine = make()
            train(engine, rank, range(1))
            found.append(("", {key for state in engine.basic_optimizer.state.values() for key in state}))
        except ValueError as error:
            found.append((str(error), set()))
    return found


# Universal checkpoints ---------------------------------------------------------------------------------------------


def loaded_universal(
    rank: int, world_size: int, settings: dict[str, Any], params: dict[str, Any], folder: str
) -> dict[str, Any]:
    """Saves a training with these params of the config's optimizer, and converts it. What is said when it is loaded
    with the same, and the float32 master weights: saved, and loaded without these params."""
    engine = engine_by_config(settings, **params)
    recorder = Recorder(engine)
    train(engine, rank, range(3))
    engine.save_checkpoint(folder, tag="middle")
    engine.basic_optimizer.param_groups[0]["params"] = [recorder.param]  # ZeRO-3 takes it out after each step
    (saved,) = engine.basic_optimizer.fp32_params()
    if rank == 0:
        converted = convert(Path(folder), "-m", "adamops.deepspeed")
        assert converted.returncode == 0, converted.stderr
    torch.distributed.barrier()
    universal = {"checkpoint": {"load_universal": True}}
    try:
        engine_by_config(settings | universal, **params).load_checkpoint(folder, tag="universal")
        said = ""
    except NotImplementedError as error:
        said = str(error)
    plain = engine_by_config(settings | universal | {"bf16": {"enabled": True}})
    plain.load_checkpoint(folder, tag="universal")
    zero = plain.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            (loaded,) = getattr(zero, name)
    return {"said": said, "saved": saved, "loaded": loaded.detach().clone()}

"""Makes DeepSpeed's engine create our classes where its config has settings of theirs, and give them 16-bit masters.

Must not know how a step is done. `set_attribute` replaces an attribute of a class and returns the former one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .ops.adam import DeepSpeedCPUAdam, FusedAdam
from .ops.adam.adam_optimizer import AdamOptimizer

# Settings of a config's optimizer that DeepSpeed's classes do not have, with which ours are created instead.
_OF_STATES = ("state_dtype", "amsgrad")
_OF_16_BIT_PARAMS = ("master_weight_bits", "stochastic_rounding", "stochastic_rounding_seed")
_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def read_settings(set_attribute: Callable[[Any, str, Any], Any]) -> None:
    """Makes the engine create our classes where a config has settings of theirs."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    def get_optimizer_configuration(
        engine: Any, parameters: dict[str, Any], adam_w_mode: bool, *arguments: Any, **named: Any
    ) -> tuple[Any, dict[str, Any]]:
        ours = {name: parameters.pop(name) for name in (*_OF_STATES, *_OF_16_BIT_PARAMS) if name in parameters}
        theirs, settings = original(engine, parameters, adam_w_mode, *arguments, **named)
        if not ours or theirs is None or issubclass(theirs, (torch.optim.Adam, torch.optim.AdamW)):
            return theirs, settings | ours
        cls = {"DeepSpeedCPUAdam": DeepSpeedCPUAdam, "FusedAdam": FusedAdam}.get(theirs.__name__)
        if cls is None:
            raise ValueError(f"The config's optimizer has {_listed(ours)}, which {theirs.__name__} does not have")
        unused = [name for name in _OF_16_BIT_PARAMS if ours.get(name)]
        if unused and not _hands_over_16_bit_params(engine):
            raise ValueError(
                f"The config's optimizer has {_listed(unused)}, for 16-bit params, which get DeepSpeed's own float32 "
                "master weights here; leave it out"
            )
        if isinstance(ours.get("state_dtype"), str):
            ours["state_dtype"] = _DTYPES.get(ours["state_dtype"].removeprefix("torch."), ours["state_dtype"])
        if engine.bf16_optimizer_states():
            settings.pop("fp32_optimizer_states", None)
            ours.setdefault("state_dtype", torch.bfloat16)
        return cls, settings | ours

    if hasattr(DeepSpeedEngine, "get_optimizer_configuration"):
        original = set_attribute(DeepSpeedEngine, "get_optimizer_configuration", get_optimizer_configuration)


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _hands_over_16_bit_params(engine: Any) -> bool:
    """Whether the engine's optimizer steps 16-bit params, if the model has them; else DeepSpeed's float32 masters."""
    if not engine.zero_optimization():
        return not (engine.fp16_enabled() or engine.bfloat16_enabled())
    grads = engine.get_data_types()[1]
    has_bf16_optimizer = engine.zero_optimization_stage() == 1 and grads == torch.float32
    if has_bf16_optimizer and not engine.zero_cpu_offload():  # it has float32 masters, whatever the config says
        return False
    return bool(engine.bf16_master_weights_and_gradients())


def take_16_bit_masters(set_attribute: Callable[[Any, str, Any], Any]) -> None:
    """Makes ZeRO accept our classes with "bf16_master_weights_and_grads".

    DeepSpeed asks there for its DeepSpeedCPUAdam, offloaded, unless all states are bfloat16.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    def _configure_master_weights(self: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(self.optimizer, AdamOptimizer) and named.get("bf16_offload_validator"):
            named["bf16_offload_validator"] = None
            wants_bfloat16 = named.get("bf16_optimizer_states") and named.get("offload_enabled")
            if wants_bfloat16 and self.optimizer._precision.state_dtype == torch.float32:
                raise ValueError(
                    '"bf16_optimizer_states" asks for bfloat16 states, and the optimizer has float32 states; leave it '
                    "out of the config, or set state_dtype to torch.bfloat16 or '8bit'"
                )
        return original(self, *arguments, **named)

    if hasattr(ZeROOptimizer, "_configure_master_weights"):
        wrapped = functools.wraps(ZeROOptimizer._configure_master_weights)(_configure_master_weights)
        original = set_attribute(ZeROOptimizer, "_configure_master_weights", wrapped)

"""Reports that Accelerate replaces an optimizer. Does not import Accelerate."""

from __future__ import annotations

import types
import warnings
from typing import Any

from ...optim.state.precision import Precision, own_settings
from .adam_optimizer import AdamOptimizer


def check_not_replaced(optimizer: Any, caller: types.FrameType) -> None:
    """Called when an optimizer's defaults are read. Accelerate reads them to replace the optimizer by DeepSpeed's.

    It does so for an offloaded optimizer. It carries over lr and weight decay, but neither decoupled decay nor
    precision. No return value would make it keep the optimizer, so all that can be done here is to report it.

    Raises
    ------
    RuntimeError
        If DeepSpeed's optimizer would compute something else. Otherwise there is only a warning.
    """
    if caller.f_code.co_name != "map_pytorch_optim_to_deepspeed":
        return
    lost = _not_in_deepspeeds_adam(optimizer)
    said = (
        f"Accelerate replaces this {type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__} by "
        "DeepSpeed's DeepSpeedCPUAdam, as the optimizer is offloaded"
    )
    remedy = (
        "call adamops.deepspeed.patch() before accelerator.prepare(), or set "
        '"zero_force_ds_cpu_optimizer": false and "zero_allow_untested_optimizer": true in DeepSpeed\'s config'
    )
    if lost:
        raise RuntimeError(f"{said}, which does not have its {', '.join(lost)}. To keep it, {remedy}")
    warnings.warn(f"{said}, which compiles its op at the first step. To keep it, {remedy}", stacklevel=4)


def _not_in_deepspeeds_adam(optimizer: Any) -> list[str]:
    """What DeepSpeed's class with L2 would lose if built from the optimizer's param groups, as words for a message."""
    groups = optimizer.param_groups
    if not isinstance(optimizer, AdamOptimizer):
        return ["update rule"]
    found = {
        "decoupled weight decay": optimizer.adam_w_mode and any(group["weight_decay"] for group in groups),
        "precision of states and params": optimizer._precision != Precision() or any(map(own_settings, groups)),
        "amsgrad": any(group["amsgrad"] for group in groups),
        "maximize": any(group["maximize"] for group in groups),
    }
    return [words for words, is_lost in found.items() if is_lost]

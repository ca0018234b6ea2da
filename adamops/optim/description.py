"""What print(optimizer) shows besides the param groups. Must not know how anything is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.base import Backend
from .state.precision import Master, Precision


def described(optimizer: Any, text: str) -> str:
    """torch's description of an optimizer, with its rule, precision and backends in lines after the first."""
    if "_group_precisions" not in vars(optimizer):  # a wrapper of the optimizer, or one under construction
        return text
    name, _, groups = text.partition("\n")
    own, of = optimizer._precision, optimizer._group_precisions.of
    precisions = (_precision(of(group, "", own), group["params"]) for group in optimizer.param_groups)
    devices = {param.device: None for group in optimizer.param_groups for param in group["params"]}
    updates = (
        f"{device} by {_in_words(optimizer._backends.get(device))}" for device in devices or [torch.device("cpu")]
    )
    lines = {
        "Rule": optimizer.rule.in_words(optimizer.param_groups),
        "Precision": "; ".join(dict.fromkeys(precisions)),
        "Updates": ", ".join(updates),
    }
    return "\n".join([name, *(f"{label}: {value}" for label, value in lines.items()), groups])


def _precision(precision: Precision, params: list[Tensor]) -> str:
    has_none = precision.master is not Master.NONE and all(precision.master_of(p) is Master.NONE for p in params)
    return f"{precision} (for 16-bit params, of which there are none)" if has_none else str(precision)


def _in_words(backend: Backend | None) -> str:
    if backend is None:
        return "what the first step loads"
    target = getattr(getattr(backend, "module", None), "target", None)  # of a CPU op
    if target is not None:
        return f"the compiled op {backend.name} ({target()})"
    return "pure PyTorch, which is slow" if backend.name == "torch_adam" else f"the compiled op {backend.name}"

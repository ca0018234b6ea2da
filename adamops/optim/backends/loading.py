"""Chooses the backend of params on a device: the compiled op of the rule, or pure PyTorch with a warning."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from ... import op_builder
from ..rule import Rule, required
from .base import Backend
from .cpu import NativeBackend
from .cuda import CudaBackend
from .torch import TorchBackend


def load_backend(rule: Rule, device: torch.device) -> Backend:
    """The compiled op for params on a device, or pure PyTorch with one warning that says why."""
    is_amd = device.type == "cuda" and torch.version.hip
    name = None if is_amd else rule.ops.get(device.type)
    if name is None:
        return pure_pytorch(f"No op is compiled for params on {'AMD GPUs' if is_amd else device.type}.")
    try:
        builder: Any = op_builder.get(name)
        if device.type == "cuda":
            return CudaBackend(_of_rule(builder.load_for_device(device.index), rule), device)
        return NativeBackend(_of_rule(builder.load(), rule))
    except (op_builder.OpUnavailableError, KeyError) as error:  # KeyError: no package provides the op
        return pure_pytorch(str(error.args[0]))


def _of_rule(module: Any, rule: Rule) -> Any:
    """The module of an op, whose C++ must describe states and hyper-parameters as the rule does in Python."""
    ours = rule.hyper_names, tuple((state.name, state.signed, state.rounding) for state in rule.states)
    theirs = module.HYPER, module.STATES
    if ours != theirs or len(required(rule.states)) != module.LEAST_STATES:
        raise TypeError(
            f"The op {module.__name__} was built for other hyper-parameters or states than {type(rule).__name__} has: "
            f"{theirs}, at least {module.LEAST_STATES} of the states, and here {ours}; build it anew"
        )
    return module


def pure_pytorch(why: str) -> TorchBackend:
    """The pure PyTorch fallback, with a warning that says why."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("adamops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"adamops falls back to pure PyTorch, which is slow. {why}", RuntimeWarning, stacklevel=level)
    op_builder.get("torch_adam").load()
    return TorchBackend()

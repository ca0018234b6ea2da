"""Chooses the backend of params on the CPU: the compiled op, or pure PyTorch with a warning."""

from __future__ import annotations

import sys
import warnings

from ... import op_builder
from .base import Backend
from .cpu import NativeBackend
from .torch import TorchBackend


def load_host_backend() -> Backend:
    """The compiled CPU op, or pure PyTorch with one warning that says why."""
    try:
        return NativeBackend(op_builder.get("cpu_adam").load())
    except op_builder.OpUnavailableError as error:
        return pure_pytorch(str(error))


def pure_pytorch(why: str) -> TorchBackend:
    """The pure PyTorch fallback, with a warning that says why."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("adamops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"adamops falls back to pure PyTorch, which is slow. {why}", RuntimeWarning, stacklevel=level)
    op_builder.get("torch_adam").load()
    return TorchBackend()

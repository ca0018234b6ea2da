"""Pickled optimizers: what older versions did not pickle, and what a spawned process shares with its parent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..backends.loading import load_backend
from ..group_precisions import GroupPrecisions
from ..rule import Rule
from ..state.precision import Precision, precision_of


def with_missing_attributes(attributes: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """The attributes of a pickled optimizer, with those that are not pickled or were not in an older version."""
    arguments = {
        "fp32_optimizer_states": attributes.get("fp32_optimizer_states", True),
        "master_weights": attributes.get("master_weights", False),
    }
    return {
        "_shared": {},
        "_backends": {torch.device("cpu"): load_backend(rule, torch.device("cpu"))},
        "_precision": precision_of(arguments, Precision()),
        "_group_precisions": GroupPrecisions(),
        **arguments,
        **attributes,
    }


def share_step_counts(states: Iterable[Any]) -> None:
    """Moves step counts into shared memory, as multiprocessing does with the tensors that it gives to a process."""
    for state in states:
        if isinstance(state, dict) and type(state.get("step")) is int:
            state["step"] = torch.tensor(state["step"], dtype=torch.int64, device="cpu").share_memory_()

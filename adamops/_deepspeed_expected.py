"""Teaches DeepSpeed to read our states by name, now or once it is imported. Imports neither DeepSpeed nor torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._import_hooks import when_imported

if TYPE_CHECKING:
    from .optim.rule import State

_expecting = False


def expect_deepspeed(states: tuple[State, ...], has_quantized_states: bool) -> None:
    """Called for each param group, with the states that its rule has.

    DeepSpeed's helpers learn to read its states, now or once DeepSpeed is imported.
    """
    global _expecting
    if _expecting or not (has_quantized_states or "deepspeed" in sys.modules):
        return
    _expecting = True

    def teach() -> None:
        from . import _deepspeed_states

        _deepspeed_states.install(states)

    when_imported("deepspeed", teach)

"""Teaches DeepSpeed to read our states by name, now or once it is imported. Imports neither DeepSpeed nor torch."""

from __future__ import annotations

import sys

from ._import_hooks import when_imported

_expecting = False


def expect_deepspeed(has_quantized_states: bool) -> None:
    """Called for each param group. DeepSpeed's helpers learn to read its states, now or once DeepSpeed is imported."""
    global _expecting
    if _expecting or not (has_quantized_states or "deepspeed" in sys.modules):
        return
    _expecting = True

    def teach() -> None:
        from . import _deepspeed_states

        _deepspeed_states.install()

    when_imported("deepspeed", teach)

"""What DeepSpeedCPUAdam and FusedAdam share: the rule, and the mode of weight decay. They differ in their arguments."""

from __future__ import annotations

from typing import Any

from ...optim.optimizer import RuleOptimizer
from ...optim.settings import check_flags
from .adam import ADAM, ADAMW, AdamRule


class AdamOptimizer(RuleOptimizer):
    """Adam or AdamW. `settings` are those of AdamRule, and the arguments of RuleOptimizer."""

    adam_w_mode: bool  # of all param groups

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        check_flags({"adam_w_mode": adam_w_mode})
        self.adam_w_mode = adam_w_mode
        super().__init__(params, **settings)

    @property
    def rule(self) -> AdamRule:  # type: ignore[override]
        """AdamW or Adam."""
        return ADAMW if self.adam_w_mode else ADAM

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adam_w_mode": self.adam_w_mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "adam_w_mode" in state:  # unpickled; first, as `rule` needs it
            self.adam_w_mode = state["adam_w_mode"]
        super().__setstate__(state)

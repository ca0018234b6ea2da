"""Where step_in_backward() was until version 0.1; it is in optim/backward.py now."""

from .optim.backward import InBackward, step_in_backward

__all__ = ["InBackward", "step_in_backward"]

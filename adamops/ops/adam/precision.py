"""Where pickled optimizers of version 0.1 look for these classes; they are in optim/state/precision.py now."""

from ...optim.state.precision import Master, Precision

__all__ = ["Master", "Precision"]

"""Lion for params on the CPU, on adamops: how a package of its own adds an op."""

from typing import Any

__all__ = ["Lion"]


def __getattr__(name: str) -> Any:
    """Imports torch only when the optimizer is asked for: builds and the report look at the builder alone."""
    if name == "Lion":
        from .lion import Lion

        return Lion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

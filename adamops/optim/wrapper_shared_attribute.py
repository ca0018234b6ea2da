"""Attributes that an optimizer and its wrappers share.

A wrapper, such as Lightning's, may have the optimizer's class but not its attributes. It reads them from the optimizer,
but what its methods set stays on the wrapper. Must not know what is shared.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T")


class WrapperSharedAttribute(Generic[T]):
    """An attribute in the optimizer's dict `_shared`, so that setting it on a wrapper sets it on the optimizer."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> T:
        return self._default if optimizer is None else optimizer._shared.get(self._name, self._default)

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self._name] = value

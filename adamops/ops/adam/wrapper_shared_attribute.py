"""Attributes that an optimizer and those who wrap it have in common.

A wrapper may be of the optimizer's class without having its attributes, as Lightning's: it reads them from the
optimizer, but what its methods set stays with itself. Must not know what is shared.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T")


class WrapperSharedAttribute(Generic[T]):
    """An attribute kept in the optimizer's `_shared`, a dict, so that one set on a wrapper is set on the optimizer."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> T:
        return self._default if optimizer is None else optimizer._shared.get(self._name, self._default)

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self._name] = value

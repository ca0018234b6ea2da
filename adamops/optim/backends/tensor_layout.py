"""Finds by experiment the offsets, in torch's objects, of the fields that prove that a tensor's address may be used.

csrc/python/tensor_layout.h reads them. Every read here lies within an object of known size. An offset is accepted only
if it is the only one that agrees with what torch says about all of many different tensors. Otherwise there is no
layout, and tensors are checked through torch's Python API. Must not know of optimizers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..._torch_compat import address_in_torch, dispatch_keys, dlpack_exchange_table, version_of

_WORD = 8
_LEAST_TENSOR_WORDS, _MOST_TENSOR_WORDS = 22, 26  # of a TensorImpl: 22 in torch 2.13, 23 in torch 2.11
_STORAGE_WORDS = 8  # a StorageImpl has more
_DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.int8)
_COUNTER_WORDS = 3  # vtable pointer, reference count, and the version in half a word


class _UnclearError(Exception):
    """An experiment had no result, or more than one."""


def arguments(device: torch.device) -> dict[str, int] | None:
    """The arguments of TensorLayout for plain tensors on a device; None if the layout is not known."""
    layout = _layout()
    if layout is None:
        return None
    try:
        with torch.inference_mode(False):  # inference tensors differ: they have no version counter
            plain = torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # how torch reports that it cannot use the device
        return None
    if type(plain) is not Tensor:  # made under a mode that replaces tensors
        return None
    return {**layout, "plain_keys": dispatch_keys(plain)}


def how_tensors_are_read() -> str:
    """For the report: whether the ops can read tensors themselves, and if not, why not."""
    if dlpack_exchange_table() is None:
        why = "this torch lends no DLPack functions; 2.10 and newer do"
    elif arguments(torch.device("cpu")) is None:
        why = "where this torch keeps storages and version counters was not found"
    else:
        return "in C++"
    return f"in Python, which makes a step of many small tensors up to 70 times as slow: {why}"


_found: dict[str, int] | None = None


def _layout() -> dict[str, int] | None:
    """The arguments except `plain_keys`: offsets in bytes, and the type words of a plain tensor and its storage."""
    global _found
    if _found is None:
        try:
            _found = _find()
        except (_UnclearError, AttributeError, RuntimeError, TypeError, ValueError):
            return None  # perhaps because of a mode that is active now; the next optimizer tries again
    return _found


def _find() -> dict[str, int]:
    samples = _samples()
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in samples):
        raise _UnclearError
    impls = list(map(address_in_torch, samples))
    storages = [tensor.untyped_storage() for tensor in samples]
    storage_impls = list(map(address_in_torch, storages))
    objects = [_words(id(tensor), type(tensor).__basicsize__ // _WORD) for tensor in samples]
    tensor_words, key_set = _key_set(impls, list(map(dispatch_keys, samples)))
    storage_words = [_words(impl, _STORAGE_WORDS) for impl in storage_impls]
    version_counter = _version_counter()
    counters = [_words(words[version_counter], _COUNTER_WORDS) for words in tensor_words]
    versions = [version_of(tensor) or 0 for tensor in samples]
    return {
        "impl": _WORD * _place(objects, impls),
        "key_set": _WORD * key_set,
        "storage": _WORD * _place(tensor_words, storage_impls),
        "version_counter": _WORD * version_counter,
        "data": _WORD * _place(storage_words, [storage.data_ptr() for storage in storages]),
        "nbytes": _WORD * _place(storage_words, [storage.nbytes() for storage in storages]),
        "version": _WORD * _place([[word & 0xFFFFFFFF for word in words] for words in counters], versions),
        "tensor_type": _same([words[0] for words in tensor_words]),
        "storage_type": _same([words[0] for words in storage_words]),
    }


def _samples() -> list[Tensor]:
    """Tensors that differ in everything that is searched for."""
    with torch.inference_mode(False), torch.no_grad():
        made = [torch.zeros(1009 + 37 * i, device="cpu", dtype=dtype) for i, dtype in enumerate(_DTYPES)]
        for times, tensor in enumerate(made):
            for _ in range(times):
                tensor.zero_()
        made.append(torch.frombuffer(bytearray(3000), dtype=torch.float32))  # its memory belongs to another object
        made += [made[2].conj(), made[2].conj().imag, torch.nn.Parameter(torch.zeros(77, device="cpu"))]
    return made


def _key_set(impls: Sequence[int], expected: Sequence[int]) -> tuple[list[list[int]], int]:
    """The words of TensorImpls, and which of them is the key set.

    The key set is a TensorImpl's last field, so an object without it among the words that were read is longer.
    """
    for count in range(_LEAST_TENSOR_WORDS, _MOST_TENSOR_WORDS + 1):
        words = [_words(impl, count) for impl in impls]
        if places := _places(words, expected):
            return words, _only(places)
    raise _UnclearError


def _version_counter() -> int:
    """The word of a TensorImpl that points to the version counter, which detach() shares and .data does not."""
    with torch.inference_mode(False), torch.no_grad():
        # Five dimensions each: the slots of missing dimensions are uninitialized memory, which may hold anything.
        made = [torch.zeros((size, 1, 1, 1, 1), device="cpu") for size in (5, 11, 7, 13)]
        alike = [(tensor, tensor.detach(), tensor.data) for tensor in made]
    words = [[_words(address_in_torch(tensor), _LEAST_TENSOR_WORDS) for tensor in tensors] for tensors in alike]
    return _only(
        i
        for i in range(_LEAST_TENSOR_WORDS)
        if all(a[i] and a[i] == b[i] and c[i] and c[i] != a[i] for a, b, c in words)
        and len({a[i] for a, _, _ in words}) == len(words)
    )


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def _place(objects: Sequence[Sequence[int]], expected: Sequence[int]) -> int:
    """The only index at which every object has its expected value."""
    return _only(_places(objects, expected))


def _places(objects: Sequence[Sequence[int]], expected: Sequence[int]) -> set[int]:
    """The indices at which every object has its expected value."""
    if len(set(expected)) < 2:
        raise _UnclearError
    places = set(range(min(map(len, objects))))
    for words, value in zip(objects, expected, strict=True):
        places = {i for i in places if words[i] == value}
    return places


def _only(found: Iterable[int]) -> int:
    places = list(found)
    if len(places) != 1:
        raise _UnclearError
    return places[0]


def _same(values: Sequence[int]) -> int:
    if len(set(values)) != 1:
        raise _UnclearError
    return values[0]

"""Proves that a tensor's address may be used: its elements exist, hold its own values, and lie in its storage.

Every address that reaches an op comes from here, or from csrc/python/tensor_reader.h, which proves the same for plain
tensors in C++. Must not know of optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import Parameter

from .._torch_compat import COUNTS_WRITES, is_functional, is_zero_tensor, version_of

PLAIN_TYPES = (Parameter, Tensor)  # subclasses may keep their data elsewhere


def is_lazy(tensor: Tensor) -> bool:
    """Whether memory does not hold the tensor's values: it is lazily negated or conjugated, or has no memory."""
    return tensor.is_neg() or tensor.is_conj() or is_zero_tensor(tensor)


def _resolved(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory: itself, or a new one if it is lazy."""
    if not is_lazy(tensor):
        return tensor
    if is_zero_tensor(tensor):  # a copy of it would have no memory either
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_conj().resolve_neg()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of its element size: itself, or a copy."""
    return tensor.clone() if _is_misaligned(tensor) else tensor


def _is_misaligned(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and bool(tensor.data_ptr() % tensor.element_size())


def check_memory(tensor: Tensor, what: str) -> None:
    """Raises unless all elements of a strided tensor lie in its storage. `what` begins the message.

    Raises
    ------
    TypeError
        For a tensor without memory of its own: one of a subclass whose elements are in other tensors, one of a torch
        mode or transform that only records operations, or one that is lazily negated, conjugated or zero.
    ValueError
        If its storage was freed or shortened (`untyped_storage().resize_()`, as FullyShardedDataParallel does), or its
        address is not a multiple of its element size.
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} has layout {tensor.layout}; expected a dense (strided) tensor")
    if tensor.device.type == "meta":  # has no memory, and no op takes its address
        return
    if is_lazy(tensor):
        kind = "a zero tensor" if is_zero_tensor(tensor) else "lazily negated or conjugated"
        raise TypeError(f"{what} is {kind}, so its memory does not hold its values; use tensor.clone()")
    _check_storage(tensor, what)
    if _is_misaligned(tensor):
        raise ValueError(
            f"{what} is misaligned: its address is not a multiple of {tensor.element_size()} bytes, its element size; "
            "use tensor.clone()"
        )


def check_readable(tensor: Tensor, what: str) -> None:
    """Raises what check_memory() raises, for a tensor that only torch will read or write; it may be lazy.

    torch itself does not check the length of a storage, and crashes. Tensors that are not strided are left to torch.
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta" or is_zero_tensor(tensor):
        return
    if type(tensor) not in PLAIN_TYPES and hasattr(tensor, "__tensor_flatten__"):  # its elements are in other tensors
        return
    _check_storage(tensor, what)


def in_memory(tensor: Tensor, what: str) -> Tensor:
    """The tensor with its values in memory, at an address that an op can use: itself, or a copy.

    Raises what check_memory() raises, if a copy does not help.
    """
    check_readable(tensor, what)
    found = _aligned(_resolved(tensor))
    if found is not tensor or type(tensor) not in PLAIN_TYPES:  # otherwise check_readable() has proved it all
        check_memory(found, what)
    return found


def is_in_memory(tensor: Tensor) -> bool:
    """Whether check_memory() raises nothing for the tensor."""
    try:
        check_memory(tensor, "it")
    except (TypeError, ValueError):
        return False
    return True


def check_writable(tensor: Tensor, what: str) -> None:
    """Raises what check_readable() raises, and ValueError for a tensor that torch cannot write in place."""
    check_readable(tensor, what)
    if is_zero_tensor(tensor):
        raise ValueError(f"{what} is a zero tensor, and cannot be written; use tensor.clone()")
    if (tensor.is_inference() or _is_uncounted(tensor)) and not torch.is_inference_mode_enabled():
        raise ValueError(f"{what} is a tensor of inference mode, and can be written there only; use tensor.clone()")


def check_viewable(tensor: Tensor, what: str) -> None:
    """Raises what check_readable() raises, and ValueError for a tensor that torch cannot make views of."""
    check_readable(tensor, what)
    if _is_uncounted(tensor) and not tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{what} was made in inference mode, and given other data since; use tensor.clone()")


def _is_uncounted(tensor: Tensor) -> bool:
    """Whether this was created in inference mode and given other data since: torch does not count writes to it."""
    return COUNTS_WRITES and version_of(tensor) is None


def check_torch_computes() -> None:
    """Raises TypeError where torch only records operations, as in a FakeTensorMode, and writes nothing."""
    check_readable(torch.empty(0, device="cpu"), "what torch makes here")


def _check_storage(tensor: Tensor, what: str) -> None:
    """Raises TypeError or ValueError unless all elements lie in the tensor's storage."""
    kind = "tensor" if type(tensor) in PLAIN_TYPES else type(tensor).__name__
    if is_functional(tensor) or kind == "FakeTensor":  # even one without elements
        raise TypeError(f"{what} is a {kind}, which has no memory of its own; use a plain tensor")
    needed = _bytes_spanned(tensor)
    if not needed:
        return
    try:
        storage = tensor.untyped_storage()
        is_recorded = storage.device.type == "meta"  # a fake tensor's
        address, begin, length = (0, 0, needed) if is_recorded else _place(tensor, storage)
    except RuntimeError as error:  # how torch reports a missing or merely recorded storage
        raise TypeError(f"{what} is a {kind}, which has no memory of its own ({error}); use a plain tensor") from error
    if not address and length >= needed:
        raise TypeError(f"{what} is a {kind}, which has no memory of its own; use a plain tensor")
    if not begin or address < begin or address + needed > begin + length:
        raise ValueError(
            f"{what} needs {needed} bytes, and its storage has {length}: it was freed or shortened; "
            "step before that, or restore it"
        )


def addresses(tensors: Sequence[Tensor | None], what: str = "a tensor") -> list[int]:
    """The addresses of the tensors' first elements; 0 for None. Raises what check_memory() raises."""
    for tensor in tensors:
        if tensor is not None:
            check_memory(tensor, what)
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def check_still_there(tensors: Iterable[Tensor], spans: Iterable[tuple[int, int]] | None) -> None:
    """Raises RuntimeError unless each span (address, bytes) starts where a tensor does and ends within its storage.

    Without spans, those of the tensors' own elements are checked; the tensors must have no gaps.

    Python code of tensor subclasses may have freed what was proved before. Call this where such code no longer runs:
    inside without_torch_function().
    """
    there: dict[int, int] = {}
    own = []
    for tensor in tensors:
        # Through the class, not the object, whose own methods may be Python code.
        address, storage = Tensor.data_ptr(tensor), Tensor.untyped_storage(tensor)
        there[address] = max(there.get(address, 0), storage.data_ptr() + storage.nbytes() - address)
        own.append((address, Tensor.numel(tensor) * Tensor.element_size(tensor)))
    if any(size and there.get(address, 0) < size for address, size in (own if spans is None else spans)):
        raise RuntimeError("The memory of a param, grad or state was freed or replaced while the step was prepared")


def count_writes(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that the tensors were written in place, as torch's own operations do."""
    for tensor in tensors:
        if tensor.is_inference():  # it has no version counter
            continue
        with contextlib.suppress(RuntimeError):  # nor has a param whose data was made in inference mode
            graph.increment_version(tensor)


def overlapping(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups: those whose memory, from the first to the last element, overlaps are in one."""
    groups: list[list[Tensor]] = []
    spans = []
    for tensor in tensors:
        if tensor.layout == torch.strided:
            begin = tensor.data_ptr()
            spans.append((str(tensor.device), begin, begin + _bytes_spanned(tensor), tensor))
        else:
            groups.append([tensor])
    last_device, last_end = "", 0
    for device, begin, end, tensor in sorted(spans, key=lambda span: span[:3]):
        if device == last_device and begin < last_end:
            groups[-1].append(tensor)
            last_end = max(last_end, end)
        else:
            groups.append([tensor])
            last_device, last_end = device, end
    return groups


def _place(tensor: Tensor, storage: torch.UntypedStorage) -> tuple[int, int, int]:
    """The addresses of a tensor's elements and of its storage, and the size of the storage in bytes."""
    return tensor.data_ptr(), storage.data_ptr(), storage.nbytes()


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's elements begin and end in memory; both 0 if it has none, or no memory."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or is_zero_tensor(tensor):
        return 0, 0
    begin = tensor.data_ptr()
    return begin, begin + _bytes_spanned(tensor)


def _bytes_spanned(tensor: Tensor) -> int:
    """The bytes from the start of the first element to the end of the last; 0 if there are no elements."""
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()

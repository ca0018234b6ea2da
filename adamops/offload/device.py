"""What offloading needs of an accelerator: streams, events, pinned memory and copies between it and the host.

A stream runs what is enqueued on it in order, on its own. Must not know of params, grads or optimizers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Device(Protocol):
    """An accelerator. Streams and events are objects of its own."""

    def new_stream(self, name: str) -> Any:
        """A side stream. The name is for traces."""

    def current_stream(self) -> Any:
        """The stream on which the caller computes."""

    def record(self, stream: Any) -> Any:
        """An event that is done when all that has been enqueued on the stream is."""

    def wait(self, stream: Any, event: Any) -> None:
        """Has what is enqueued on the stream from now on run after the event. Does not wait on the host."""

    def synchronize(self, event: Any) -> None:
        """Returns once the event is done."""

    def download(self, host: Tensor, device: Tensor, stream: Any, label: str) -> None:
        """Enqueues a copy from device to pinned memory, of tensors of the same shape and dtype."""

    def upload(self, device: Tensor, host: Tensor, stream: Any, label: str) -> None:
        """Enqueues a copy from pinned to device memory."""

    def keep(self, device: Tensor, stream: Any) -> None:
        """Keeps the memory of a tensor that is dropped its own until what has been enqueued on the stream is done."""

    def pinned(self, size: int) -> Tensor:
        """New memory on the host that copies can use: so many bytes, of any content."""


class CudaDevice:
    """A CUDA device, through torch's public API."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def download(self, host: Tensor, device: Tensor, stream: torch.cuda.Stream, label: str) -> None:
        with torch.cuda.stream(stream):
            host.copy_(device, non_blocking=True)

    def upload(self, device: Tensor, host: Tensor, stream: torch.cuda.Stream, label: str) -> None:
        self.download(device, host, stream, label)  # torch's copy goes both ways

    def keep(self, device: Tensor, stream: torch.cuda.Stream) -> None:
        device.record_stream(stream)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

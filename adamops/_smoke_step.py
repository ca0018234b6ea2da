"""Steps of the optimizers whose bits are known: python -m adamops.report --check. Must not know how they are shown."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import op_builder
from .ops.adam import AdamW, DeepSpeedCPUAdam, FusedAdam
from .threads import get_num_threads, set_num_threads

STEPS = 3
SHAPES = ((1,), (31,), (64, 33), (20_001,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the params after the steps: the same on every CPU and GPU, for every number of threads and every release of torch.
DIGEST = "106a59f0d80b5998"


class Outcome(NamedTuple):
    """How the steps of one optimizer ended."""

    name: str
    ok: bool
    text: str


def run() -> Iterator[Outcome]:
    """Takes the steps with each class, on all that it can use here."""
    for cls in (AdamW, DeepSpeedCPUAdam, FusedAdam):
        yield _tried(cls.__name__, functools.partial(_on_cpu, cls))
    if torch.cuda.is_available():
        name = f"FusedAdam on {torch.cuda.get_device_name()}"
        yield _tried(name, lambda: _outcome(name, [_digest(FusedAdam, "cuda")], ""))


def _tried(name: str, steps: Callable[[], Outcome]) -> Outcome:
    try:
        return steps()
    except Exception as error:  # whatever is broken
        return Outcome(name, False, f"{type(error).__name__}: {error}")


def _on_cpu(cls: Any) -> Outcome:
    module = op_builder.get("cpu_adam").load()
    best, threads = module.target(), get_num_threads()
    counts = sorted({1, threads})
    digests = []
    try:
        for target in module.supported_targets():
            module.use_target(target)
            for count in counts:
                set_num_threads(count)
                digests.append(_digest(cls, "cpu"))
    finally:
        module.use_target(best)
        set_num_threads(threads)
    return _outcome(cls.__name__, digests, f", with {', '.join(module.supported_targets())} and {counts[-1]} threads")


def _outcome(name: str, digests: list[str], how: str) -> Outcome:
    if set(digests) == {DIGEST}:
        return Outcome(name, True, f"{STEPS} steps of float32, bfloat16 and float16 params{how}: the expected bits")
    return Outcome(name, False, f"other bits than expected: {', '.join(sorted(set(digests)))}, not {DIGEST}")


def _digest(cls: Any, device: str) -> str:
    """Of params after some steps."""
    params = [torch.nn.Parameter(_values(shape, 0).to(device, dtype)) for shape in SHAPES for dtype in DTYPES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as the fallback to pure PyTorch warns, whose bits may differ
        optimizer = cls(params, lr=0.01, weight_decay=0.1)
        for step in range(1, STEPS + 1):
            for param in params:
                param.grad = _values(tuple(param.shape), step).to(param)
            optimizer.step()
    contents = b"".join(bytes(param.detach().cpu().untyped_storage()) for param in params)
    return hashlib.sha256(contents).hexdigest()[:16]


def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers between -8 and 8, the same in every release of torch."""
    count = torch.Size(shape).numel()
    scattered = (torch.arange(count) + 1_000_003 * seed) * 2_654_435_761 % 2**24
    return (scattered.double() / 2**20 - 8).float().reshape(shape)

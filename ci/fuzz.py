"""Fuzzes the optimizers through their public API: random tensors, states and orders of calls. See docs/fuzzing.md.

    python ci/fuzz.py --minutes 10
    python ci/fuzz.py --seed 123456     # replays one session and prints its calls

A session is one optimizer and a few dozen calls, all drawn from one seed. Sessions run in a child process, so that a
crash is a finding too. Needs only torch and adamops; must not know how a step is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import gc
import math
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adamops import DeepSpeedCPUAdam, FusedAdam, step_in_backward
from adamops.ops.adam.adam import AdamRule
from adamops.optim.batch import check_params_and_grads, check_states
from adamops.optim.clipping import ClippedGrads
from adamops.optim.state.memory_layout import in_layout_of, is_in_layout_of
from adamops.optim.step import GroupToStep, batches_of

HOST = torch.device("cpu")
CLASSES: list[Any] = [DeepSpeedCPUAdam, FusedAdam]
EMULATED: list[Any] = []  # those of CLASSES that use the emulated CUDA op
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool, torch.complex64)
STATE_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "block_scales", "master_param", "param_remainder")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERN = 0xA5
IN_WORDS = (ValueError, TypeError, RuntimeError)  # what a call may raise


class Finding(Exception):
    """A call did something that no call may do."""


class Unreadable(RuntimeError):
    """A tensor has no elements in memory: a step that needs it must raise."""


class Subclass(torch.Tensor):
    """A tensor subclass that holds its own elements."""


class Arena:
    """One buffer that holds tensors, with guard bytes between them that nothing may write."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.full((size,), PATTERN, dtype=torch.uint8)
        self._is_guard = torch.full((size,), 0xFF, dtype=torch.uint8)
        self._used = 64

    def place(self, values: Tensor) -> Tensor:
        """Copies the values, with their strides, into the arena; returns a plain clone if the arena is full."""
        item = values.element_size()
        begin = -(-self._used // item) * item + item * random.randrange(4)
        span = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True)) if values.numel() else 0
        if begin + span * item + 64 > len(self.bytes):
            return values.clone()
        self._used = begin + span * item + 17

        def view(buffer: Tensor, dtype: torch.dtype) -> Tensor:
            whole = buffer[: len(buffer) // item * item].view(dtype)
            return whole.as_strided(values.shape, values.stride(), begin // item)

        view(self._is_guard, INTEGERS[item]).zero_()
        return view(self.bytes, values.dtype).copy_(values)

    def check(self) -> None:
        used = self._used + 64
        if bool(((self.bytes[:used] ^ PATTERN) & self._is_guard[:used]).any()):
            raise Finding("guard bytes between tensors were written")


def spanned(tensor: Tensor) -> int:
    """How many bytes of its storage a strided tensor needs."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size()


def held(tensor: Any) -> Any:
    """The local tensor of a DTensor; anything else unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


def is_freed(value: Any) -> bool:
    """Whether this is a tensor with elements and without memory for any."""
    return isinstance(value, Tensor) and value.numel() > 0 and value.untyped_storage().nbytes() == 0


def readable(tensor: Any) -> Tensor:
    """A plain tensor with the same elements and strides. Raises Unreadable if the elements are not in memory."""
    tensor = held(tensor)
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise Unreadable
    if tensor.is_quantized:  # even if it was given a float dtype by view(dtype): torch crashes when it is viewed again
        raise Unreadable
    if type(tensor) not in (Tensor, nn.Parameter, Subclass) or torch._is_functional_tensor(tensor):
        raise Unreadable
    plain = tensor.detach()
    if type(tensor) is Subclass:
        plain = plain.as_subclass(Tensor)
    if plain._is_zerotensor():
        return torch.zeros(plain.shape, dtype=plain.dtype)
    if plain.untyped_storage().nbytes() < spanned(plain):
        raise Unreadable
    plain = plain.resolve_conj().resolve_neg()
    try:
        plain.view_as(plain)
    except RuntimeError:  # an inference tensor cannot be viewed outside inference mode
        plain = torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype).copy_(plain)
    return plain


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy, with the elements in the memory order of `like`."""
    order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
    return tensor.permute(order).clone(memory_format=torch.contiguous_format)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bit-identical, except for NaN payloads."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = INTEGERS[a.element_size()]
    differ = a.contiguous().view(integer) != b.contiguous().view(integer)
    if not bool(differ.any()):
        return True
    return a.is_floating_point() and bool((a.isnan() & b.isnan())[differ].all())


def whole_storage(tensor: Any) -> Tensor | None:
    """All bytes of a tensor's storage, whatever was done to the tensor; None if there are none."""
    try:
        storage = held(tensor).untyped_storage()
        if storage.device.type != "cpu" or not storage.nbytes() or not storage.data_ptr():
            return None
        return torch.empty(0, dtype=torch.uint8, device=HOST).set_(storage)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None


class Snapshot:
    """Everything that a failed call must leave unchanged: bytes of all tensors, states, step counts, settings."""

    def __init__(self, optimizer: Any, params: list[Tensor]) -> None:
        self._optimizer, self._params = optimizer, params
        self._objects, tensors = self._now()
        storages = {bytes_.data_ptr(): bytes_ for bytes_ in map(whole_storage, tensors) if bytes_ is not None}
        self._bytes = [(bytes_, bytes_.clone()) for bytes_ in storages.values()]
        self._may_be_clipped = optimizer._clipped is not None  # a step may then multiply grads by the factor first

    def _now(self) -> tuple[Any, list[Any]]:
        objects: list[Any] = []
        tensors: list[Any] = [*self._params, *(param.grad for param in self._params)]
        for key, state in self._optimizer.state.items():
            entries = {name: id(v) if isinstance(v, Tensor) else repr(v) for name, v in state.items()}
            objects.append((id(key), entries))
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        settings = [{k: id(v) for k, v in group.items()} for group in self._optimizer.param_groups]
        return (objects, settings), tensors

    def check_unchanged(self, what: str) -> None:
        objects, _ = self._now()
        if objects != self._objects:
            raise Finding(f"{what} raised, but states, step counts or settings have changed")
        for bytes_, before in self._bytes:
            if self._may_be_clipped:
                for param in self._params:
                    leave_out(param.grad, bytes_, before)
            if not torch.equal(bytes_, before):
                raise Finding(f"{what} raised, but has written to a tensor")


def leave_out(tensor: Any, bytes_: Tensor, before: Tensor) -> None:
    """Excludes the tensor from the comparison: copies its bytes from `bytes_` to `before`, if that is its storage."""
    tensor = held(tensor)
    storage = whole_storage(tensor)
    if storage is not None and storage.data_ptr() == bytes_.data_ptr() and isinstance(tensor, Tensor):
        begin = tensor.storage_offset() * tensor.element_size()
        place = slice(begin, max(begin, spanned(tensor)))
        before[place] = bytes_[place]


def is_updated(param: Tensor) -> bool:
    """Whether a step changes numbers of the param's. One on the device meta is updated in name only."""
    return param.grad is not None and held(param).device.type != "meta"


class Reference:
    """A second optimizer on clean, contiguous copies, which takes the same step, mostly on the slow path."""

    def __init__(self, session: Session) -> None:
        self.session, optimizer = session, session.optimizer
        self.unreadable = False
        self.grads: list[Tensor] = []
        self._kept = {p: self._names_of(p, group) for group in optimizer.param_groups for p in group["params"]}
        self.params = {param: self._copy_of(param) for param in session.params}
        groups = [{**g, "params": [self.params[p] for p in g["params"]]} for g in optimizer.param_groups]
        for group in groups:
            group.pop("param_names", None)
        self.optimizer = session.made(groups)
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                setattr(self.optimizer, name, getattr(optimizer, name))
        for param in session.params:
            if optimizer.state.get(param) and is_updated(param) and not self.unreadable:
                self.optimizer.state[self.params[param]] = self._state_of(param)
        clipped = optimizer._clipped
        if clipped is not None and clipped.are([held(p.grad) for p in session.params if p.grad is not None]):
            self.optimizer._clipped = ClippedGrads(clipped.factor, clipped.norm, self.grads, [None] * len(self.grads))
        elif clipped is not None:  # some grads were replaced since: the factor applies to the remaining ones
            for param in session.params:
                if self.params[param].grad is not None and clipped._has(held(param.grad)):
                    self.params[param].grad.mul_(clipped.factor)
        if session.random.random() < 0.8:
            self.optimizer._backends[HOST]._reader = None  # tensors are then checked and read from Python

    def _copy_of(self, param: Tensor) -> Tensor:
        """A copy of the param and its grad; a placeholder if a step leaves its numbers alone."""
        if not is_updated(param):
            return nn.Parameter(torch.zeros(1))
        try:
            values = readable(param)
            copied = nn.Parameter(in_memory_order(values, values))
            grad = in_memory_order(readable(param.grad), values)
            if grad.shape != copied.shape or grad.dtype not in FLOATS:
                raise Unreadable
        except (Unreadable, RuntimeError):
            self.unreadable = True
            return nn.Parameter(torch.zeros(1))
        copied.grad_dtype = None
        copied.grad = grad
        self.grads.append(grad)
        return copied

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for key, value in quantized_anew(self.session.optimizer.state[param], held(param)).items():
            if not isinstance(value, Tensor):
                state[key] = value
                continue
            try:
                if key in STATE_KEYS and key not in self._kept[param]:
                    continue
                if key not in STATE_KEYS:
                    state[key] = readable(value).clone()
                    continue
                values = readable(value)
                state[key] = values.clone() if key == "block_scales" else in_memory_order(values, held(param).detach())
            except (Unreadable, RuntimeError):
                self.unreadable = self.unreadable or self._is_needed(key, param)
        return state

    def _names_of(self, param: Tensor, group: dict[str, Any]) -> set[str]:
        """The state tensors that a step may read; it ignores all others, whatever they are."""
        optimizer = self.session.optimizer
        precision = optimizer._group_precisions.of(group, "", optimizer._precision)
        names = {*precision.state_dtypes(param, optimizer.rule.states_of(group)), "block_scales"}
        begins = "master_param" in names and "master_param" not in optimizer.state.get(param, {})
        return names | {"param_remainder"} if begins else names  # from which a new master starts

    def _is_needed(self, key: str, param: Tensor) -> bool:
        """Whether every step reads this tensor; others may be left over from other settings."""
        return key in ("step", "exp_avg", "exp_avg_sq")

    def check(self, arguments: dict[str, Any], outs: list[Tensor | None] | None) -> None:
        """Raises Finding unless the session's step, which has returned, is bit-identical to a step here."""
        session = self.session
        if getattr(session.optimizer, "found_inf", None):
            return
        if self.unreadable:
            raise Finding("step() returned, although it needs a tensor that has no numbers in memory")
        own_outs = None
        if outs is not None:
            own_outs = [
                None if out is None or not is_updated(param) else torch.empty_like(self.params[param], dtype=out.dtype)
                for param, out in zip(session.params, outs, strict=True)
            ]
        try:
            self.optimizer.step(**arguments, **({"lowp_out": own_outs} if outs is not None else {}))
        except IN_WORDS as error:
            raise Finding(f"step() returned, but not on clean copies of all tensors: {error}") from error
        for i, param in enumerate(session.params):
            if not is_updated(param):
                continue
            self._compare(f"param {i}", param, self.params[param], param)
            self._compare(f"the grad of param {i}", param.grad, self.params[param].grad, param)
            self._compare_states(i, param)
            if outs is not None and own_outs is not None and own_outs[i] is not None:
                self._compare(f"the lowp_out of param {i}", outs[i], own_outs[i], param)

    def check_read(self, what: str, read: Callable[[Any], list[Any]]) -> None:
        """Raises Finding unless `read`, called with the session's optimizer, returns what it does with this one.

        It returns a dict of tensors for each param, in the params' order.
        """
        if self.unreadable:
            return
        try:
            all_expected = read(self.optimizer)
        except IN_WORDS as error:
            raise Finding(f"{what} returned, but not on clean copies of all tensors: {error}") from error
        for param, ours, expected in zip(self._kept, read(self.session.optimizer), all_expected, strict=True):
            for key in (ours.keys() & expected.keys()) if is_updated(param) else ():
                if self._is_read_alike(param, key):
                    try:
                        self._compare(f"{key} from {what}", ours[key], expected[key], param)
                    except Unreadable:
                        raise Finding(f"{key} from {what} has no numbers in memory") from None

    def _is_read_alike(self, param: Tensor, key: str) -> bool:
        """Whether a tensor's values do not depend on its memory layout, as those of 8-bit states do."""
        state = self.session.optimizer.state.get(param) or {}
        return "block_scales" not in state or held(state.get(key, param)).stride() == held(param).stride()

    def _compare_states(self, i: int, param: Tensor) -> None:
        ours, expected = self.session.optimizer.state[param], self.optimizer.state[self.params[param]]
        if int(ours["step"]) != int(expected["step"]):
            raise Finding(f"param {i} is at step {ours['step']}, the clean copy at {expected['step']}")
        for key in sorted(self._kept[param]):
            if (key in ours) != (key in expected):
                raise Finding(f"param {i}: only one of the two steps has {key}")
            if key in ours:
                self._compare(f"{key} of param {i}", ours[key], expected[key], None if key == "block_scales" else param)

    def _compare(self, what: str, ours: Any, expected: Any, like: Tensor | None) -> None:
        values = readable(ours)
        values = values if like is None else in_memory_order(values, held(like).detach())
        if not same_bits(values, expected):
            raise Finding(f"{what} differs from a step on clean copies: {ours} and {expected}")


def quantized_anew(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """The state, with 8-bit states quantized anew if the param's memory layout has changed, as a step does it.

    Raises ValueError if they cannot be: the step must then raise, too.
    """
    tensors = {}
    for key in STATE_KEYS if "block_scales" in state else ():
        with contextlib.suppress(Unreadable):
            tensors[key] = readable(state.get(key))
    states = AdamRule.states
    if is_in_layout_of(param, tensors, states, tensors):
        return state

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty_like(param, dtype=dtype)

    try:
        return {**state, **in_layout_of(param, tensors, states, tensors, new)}
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError("8-bit states that cannot be quantized anew") from error


def read_averages(optimizer: Any) -> list[dict[str, Tensor]]:
    """For each param, its float averages as a state dict has them."""
    saved = optimizer.state_dict(True)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    states = [saved["state"].get(index) or {} for index in indices]
    return [{key: value for key, value in state.items() if key.startswith("exp_avg")} for state in states]


def lazily_negated(tensor: Tensor) -> Tensor:
    """The same values as a lazily negated tensor."""
    return torch._neg_view(-tensor)


def with_storage_of(tensor: Tensor, size: int) -> Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def free_its_grad(param: Tensor) -> None:
    with_storage_of(param.grad, 0)  # type: ignore[arg-type]


def freed_if_plain(value: Any, r: random.Random) -> Any:
    """The value with a storage that is too short, if its storage can be resized."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value._is_zerotensor():
        is_plain = type(value) is Tensor and not (value.is_quantized or value.is_nested or value.is_shared())
        if is_plain and not torch._is_functional_tensor(value) and value.device.type == "cpu":
            return with_storage_of(value.clone(), r.choice([0, 1, 8]))
    return value


def misaligned(tensor: Tensor) -> Tensor:
    """A copy at an address that is not a multiple of the element size."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    if not tensor.numel():
        return tensor
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)


# Mutations of a tensor, by name. The harmless ones keep its elements in memory, so that a step may accept them.
HARMLESS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "clone": lambda t, r: t.clone(),
    "negated": lambda t, r: lazily_negated(t),
    "zero tensor": lambda t, r: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "strided": lambda t, r: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t, r: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "expanded": lambda t, r: torch.ones((), dtype=t.dtype).expand(t.shape),
    "subclass": lambda t, r: t.clone().as_subclass(Subclass),
    "shared": lambda t, r: t.clone().share_memory_(),
    "misaligned": lambda t, r: misaligned(t),
    "float32": lambda t, r: t.float().clone(),
    "special": lambda t, r: torch.full_like(t, r.choice([math.inf, -math.inf, math.nan, 1e-40, 65504.0, -0.0])),
}
HARMFUL: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "freed": lambda t, r: with_storage_of(t.clone(), 0),
    "shortened": lambda t, r: with_storage_of(t.clone(), max(0, t.numel() * t.element_size() - r.choice([1, 4, 64]))),
    "longer": lambda t, r: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "shorter": lambda t, r: t.reshape(-1)[1:].clone(),
    "flat": lambda t, r: t.reshape(-1).clone(),
    "one more dimension": lambda t, r: t.clone()[None],
    "scalar": lambda t, r: torch.zeros((), dtype=t.dtype),
    "empty": lambda t, r: t.new_empty(0),
    "one column": lambda t, r: t[..., :1].clone(),
    "wider": lambda t, r: torch.cat([t, t], -1),
    "dtype": lambda t, r: t.to(r.choice(DTYPES)),
    "reinterpreted": lambda t, r: t.clone().view(r.choice(DTYPES)),
    "meta": lambda t, r: t.to("meta"),
    "fake": lambda t, r: FakeTensorMode().from_tensor(t.clone()),
    "sparse": lambda t, r: t.to_sparse(),
    "compressed": lambda t, r: t.to_sparse_csr(),
    "mkldnn": lambda t, r: t.to_mkldnn(),
    "quantized": lambda t, r: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t, r: torch.nested.nested_tensor([t, t]),
    "functional": lambda t, r: torch._to_functional_tensor(t),
    "conjugated": lambda t, r: torch.complex(t.float(), t.float()).conj(),
    "imaginary part": lambda t, r: torch.complex(t.float(), t.float()).conj().imag,
    "inference": lambda t, r: inference_copy(t),
    "list": lambda t, r: t.tolist(),
    "none": lambda t, r: None,
    "word": lambda t, r: "exp_avg",
    "number": lambda t, r: 1.5,
}
STEP_COUNTS: list[Callable[[], Any]] = [
    lambda: 0, lambda: 1, lambda: 10, lambda: 2**53 - 2, lambda: 2**53 - 1, lambda: 2**53, lambda: 2**63, lambda: -1,
    lambda: 2.0, lambda: 2.5, lambda: math.nan, lambda: math.inf, lambda: True, lambda: None, lambda: "3", lambda: [3],
    lambda: torch.tensor(3.0), lambda: torch.tensor(3), lambda: torch.tensor([3.0]), lambda: torch.tensor([3.0, 4.0]),
    lambda: torch.tensor(math.nan), lambda: torch.tensor(3.0, dtype=torch.float64),
    lambda: torch.tensor(3.0).to("meta"), lambda: torch.tensor(3.0).share_memory_(),
    lambda: torch.tensor(3, dtype=torch.int16).share_memory_(),
    lambda: torch.tensor(3 + 1j), lambda: torch._efficientzerotensor((), dtype=torch.float32),
    lambda: torch._neg_view(torch.tensor(-3.0)), lambda: with_storage_of(torch.tensor(3.0), 0),
    lambda: torch.zeros(()).as_subclass(Subclass),
]  # fmt: skip
SETTINGS: dict[str, list[Callable[[], Any]]] = {
    "lr": [lambda: 1e-3, lambda: 0.0, lambda: torch.tensor(0.01), lambda: "1e-3", lambda: None, lambda: math.nan,
           lambda: torch.ones(2), lambda: torch.tensor(1.0).to("meta"), lambda: with_storage_of(torch.tensor(1.0), 0)],
    "betas": [lambda: (0.9, 0.99), lambda: (0.0, 0.0), lambda: [0.5, 0.5], lambda: (1.0, 0.9), lambda: 0.9,
              lambda: "ab", lambda: (0.9, None)],
    "eps": [lambda: 1e-8, lambda: 0.0, lambda: "x", lambda: torch.tensor(1e-6)],
    "weight_decay": [lambda: 0.0, lambda: 0.1, lambda: None, lambda: torch.tensor(0.1)],
    "amsgrad": [lambda: True, lambda: False],
    "maximize": [lambda: True, lambda: False],
    "bias_correction": [lambda: True, lambda: False],
    "stochastic_rounding_seed": [lambda: 7, lambda: "seven", lambda: None],
    "state_dtype": [lambda: torch.float32, lambda: "8bit"],
}  # fmt: skip


def inference_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def surroundings(kind: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a call is made."""
    if kind == "fake":
        return FakeTensorMode(allow_non_fake_inputs=True)
    if kind == "inference":
        return torch.inference_mode()
    if kind == "meta":
        return torch.device("meta")
    return contextlib.nullcontext()


@functools.cache
def mesh_of_one() -> Any:
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return torch.distributed.init_device_mesh("cpu", (1,))


def check_what_cpp_takes(optimizer: Any) -> int:
    """Raises Finding if the op's own reader accepts what Python's checks refuse; returns how many params it accepts."""
    taken = 0
    for i, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            continue
        where = f"param group {i}"
        try:
            settings = optimizer._step_settings(group, where)
            table = optimizer._backends[HOST]._table_of_params(settings, group["params"], optimizer.state)
        except IN_WORDS:
            continue
        if table is None:
            continue
        try:
            batches = batches_of(optimizer, GroupToStep(where, group, settings))
        except IN_WORDS as error:
            raise Finding(f"C++ takes what Python refuses: {error!r}") from error
        for _, batch in batches:
            taken += len(batch.params)
            try:
                check_params_and_grads(batch)
                check_states(batch)
            except (*IN_WORDS, KeyError) as error:
                raise Finding(f"C++ takes what Python refuses: {error!r}") from error
    return taken


class Session:
    """One optimizer and the calls made to it, all drawn from the seed."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed, self.random = seed, random.Random(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        self.log: list[str] = []
        self.calls = 0
        self._trace = trace
        self.arena = Arena(1 << 17)
        self._class = self.random.choice(CLASSES)
        self._large = self.random.random() < 0.25
        self._mesh = mesh_of_one() if self.random.random() < 0.15 else None
        self._is_clean = True  # nothing was done that a step may refuse
        self._has_failed_in_backward = False
        self._is_aliased = False  # tensors share memory, so threads race and the bits are undefined
        self._arguments = self._drawn_arguments()
        self.params = [self._new_param() for _ in range(self.random.randint(1, 4))]
        cut = self.random.randint(0, len(self.params) - 1)
        groups = [{"params": params, **self._own_settings()} for params in (self.params[:cut], self.params[cut:])]
        self.optimizer = self.made(groups)
        over = " over a mesh" if self._mesh is not None else ""
        self.say(
            f"{self._class.__name__}({self._arguments}){over} on {[(p.dtype, tuple(p.shape)) for p in self.params]}"
        )
        self._new_grads()

    def say(self, line: str) -> None:
        self.log.append(line)
        if self._trace:
            self._trace(line)

    def made(self, groups: Any) -> Any:
        return self._class(groups, **self._arguments)

    def _drawn_arguments(self) -> dict[str, Any]:
        r = self.random
        arguments: dict[str, Any] = {"lr": 0.01}
        if r.random() < 0.5:
            arguments["state_dtype"] = r.choice(["8bit", torch.bfloat16, torch.float32])
        if r.random() < 0.4:
            arguments["master_weight_bits"] = r.choice([24, 32])
        elif (
            issubclass(self._class, FusedAdam)
            and r.random() < 0.3
            and arguments.get("state_dtype") in (None, torch.float32)
        ):
            arguments["master_weights"] = True
        if r.random() < 0.3 and arguments.get("master_weight_bits") != 32 and "master_weights" not in arguments:
            arguments["stochastic_rounding"] = True
        arguments["amsgrad"] = r.random() < 0.3
        arguments["weight_decay"] = r.choice([0.0, 0.1])
        return arguments

    def _own_settings(self) -> dict[str, Any]:
        if self.random.random() < 0.8 or "master_weights" in self._arguments:
            return {}
        return {"state_dtype": self.random.choice(["8bit", torch.float32, torch.bfloat16])}

    def _new_param(self) -> Tensor:
        r = self.random
        shape: tuple[int, ...] = r.choice([(), (0,), (1,), (3,), (17,), (64,), (5, 7), (3, 1, 4), (256,)])
        if self._large and r.random() < 0.6:
            shape = r.choice([(4096,), (4097,), (65, 64), (4353,)])
        values = torch.randn(shape).to(r.choice(FLOATS))
        if len(shape) > 1 and r.random() < 0.3:
            values = values.mT.contiguous().mT
        return nn.Parameter(self._placed(self.arena.place(values) if r.random() < 0.7 else values))

    def _placed(self, values: Any) -> Any:
        """The tensor; in a session on a mesh, a DTensor that holds all of it."""
        if self._mesh is None or not isinstance(values, Tensor):
            return values
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placement = Shard(0) if values.dim() else Replicate()
        return DTensor.from_local(values, self._mesh, [placement], run_check=False)

    def _new_grads(self) -> None:
        for param in self.params:
            param.grad_dtype = None
            if param.grad is not None and self.random.random() < 0.5:
                continue
            grad = torch.randn(param.shape).to(self.random.choice([param.dtype, torch.float32]))
            param.grad = self._placed(self.arena.place(grad) if self.random.random() < 0.3 else grad)

    # Mutations of tensors, states and settings --------------------------------------------------------------------

    def mutate(self) -> None:
        """Applies one mutation. Torch itself refuses many of them; the next call then sees the old tensor."""
        action = self.random.choice(
            [self._change_grad, self._change_grad, self._change_state, self._change_state, self._change_param,
             self._change_step, self._change_setting, self._move_states, self._drop, self._alias, self._change_scale]
        )  # fmt: skip
        with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, KeyError):
            action()

    def _kind(self) -> tuple[str, Callable[[Tensor, random.Random], Any]]:
        kinds = HARMLESS if self.random.random() < 0.5 else HARMFUL
        name = self.random.choice(list(kinds))
        if name not in ("freed", "shortened") and self.random.random() < 0.05:
            return f"{name}, freed", lambda t, r: freed_if_plain(kinds[name](t, r), r)
        return name, kinds[name]

    def _change_grad(self) -> None:
        param = self.random.choice(self.params)
        name, change = self._kind()
        self.say(f"the grad of param {self._index(param)} becomes: {name}")
        if param.grad is None:
            param.grad = self._placed(torch.randn(param.shape).to(param.dtype))
        grad = self._placed(change(readable(param.grad), self.random))
        self._is_clean &= name in HARMLESS and self._mesh is None
        try:
            param.grad = grad
        except (RuntimeError, TypeError):
            if not param.grad.is_quantized:  # torch itself crashes with such data
                param.grad.data = grad

    def _change_param(self) -> None:
        param = self.random.choice(self.params)
        name, change = self._kind()
        if self._mesh is not None or name.startswith(
            "functional"
        ):  # torch crashes if such a param's data is replaced again
            return
        self.say(f"the data of param {self._index(param)} becomes: {name}")
        values = change(readable(param), self.random)
        self._is_clean = False
        param.data = values

    def _change_state(self) -> None:
        param = self.random.choice(self.params)
        state = self.optimizer.state.get(param)
        if state:
            key = self.random.choice([*state, *STATE_KEYS])
            if key == "step" and self._class in EMULATED:
                return
            value = state.get(key, param.detach())
            name, change = self._kind()
            self.say(f"{key} of param {self._index(param)} becomes: {name}")
            value = change(readable(value), self.random)
            self._is_clean = False
            state[key] = self._placed(value) if key != "block_scales" else value

    def _step_count(self) -> Any:
        """A random step count. Counts on a device are not validated, and the two paths may differ: plain ones only."""
        return self.random.choice(STEP_COUNTS[:3] if self._class in EMULATED else STEP_COUNTS)()

    def _change_step(self) -> None:
        param = self.random.choice(self.params)
        state = self.optimizer.state.get(param)
        if state:
            count = self._step_count()
            self.say(f"step of param {self._index(param)} becomes {describe(count)}")
            self._is_clean = False
            state["step"] = count

    def _change_setting(self) -> None:
        name = self.random.choice(list(SETTINGS))
        value = self.random.choice(SETTINGS[name])()
        group = self.random.choice(self.optimizer.param_groups)
        self.say(f"{name} of a group becomes {describe(value)}")
        self._is_clean = False
        group[name] = value

    def _move_states(self) -> None:
        """Moves the states into the arena, which detects writes beyond their ends."""
        self.say("states move into the arena")
        for state in self.optimizer.state.values():
            for key in STATE_KEYS:
                if type(state.get(key)) is Tensor:
                    state[key] = self.arena.place(readable(state[key]))

    def _drop(self) -> None:
        param = self.random.choice(self.params)
        state = self.optimizer.state.get(param)
        if not state or self.random.random() < 0.3:
            self.say(f"the grad of param {self._index(param)} is dropped")
            param.grad = None
            return
        key = self.random.choice(list(state))
        self.say(f"{key} of param {self._index(param)} is dropped")
        self._is_clean = False
        del state[key]

    def _alias(self) -> None:
        """Makes tensors of two params, or of one, share memory."""
        one, other = self.random.choice(self.params), self.random.choice(self.params)
        kinds = ["grads", "grad and param", "params", "states"]
        what = self.random.choice(kinds if self._mesh is None else kinds[:1])
        self.say(f"{what} of params {self._index(one)} and {self._index(other)} share memory")
        if what == "grads":
            one.grad = other.grad
            fits = one.grad is None or (one.grad.shape == one.shape and one.grad.dtype in (one.dtype, torch.float32))
            self._is_clean &= fits
            return
        self._is_clean, self._is_aliased = False, True
        if what == "grad and param":
            one.grad = other.detach()
        elif what == "params":
            one.data = other.data
        else:
            key = self.random.choice(STATE_KEYS)
            self.optimizer.state[one][key] = self.optimizer.state[other][self.random.choice(STATE_KEYS)]

    def _change_scale(self) -> None:
        name = self.random.choice(["grad_scale", "found_inf"])
        makers: list[Callable[[], Any]] = [lambda: None, lambda: torch.tensor(2.0), lambda: torch.tensor(0.0),
                                           lambda: torch.zeros(2), lambda: "x", lambda: torch.tensor(1.0).to("meta"),
                                           lambda: with_storage_of(torch.tensor(2.0), 0)]  # fmt: skip
        value = self.random.choice(makers)()
        self.say(f"{name} becomes {describe(value)}")
        self._is_clean &= value is None
        setattr(self.optimizer, name, value)

    def _index(self, param: Tensor) -> int:
        return next(i for i, other in enumerate(self.params) if other is param)

    # Calls --------------------------------------------------------------------------------------------------------

    def run(self, calls: int) -> None:
        """Mutates and calls until `calls` are made. Raises Finding at the first violation, and keeps the log."""
        methods = [self._step] * 10 + [
            self._step_async, self._clip, self._zero_grad, self._save, self._load, self._load_other, self._fp32_params,
            self._load_fp32_params, self._add_group, self._subgroup, self._in_backward, self._construct,
        ]  # fmt: skip
        while self.calls < calls:
            for _ in range(self.random.choice([0, 0, 1, 1, 2])):
                self.mutate()
            self.random.choice(methods)()
            self.arena.check()
            if not self._is_clean and self.random.random() < 0.5:
                try:
                    self._repair()
                except (RuntimeError, TypeError):  # torch does not let such a param's data be replaced
                    return
            elif self.random.random() < 0.3:
                with contextlib.suppress(RuntimeError, TypeError):
                    self._new_grads()

    def _repair(self) -> None:
        """Replaces everything with plain tensors, and drops all states."""
        self.say("all is put right")
        for param in self.params:
            param.grad = None
            if self._mesh is None:
                param.data = self._new_param().data
        self.optimizer.state.clear()
        for name in ("grad_scale", "found_inf"):
            setattr(self.optimizer, name, None)
        for group, settings in zip(self.optimizer.param_groups, self._settings_at_first(), strict=True):
            group.update(settings)
        self._new_grads()
        self._is_clean, self._is_aliased = True, False

    def _settings_at_first(self) -> Iterator[dict[str, Any]]:
        for group in self.optimizer.param_groups:
            before = self.optimizer._group_precisions.settings_of(group)
            for name in ("state_dtype",):
                if name not in before:
                    group.pop(name, None)
            names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "bias_correction")
            yield {**{name: self.optimizer.defaults[name] for name in names}, "stochastic_rounding_seed": 0, **before}

    def call(self, what: str, function: Callable[[], Any], all_or_nothing: bool = True, must: bool = False) -> bool:
        """Makes a call; returns whether it succeeded. Raises Finding if it raised a wrong error or wrote before it."""
        self.calls += 1
        self.say(what)
        before = Snapshot(self.optimizer, self.params) if all_or_nothing else None
        try:
            function()
        except IN_WORDS as error:
            self.log[-1] += f" -> {type(error).__name__}: {str(error)[:160]}"
            if len(str(error)) < 10 or "INTERNAL ASSERT" in str(error):
                raise Finding(f"{what} raised without words: {error!r}") from error
            if must:
                raise Finding(f"{what} raised, although nothing is wrong: {error!r}") from error
            if before:
                before.check_unchanged(what)
            return False
        except Exception as error:
            raise Finding(f"{what} raised {error!r}, which says nothing to a user") from error
        return True

    def _lowp_out(self) -> list[Tensor | None] | None:
        if self.random.random() < 0.85:
            return None
        outs: list[Tensor | None] = []
        for param in self.params:
            out = torch.empty_like(readable(param), dtype=self.random.choice(FLOATS[1:]))
            outs.append(self._placed(self.random.choice([None, self.arena.place(out), out])))
        return outs

    def _step(self) -> None:
        arguments = {"zero_grads": True} if self.random.random() < 0.2 else {}
        outs = None
        with contextlib.suppress(Unreadable, RuntimeError):
            outs = self._lowp_out()
        kind = self.random.choice(["plain"] * 30 + ["fake", "inference", "meta"])
        check_what_cpp_takes(self.optimizer)
        reference = self._reference()
        keywords = {**arguments, **({"lowp_out": outs} if outs is not None else {})}

        def step() -> None:
            with surroundings(kind):
                self.optimizer.step(**keywords)

        what = f"step({', '.join(keywords)}){'' if kind == 'plain' else ' under ' + kind}"
        returned = self.call(what, step, must=self._is_clean and kind == "plain" and outs is None)
        if returned and reference:
            reference.check(arguments, outs)

    def _reference(self) -> Reference | None:
        if self._is_aliased:
            return None
        try:
            return Reference(self)
        except IN_WORDS:  # the constructor refuses these settings: step() must refuse them too
            return None

    def _step_async(self) -> None:
        reference = self._reference()
        waiter = self.random.choice(["wait", "state_dict", "fp32_params"])

        def step() -> None:
            handle = self.optimizer.step_async(threads=self.random.choice([None, 1, 2]))
            if waiter != "wait":
                getattr(self.optimizer, waiter)()
            handle.wait()

        if waiter == "wait":
            if self.call("step_async().wait()", step, must=self._is_clean) and reference:
                reference.check({}, None)
        else:  # the other call may raise for its own reasons, after the step
            self.call(f"step_async(), {waiter}()", step, all_or_nothing=False)
            with contextlib.suppress(*IN_WORDS):
                self.optimizer._settle()

    def _clip(self) -> None:
        norm_type = self.random.choice([2.0, 1.0, math.inf, 3.0])
        max_norm = self.random.choice([0.1, 1.0, 1e9])
        self.call(
            f"clip_grad_norm_({max_norm}, {norm_type})", lambda: self.optimizer.clip_grad_norm_(max_norm, norm_type)
        )

    def _zero_grad(self) -> None:
        to_none = self.random.random() < 0.5
        # Torch's own zero_() raises for some grads, after others have been zeroed.
        self.call(f"zero_grad({to_none})", lambda: self.optimizer.zero_grad(to_none), all_or_nothing=False)
        with contextlib.suppress(RuntimeError, TypeError):
            self._new_grads()

    def _save(self) -> None:
        dequantize = self.random.random() < 0.5
        reference = self._reference() if dequantize else None
        returned = self.call(f"state_dict({dequantize})", lambda: self.optimizer.state_dict(dequantize))
        if returned and reference:
            reference.check_read("state_dict(dequantize=True)", read_averages)

    def _load(self) -> None:
        """Loads the optimizer's own state dict, intact or mutilated."""
        try:
            saved = self.optimizer.state_dict(self.random.random() < 0.3)
            if any(is_freed(held(value)) for state in saved["state"].values() for value in state.values()):
                return  # torch crashes when it copies a DTensor without memory
            saved = copy.deepcopy(saved)
        except Exception:
            return
        is_whole = self.random.random() < 0.4
        if not is_whole:
            with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, KeyError):
                self._mutilate(saved)
        was_clean, self._is_clean = self._is_clean, self._is_clean and is_whole
        self.call(f"load_state_dict({'own' if is_whole else 'mutilated'})",
                  lambda: self.optimizer.load_state_dict(saved), must=was_clean and is_whole)  # fmt: skip

    def _mutilate(self, saved: dict[str, Any]) -> None:
        if self.random.random() < 0.3:
            group = self.random.choice(saved["param_groups"])
            name = self.random.choice(list(group))
            if self.random.random() < 0.5 or name not in SETTINGS:
                self.say(f"saved setting {name} is dropped")
                del group[name]
            else:
                group[name] = self.random.choice(SETTINGS[name])()
                self.say(f"saved setting {name} becomes {describe(group[name])}")
            return
        state = saved["state"][self.random.choice(list(saved["state"]))]
        key = self.random.choice([*state, "step", *STATE_KEYS])
        if self.random.random() < 0.2:
            self.say(f"saved {key} is dropped")
            state.pop(key, None)
        elif key == "step":
            state[key] = self._step_count()
            self.say(f"saved step becomes {describe(state[key])}")
        else:
            name, change = self._kind()
            self.say(f"saved {key} becomes: {name}")
            value = state[key] if key in state else self.params[0].detach()
            state[key] = change(readable(value), self.random)

    def _load_other(self) -> None:
        """Loads the state of an optimizer with other precision settings."""
        try:
            params = [nn.Parameter(readable(param).clone()) for param in self.params]
            arguments = self._drawn_arguments()
            arguments = {k: v for k, v in arguments.items() if k != "master_weights"}
            sizes = [len(group["params"]) for group in self.optimizer.param_groups]
            groups = [{"params": params[sum(sizes[:i]) : sum(sizes[: i + 1])]} for i in range(len(sizes))]
            other = self.random.choice([DeepSpeedCPUAdam, torch.optim.AdamW])
            source = other(groups, **arguments) if other is DeepSpeedCPUAdam else other(groups, lr=0.01)
            for param in params:
                param.grad = torch.randn_like(param)
            source.step()
        except (Unreadable, *IN_WORDS):
            return
        saved = source.state_dict()
        was_clean = self._is_clean
        self.call(f"load_state_dict() of {other.__name__}({arguments})",
                  lambda: self.optimizer.load_state_dict(saved), must=was_clean and self._mesh is None)  # fmt: skip

    def _fp32_params(self) -> None:
        reference = self._reference()
        if self.call("fp32_params()", self.optimizer.fp32_params) and reference:
            reference.check_read("fp32_params()", lambda optimizer: [{"param": p} for p in optimizer.fp32_params()])

    def _load_fp32_params(self) -> None:
        try:
            values: list[Any] = [self._placed(torch.randn(param.shape)) for param in self.params]
            if self.random.random() < 0.5:
                i = self.random.randrange(len(values))
                name, change = self._kind()
                self.say(f"value {i} to be loaded becomes: {name}")
                values[i] = self._placed(change(readable(values[i]), self.random))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
            return
        self.call("load_fp32_params()", lambda: self.optimizer.load_fp32_params(values))

    def _add_group(self) -> None:
        if len(self.params) > 6 or self._mesh is not None:
            return
        param = self._new_param()
        if self.random.random() < 0.5:
            name, change = self._kind()
            self.say(f"new param becomes: {name}")
            with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
                value = change(param.detach(), self.random)
                param = nn.Parameter(value) if isinstance(value, Tensor) and self.random.random() < 0.5 else value
            self._is_clean = False
        group = {"params": [param], **self._own_settings()}
        if self.call("add_param_group()", lambda: self.optimizer.add_param_group(group)):
            self.params.append(param)

    def _subgroup(self) -> None:
        if self._class is not DeepSpeedCPUAdam or self._mesh is not None:
            return
        keep = self.random.choice(self.params)
        for param in self.params:
            if param is not keep:
                param.grad = None
        key = self.random.randrange(3)
        self.call(f"step_subgroup({key})", lambda: self.optimizer.step_subgroup(key))
        if self.random.random() < 0.3:
            self.call(f"rollback_subgroup({key})", lambda: self.optimizer.rollback_subgroup(key))
        self.optimizer.state.pop(key, None)
        with contextlib.suppress(RuntimeError, TypeError):
            self._new_grads()

    def _in_backward(self) -> None:
        """A backward pass that updates all params. A hook may change the grad of one of them."""
        if not self._is_clean or not all(type(p) is nn.Parameter and p.requires_grad for p in self.params):
            return
        module = nn.ParameterList(self.params)
        for param in self.params:
            param.grad = None
        kinds = {**HARMLESS, **HARMFUL}
        name = self.random.choice([*HARMLESS, "freed", "longer", "dtype", "meta", "sparse", "inference", "conjugated"])
        change = kinds[name]
        hooked = self.random.choice(self.params) if self.random.random() < 0.5 else None
        remove = None
        if hooked is not None and name == "freed":  # torch itself would copy the grad that a hook returns
            remove = hooked.register_post_accumulate_grad_hook(free_its_grad).remove
        elif hooked is not None:
            remove = hooked.register_hook(lambda g: change(g, self.random)).remove

        def backward() -> None:
            handle = step_in_backward(module, self.optimizer)
            try:
                sum((param.float() * 3).sum() for param in self.params).backward()  # type: ignore[union-attr]
            finally:
                handle.remove()
                if remove:
                    remove()

        # A pass is not all or nothing: each param is updated before the next grad is known. A failed pass leaves nodes
        # behind, through which autograd still sees a param as it was then.
        must = remove is None and not self._has_failed_in_backward
        if not self.call(f"step_in_backward(), a grad is {name if remove else 'plain'}", backward,
                         all_or_nothing=False, must=must):  # fmt: skip
            self._has_failed_in_backward = True
        for param in self.params:
            param.grad = None
        with contextlib.suppress(RuntimeError, TypeError):
            self._new_grads()

    def _construct(self) -> None:
        """Constructs another optimizer, with arguments of all kinds."""
        arguments: dict[str, Any] = {}
        for _ in range(self.random.randint(1, 3)):
            name = self.random.choice(list(SETTINGS))
            arguments[name] = self.random.choice(SETTINGS[name])()
        kind = self.random.choice(["plain", "plain", "fake", "inference", "meta"])

        def construct() -> None:
            with surroundings(kind):
                self._class(self.params, **arguments)

        self.call(f"{self._class.__name__}({', '.join(arguments)}) under {kind}", construct)


def describe(value: Any) -> str:
    """A value as the log shows it. A tensor is not read, because its memory may be gone."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}, {value.device}"
    return repr(value)


CALLS_IN_A_SESSION = 40


def run_session(seed: int, calls: int = CALLS_IN_A_SESSION, trace: Callable[[str], None] | None = None) -> int:
    """Runs the session of a seed; returns its number of calls. Raises Finding with the seed and the list of calls."""
    session = None
    try:
        session = Session(seed, trace)
        session.run(calls)
    except Finding as finding:
        lines = session.log if session else []
        raise Finding(f"{finding}\nseed {seed}; the calls:\n  " + "\n  ".join(lines)) from finding
    return session.calls


def run_many(seed: int, minutes: float, calls: int, report: Path | None = None) -> int:
    """Runs sessions until the time or the number of calls is reached; returns the calls made. Raises Finding."""
    end, done = time.monotonic() + 60 * minutes, 0
    while done < calls and time.monotonic() < end:
        if report:
            report.write_text(f"{seed} {done}")
        done += run_session(seed, min(CALLS_IN_A_SESSION, calls - done))
        seed += 1
    if report:
        report.write_text(f"{seed} {done}")
    return done


def add_emulated_cuda() -> None:
    """Adds FusedAdam on the emulated CUDA op, which runs on the CPU, to CLASSES."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import cuda_emulation
    from optimizers import EmulatedFusedAdam

    EmulatedFusedAdam.module = cuda_emulation.load(cuda_emulation.build_op())

    class CapturableFusedAdam(EmulatedFusedAdam):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, capturable=True, **kwargs)

    EMULATED.extend([EmulatedFusedAdam, CapturableFusedAdam])
    CLASSES.extend(EMULATED)


def child(options: argparse.Namespace) -> int:
    """Runs sessions in this process; returns 1 after a finding."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.emulated_cuda:
        add_emulated_cuda()
    gc.freeze()  # step_in_backward() searches all objects for wrappers of modules; there are none so far
    try:
        if options.replay:
            run_session(options.seed, trace=lambda line: print(f"  {line}", flush=True))
        else:
            run_many(options.seed, options.minutes, options.calls, options.report)
    except Finding as finding:
        print(f"FINDING: {finding}", flush=True)
        return 1
    return 0


def main(argv: list[str] | None = None, command: tuple[str, ...] = (sys.executable, __file__)) -> int:
    """Runs sessions in child processes, started with `command`; returns 0 if there was no finding."""
    parser = argparse.ArgumentParser(description="Fuzzes the optimizers through their public API.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="how long to run")
    parser.add_argument("--calls", type=float, default=math.inf, help="how many calls to make")
    parser.add_argument("--seed", type=int, help="replays the one session of this seed, and prints its calls")
    parser.add_argument("--first-seed", type=int, help="the seed of the first session; by default a fresh one")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--emulated-cuda", action="store_true", help="fuzz the CUDA op too, on the host")
    parser.add_argument("--findings", type=int, default=1, help="after how many findings to stop")
    for hidden in ("--child", "--replay"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(options)
    if options.emulated_cuda:
        command = (*command, "--emulated-cuda")
    if options.seed is not None:
        return _run_child(command, "--replay", "--seed", str(options.seed)).returncode
    if options.minutes == options.calls == math.inf:
        options.minutes = 1.0
    seed = options.first_seed if options.first_seed is not None else secrets.randbits(40)
    command = (*command, "--threads", str(options.threads))
    return fuzz(command, seed, options.minutes, options.calls, options.findings)


def _run_child(command: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*command, "--child", *arguments], check=False)


def fuzz(command: tuple[str, ...], seed: int, minutes: float, calls: float, most_findings: int) -> int:
    print(f"first seed: {seed}", flush=True)
    begin, done, findings = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        while findings < most_findings:
            left = minutes - (time.monotonic() - begin) / 60
            if done >= calls or left <= 0:
                break
            result = _run_child(
                command,
                "--seed",
                str(seed),
                "--minutes",
                str(left),
                "--calls",
                str(calls - done),
                "--report",
                str(report),
            )
            last, in_child = map(int, report.read_text().split()) if report.exists() else (seed, 0)
            done, seed = done + in_child, last + 1
            if result.returncode == 0:
                break
            findings += 1
            if result.returncode != 1:
                print(f"FINDING: the process ended with {result.returncode}; seed {last}; the calls:", flush=True)
                _run_child(command, "--replay", "--seed", str(last))
    took = (time.monotonic() - begin) / 60
    print(f"{done} calls in {took:.1f} minutes, {findings} findings", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.exit(main())

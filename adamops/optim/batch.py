"""The work of one step for one param group, as backends take it: tensors that belong together, checked and in order.

Everything a user can get wrong about a tensor is found here, before anything is written.
"""

from __future__ import annotations

import bisect
import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import is_dense, like_param, same_layout
from .memory import check_memory, check_readable, check_writable, in_memory, span_of
from .rule import State, required
from .state.precision import (
    GRAD_DTYPES,
    LOWP_DTYPES,
    MASTER,
    OF_ENGINE,
    PARAM_DTYPES,
    REMAINDER,
    SCALES,
    Master,
    names_of,
    scales_shape,
    tensors_of,
)
from .state.quantization import block_count, format_of
from .state.quantized_states import is_quantized
from .step_settings import StepSettings

MOST_STEPS = 2**53  # kMostSteps in csrc/python/table.h


@dataclasses.dataclass(eq=False, repr=False)
class Batch:
    """Params with what belongs to each. All tensors of a row but scales have the param's shape and memory layout.

    For DTensors everything is local to this process. `owners` are the params as the optimizer has them. `owned_states`
    are the dicts that it keeps for them; step counts are written there.

    `states` holds each param's step count before this step, under ``"step"``, and its state tensors by name.
    `names` are for messages, such as "param group 0, param 3".
    """

    names: list[str]
    settings: StepSettings
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    indices: list[int] = dataclasses.field(default_factory=list)  # positions of the params in their group
    lowp_outs: list[Tensor | None] | None = None  # where the step also writes params in 16 bits
    owners: list[Tensor] = dataclasses.field(default_factory=list)
    owned_states: list[dict[str, Any]] | None = None  # None: the dicts in `states`

    @property
    def counted_states(self) -> list[dict[str, Any]]:
        """The dicts that step counts are written to."""
        return self.states if self.owned_states is None else self.owned_states

    @property
    def has_shards(self) -> bool:
        """Whether there are DTensors among the params."""
        return any(owner is not param for owner, param in zip(self.owners, self.params, strict=False))

    @property
    def has_all_defaults(self) -> bool:
        """Whether the params and states alone describe the batch: the params are whole, have these grads, and are the
        first of their group, and neither copies nor step counts are written elsewhere.
        """
        return (
            self.lowp_outs is None
            and not self.has_shards
            and all(param.grad is grad for param, grad in zip(self.params, self.grads, strict=True))
            and self.indices == list(range(len(self.indices)))
            and all(owned is state for owned, state in zip(self.counted_states, self.states, strict=True))
        )

    def state_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """The names of the tensors that a param's state must have, with the dtypes of new ones."""
        return self.settings.precision.state_dtypes(param, self.settings.states)

    def needed_of(self, state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """What a step uses of a param's state. It leaves other entries alone, such as those of former settings."""
        names = {"step", SCALES, *self.state_dtypes(param)}
        if MASTER in names and MASTER not in state:
            names.add(REMAINDER)  # which initializes the master weights
        return {name: value for name, value in state.items() if name in names}

    @property
    def steps(self) -> list[int]:
        """The step counts, this step included."""
        return [int(state["step"]) + 1 for state in self.states]  # frameworks may put tensors there

    def column(self, key: str) -> list[Tensor]:
        """The tensors of one name in the states."""
        return [state[key] for state in self.states]

    @property
    def masters(self) -> list[Tensor | None]:
        """The master weights or remainders of 16-bit params; None for params without either."""
        kinds = [self.settings.precision.master_of(param) for param in self.params]
        return [state[kind.key] if kind else None for kind, state in zip(kinds, self.states, strict=True)]

    @property
    def scales(self) -> list[Tensor | None]:
        """The scales of quantized states; None for other states."""
        states = self.settings.rule.states
        return [state.get(SCALES) if is_quantized(state, states) else None for state in self.states]

    def append(self, index: int, name: str, param: Tensor, grad: Tensor, state: dict[str, Any], owner: Tensor) -> None:
        """Adds a param with what belongs to it."""
        self.owners.append(owner)
        self.indices.append(index)
        self.names.append(name)
        self.params.append(param)
        self.grads.append(grad)
        self.states.append(state)

    @property
    def counts_in_tensors(self) -> bool:
        """Whether any step count is in memory shared with other processes, and so must be written in place."""
        return any(isinstance(s["step"], Tensor) and is_shared_count(s["step"]) for s in self.states)

    def count_step(self, steps: list[int]) -> None:
        """Writes the step counts, this step included, into the states."""
        for state, step in zip(self.counted_states, steps, strict=True):
            count = state["step"]
            if isinstance(count, Tensor) and is_shared_count(count):
                count.fill_(step)
            else:
                state["step"] = step

    def written(self) -> list[Tensor]:
        """The tensors that the step writes in place."""
        columns: list[Sequence[Tensor | None]] = [self.params, self.masters, self.scales]
        columns += [self.column(state.name) for state in self.settings.states]
        columns += [self.grads] if self.settings.zero_grads else []
        columns += [self.lowp_outs] if self.lowp_outs else []
        return [tensor for column in columns for tensor in column if tensor is not None]

    def borrowed(self) -> list[Tensor]:
        """The tensors that the step reads or writes."""
        return [*self.written(), *self.grads]


def is_shared_count(step: Tensor) -> bool:
    """Whether a step count is in memory shared between processes. It is updated there, so that the others see it."""
    return step.device.type == "cpu" and step.is_shared()


def check_params_and_grads(batch: Batch) -> None:
    """Raises for the first param or grad that cannot be used. A grad with another memory layout is copied.

    Raises
    ------
    TypeError
        For a dtype or layout that is not supported.
    ValueError
        For a device, shape or memory format that is not supported.
    """
    for i, name in enumerate(batch.names):
        batch.grads[i] = _checked_grad(batch.params[i], batch.grads[i], name)


def check_param(param: Tensor, name: str) -> None:
    """Raises for a param that cannot be updated, whatever its grad."""
    described = _described(param, name)
    if param.layout != torch.strided:
        raise TypeError(f"{described} has layout {param.layout}; only dense (strided) params are supported")
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{described}: its dtype is not supported; use float32, bfloat16 or float16")
    check_memory(param, described)
    if not is_dense(param):
        raise ValueError(
            f"{described} has strides {param.stride()}, which overlap or leave gaps; use a param that owns its memory, "
            "such as param.detach().clone()"
        )


def check_on_cpu(param: Tensor, name: str) -> None:
    """Raises ValueError for a param that is not on the CPU."""
    if param.device.type != "cpu":
        described = _described(param, name)
        raise ValueError(f"{described} is not on the CPU; move the params to the CPU, as ZeRO-Offload does")


def _checked_grad(param: Tensor, grad: Tensor, name: str) -> Tensor:
    check_param(param, name)
    described = _described(param, name)
    if grad.layout != torch.strided:
        raise TypeError(
            f"{described} has a grad of layout {grad.layout}; sparse grads are not supported: "
            "use torch.optim.SparseAdam, or an Embedding with sparse=False"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{described} has a grad of shape {tuple(grad.shape)}; the shapes must be equal")
    if grad.device != param.device:
        raise ValueError(f"{described} has a grad on {grad.device}; copy it to the param's device")
    allowed = GRAD_DTYPES if param.dtype == torch.float32 else (param.dtype, torch.float32)
    if grad.dtype not in allowed:
        raise TypeError(f"{described} has a grad of {grad.dtype}; use {_one_of(allowed)}")
    return like_param(in_memory(grad, f"{described}: its grad"), param)


def _described(param: Tensor, name: str) -> str:
    """The start of every message: the param's name, shape, dtype and device."""
    return f"{name} (shape {tuple(param.shape)}, {param.dtype}, {param.device})"


def _one_of(dtypes: Sequence[torch.dtype]) -> str:
    *others, last = map(str, dtypes)
    return f"{', '.join(others)} or {last}"


def check_no_overlap(params: Mapping[str, Tensor]) -> None:
    """Raises ValueError if two params, or other tensors, given by name, share memory: the threads of a step would race
    on it.
    """
    spans = sorted(
        (str(param.device), *span, name) for name, param in params.items() for span in [span_of(param)] if span[0]
    )
    for (device, _, end, first), (other_device, start, _, second) in zip(spans, spans[1:], strict=False):
        if device == other_device and start < end:
            raise ValueError(f"{first} and {second} share memory; pass each piece of memory once, as one param")


def check_grads_apart(
    grads: Sequence[tuple[str, Tensor, tuple[Tensor | None, ...]]], written: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if a grad shares memory with a tensor that a step writes. These are apart from one another.

    Each grad comes with the name of its param and the tensors that it may share memory with, element by element: they
    are written after it is read.
    """
    spans = sorted((str(t.device), *span_of(t), name) for name, t in written.items() if span_of(t)[0])
    for name, grad, own in grads:
        begin, end = span_of(grad)
        place = bisect.bisect_right(spans, (str(grad.device), begin)) - 1
        for device, other_begin, other_end, other in spans[max(place, 0) :]:
            if (device, other_begin) >= (str(grad.device), end):
                break
            if device != str(grad.device) or other_end <= begin:
                continue
            tensor = written[other]
            is_own = any(tensor is one for one in own) and tensor.element_size() == grad.element_size()
            if not (is_own and other_begin == begin):
                raise ValueError(f"the grad of {name} and {other} share memory; use a copy of the grad")


def check_lowp_out(out: Tensor, param: Tensor, name: str) -> None:
    """Raises TypeError or ValueError if `out` cannot take a 16-bit copy of the param, element by element."""
    described = _described(param, name)
    if not isinstance(out, Tensor) or out.dtype not in LOWP_DTYPES:
        found = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{described} has a lowp_out of {found}; use a tensor of {_one_of(LOWP_DTYPES)}, or None")
    if out.shape != param.shape or out.device != param.device:
        raise ValueError(
            f"{described} has a lowp_out of shape {tuple(out.shape)} on {out.device}; both must be the param's"
        )
    check_memory(out, f"{described}: its lowp_out")
    if not is_dense(out) or not same_layout(out, param):
        raise ValueError(f"{described} has strides {param.stride()}, its lowp_out {out.stride()}; they must be equal")


def check_states(batch: Batch) -> None:
    """Raises for the first state that does not fit its param. A state with another memory layout is an error.

    Raises
    ------
    TypeError, ValueError
        As check_state().
    """
    settings = batch.settings
    states, first = settings.rule.states, next(iter(names_of(settings.states)), None)
    for name, param, state in zip(batch.names, batch.params, batch.states, strict=True):
        check_state(batch.needed_of(state, param), param, states, name)
        check_step(state["step"], name)
        if isinstance(state["step"], Tensor) and is_shared_count(state["step"]):
            check_counts_on(state["step"], name)
        for key, dtype in batch.state_dtypes(param).items():
            if key != SCALES:
                _check_state_for_kernel(state[key], key, dtype, param, name)
        if is_quantized(state, states):
            _check_scales_for_kernel(state[SCALES], param, settings, name)
        if first and settings.precision.master_of(param) is Master.FP32 and state[first].dtype != torch.float32:
            raise TypeError(
                f"{_described(param, name)} has a float32 {MASTER!r} and states of {state[first].dtype}; "
                "master_weights=True goes with float32 states"
            )


def _check_state_for_kernel(value: Tensor, key: str, dtype: torch.dtype, param: Tensor, name: str) -> None:
    """Raises for a tensor that check_state() accepts but kernels do not, as they assume its dtype or memory layout."""
    if key in (MASTER, REMAINDER) and value.dtype != dtype:
        raise TypeError(
            f"{_described(param, name)} has state {key!r} of {value.dtype}, and this optimizer keeps {dtype}; "
            "load_state_dict() converts it"
        )
    if not is_dense(value) or not same_layout(value, param):
        raise ValueError(
            f"{name} has strides {param.stride()}, its state {key!r} has {value.stride()}; "
            "load_state_dict() brings states into the layout of their params"
        )


def _check_scales_for_kernel(scales: Tensor, param: Tensor, settings: StepSettings, name: str) -> None:
    """Raises for scales that kernels would access out of bounds. There may be more columns than a step needs."""
    blocks, columns = scales_shape(param, settings.states)
    most = len(settings.rule.states)
    if scales.dim() != 2 or scales.shape[0] != blocks or not columns <= scales.shape[1] <= most:
        raise ValueError(
            f"{_described(param, name)} has {SCALES!r} of shape {tuple(scales.shape)} beside its 8bit states; "
            f"expected {(blocks, columns)}"
        )
    if not scales.is_contiguous():
        raise ValueError(f"{name} has {SCALES!r} of strides {scales.stride()}; they must be contiguous")


def check_step(step: Any, name: str) -> None:
    """Raises if `step` is not a step count. One on a GPU is not read, because that would wait for the GPU."""
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise ValueError(f"{name} has a step count of shape {tuple(step.shape)}; expected one number")
        if step.device.type == "meta":
            raise ValueError(f"{name} has a step count on the device meta, which has no value")
        if step.device.type != "cpu":
            return
        check_readable(step, f"{name}: its step count")
    elif not isinstance(step, numbers.Real):
        raise TypeError(f"{name} has a {type(step).__name__} as step count; expected an int")
    try:
        count = int(step)
        is_integer = count == step
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # NaN, infinity, a tensor without a value
        raise ValueError(f"{name} has the step count {step}, which is not an integer ({error})") from error
    if not is_integer:
        raise ValueError(f"{name} has the step count {step}, which is not an integer")
    if not 0 <= count < MOST_STEPS:
        raise ValueError(f"{name} has the step count {count}; expected 0 or more, and less than {MOST_STEPS}")


def check_counts_on(step: Tensor, name: str) -> None:
    """Raises for a step count that cannot be written, or whose dtype cannot hold the next count."""
    check_writable(step, f"{name}: its step count in shared memory")
    count = int(step) + 1
    if step.dtype == torch.bool:
        raise TypeError(f"{name} has a step count of {step.dtype}; expected one of numbers")
    try:
        fits = int(torch.full((), count, dtype=step.dtype, device="cpu")) == count
    except RuntimeError:  # how torch reports overflow
        fits = False
    if not fits:
        raise ValueError(f"{name} has a step count of {step.dtype} in shared memory, which cannot be {count}")


def check_state(
    state: Mapping[str, Any], param: Tensor, states: tuple[State, ...], name: str, elsewhere: bool = False
) -> None:
    """Raises if a tensor in the state of a param does not fit it. `states` are all of the rule's.

    With `elsewhere`, it may be on another device, but not on meta, where it has no values.
    """
    described = _described(param, name)
    quantized = is_quantized(state, states)
    formats = {kind.name: format_of(kind).dtype for kind in states}
    dtypes = set()
    for key in tensors_of(states):
        if key not in state:
            continue
        value = state[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise TypeError(f"{described} has a {type(value).__name__} as state {key!r}; expected a dense tensor")
        check_memory(value, f"{described}: its state {key!r}")
        if key != SCALES and value.shape != param.shape:
            raise ValueError(
                f"{described} has state {key!r} of shape {tuple(value.shape)}; it belongs to another model or shard"
            )
        allowed = _ALLOWED.get(key) or ((formats[key],) if quantized else PARAM_DTYPES)
        if value.dtype not in allowed:
            raise TypeError(f"{described} has state {key!r} of {value.dtype}; use {' or '.join(map(str, allowed))}")
        if value.device != param.device and not (elsewhere and value.device.type != "meta"):
            raise ValueError(f"{described} has state {key!r} on {value.device}")
        if key not in OF_ENGINE and not quantized:
            dtypes.add(value.dtype)
    check_scales(state, param, states, described)
    if len(dtypes) > 1:
        raise TypeError(f"{described} has states of different dtypes: {', '.join(sorted(map(str, dtypes)))}")


_ALLOWED = {MASTER: (torch.float32,), REMAINDER: (torch.int8, torch.int16), SCALES: (torch.bfloat16,)}


def check_scales(state: Mapping[str, Any], param: Tensor, states: tuple[State, ...], described: str) -> None:
    """Raises ValueError for 8-bit states without their scales, and for scales whose states have become floats."""
    quantized = is_quantized(state, states)
    if SCALES in state and not quantized and any(key in state for key in names_of(states)):
        raise ValueError(
            f"{described} has float states beside {SCALES!r}, which are of 8-bit states (state_dtype='8bit'): "
            "quantized states were treated as plain numbers, as by torch.cat; state_dict(dequantize=True) gives floats"
        )
    if not quantized:
        return
    scales = state.get(SCALES)
    fits = isinstance(scales, Tensor) and scales.dim() == 2 and len(scales) == block_count(param.numel())
    if not fits or scales is None or not len(required(states)) <= scales.shape[1] <= len(states):
        raise ValueError(
            f"{described} has 8-bit states without the {SCALES!r} that belong to them (state_dtype='8bit'): expected "
            f"{block_count(param.numel())} rows, one for each quantization block, and a column for each state"
        )


def check_nothing_lost(state: Mapping[str, Any], states: tuple[State, ...], name: str) -> None:
    """Raises ValueError for a state that has lost a tensor, which would silently start over.

    It may lack all of the rule's states before the first step, since master weights may be loaded before that.
    """
    names = names_of(states)
    held = [key for key in ("step", *names) if key in state]
    step = state.get("step", 0)
    check_step(step, name)
    unknown = isinstance(step, Tensor) and step.device.type != "cpu"  # reading it would wait for the GPU
    if not any(key in state for key in names) and (unknown or step == 0):
        return
    missing = [key for key in ("step", *required(states)) if key not in state]
    if missing:
        raise ValueError(
            f"{name} has no {', '.join(map(repr, missing))} in its state but {', '.join(map(repr, held))}: it has been "
            "lost; load a checkpoint, or delete the whole state of the param to start from zero"
        )
    if is_quantized(state, states) and SCALES not in state:
        raise ValueError(f"{name} has 8-bit states (state_dtype='8bit') without the {SCALES!r} that belong to them")

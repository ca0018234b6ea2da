"""Optimizers whose states, master weights and updates are on the host, for params on an accelerator.

An inner optimizer of adamops steps on copies of the params in pinned memory. Grads arrive there as the backward pass
makes them, and the updated copies go back. Must not know any one rule, nor any one accelerator.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ops.adam import DeepSpeedCPUAdam
from ..optim import dtensor
from ..optim.backward import register_hook
from ..optim.optimizer import RuleOptimizer
from .blocks import before_reading, params_by_block
from .chunks import Chunk, Entry, chunks_of
from .device import CudaDevice, Device
from .pipeline import Pipeline

_MEGABYTE = 2**20
_GRAD_SCALER = "torch.amp.grad_scaler"


class OffloadedOptimizer(Optimizer):
    """Steps an optimizer of adamops on the host, for params on an accelerator.

    The backward pass sends each grad to the host as soon as it is there, and frees it on the device: afterwards
    ``param.grad`` is None. step() updates the params chunk by chunk, about in the order in which their grads arrived;
    each chunk goes back to the device while the next one is updated. What is computed on the device after step() comes
    after all of them. step() also drops the grads that it used. Params that others write in between, as a model's
    load_state_dict() does, are read again; not so through ``param.data``, which torch does not count.

    Results are bit-identical to the inner optimizer's on the same params and grads. Param groups, schedulers, hooks,
    torch.amp.GradScaler and state dicts are as with that one. Not thread-safe, like any optimizer.

    Parameters
    ----------
    optimizer
        Class of the inner optimizer, such as DeepSpeedCPUAdam.
    params
        Params on one device, or dicts of param groups. DTensors stay what they are.
    accumulate
        How many backward passes make up a step. With more than one, grads are added up on the host in float32.
        Otherwise those of further passes before a step are added in the grads' own dtype, as torch does.
    chunk_mb
        About how many MiB of params are updated in one call.
    threads
        How many threads update params; by default as many as a step of the inner optimizer uses.
    update_in_backward
        Whether chunks are updated during the last backward pass before a step, as soon as all their grads have arrived.
        step() then does the rest. Settings are those at that time, and what needs all grads raises a RuntimeError:
        clip_grad_norm_() and GradScaler.
    model
        The model of the params. Given this, step() returns while params of its blocks (the elements of its outermost
        ModuleLists, ModuleDicts and Sequentials) are still updated and sent: the next forward pass of each block waits
        for its own. **Whoever reads these params otherwise must call wait() before**, such as an average of weights.
        The model's state_dict() waits by itself. Not for DTensors.
    device
        What moves data, as adamops.offload.device describes it; by default CUDA.
    settings
        The other arguments of the inner optimizer.

    Raises
    ------
    ValueError, TypeError
        What the inner optimizer raises; also for params on the CPU, or on several devices.
    """

    def __init__(
        self,
        optimizer: type[RuleOptimizer],
        params: Any,
        *,
        accumulate: int = 1,
        chunk_mb: float = 32,
        threads: int | None = None,
        update_in_backward: bool = False,
        model: nn.Module | None = None,
        device: Device | None = None,
        **settings: Any,
    ) -> None:
        for name, value in (("accumulate", accumulate), ("threads", 1 if threads is None else threads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name}: {value!r}; expected an int of 1 or more")
        if not chunk_mb > 0:
            raise ValueError(f"Invalid chunk_mb: {chunk_mb!r}; expected more than 0")
        groups = _as_groups(params)
        self._pipeline = Pipeline(device or CudaDevice(_device_of(groups)))
        self._accumulate = accumulate
        self._most_bytes = int(chunk_mb * _MEGABYTE)
        self._threads = threads
        self._in_backward = update_in_backward
        self._chunks: list[Chunk] = []
        self._entries: dict[Tensor, tuple[Entry, Chunk]] = {}
        self._deferred: set[Chunk] = set()  # that step() need not wait for
        self._inner = optimizer([self._host_group(i, group) for i, group in enumerate(groups)], **settings)
        super().__init__(groups, self._inner.defaults)
        self._take_settings()
        if model is not None:
            self._wait_by_block(model)

    # Param groups -----------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups, whose params are those on the device."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        if sys._getframe(1).f_globals.get("__name__") != _GRAD_SCALER:
            return groups
        # It looks for grads that overflowed, and these are on the host.
        self._refuse_in_backward("torch.amp.GradScaler")
        self.wait()
        self._collect()
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer does."""
        index = len(self.param_groups)
        if index == len(self._inner.param_groups):  # else it is one of the constructor's
            self.wait()
            param_group["params"] = _params_of(param_group)
            _check_devices([*self._entries, *param_group["params"]])
            self._inner.add_param_group(self._host_group(index, param_group))
        super().add_param_group(param_group)
        self._take_settings(index)

    def _host_group(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        """The group of the inner optimizer, whose params are copies on the host. Has grads sent there."""
        hosts = []
        for chunk in chunks_of(index, group["params"], self._most_bytes, self._pipeline.device, self._accumulate > 1):
            self._chunks.append(chunk)
            for entry in chunk.entries:
                self._entries[entry.param] = entry, chunk
                register_hook(entry.param, functools.partial(_on_grad, weakref.ref(self)))
                hosts.append(entry.host)
        return {**group, "params": hosts}

    def _wait_by_block(self, model: nn.Module) -> None:
        """Has each block of a model wait for its params, and step() for the others."""
        if any(map(dtensor.is_sharded, self._entries)):
            raise ValueError("model= cannot be given for DTensors, which fully_shard() may read ahead of their block")
        self._deferred = set(self._chunks)
        of_blocks = set()
        for block, params in params_by_block(model).items():
            chunks = list(dict.fromkeys(self._entries[param][1] for param in params if param in self._entries))
            before_reading(block, functools.partial(_finish, weakref.ref(self), chunks))
            of_blocks.update(params)
        self._deferred.difference_update(chunk for param, (_, chunk) in self._entries.items() if param not in of_blocks)

    def _give_settings(self) -> None:
        """Gives the inner optimizer the groups' settings, and what GradScaler has set for a step."""
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update(_settings_of(group))
        for name in ("grad_scale", "found_inf"):
            if hasattr(self, name):
                setattr(self._inner, name, getattr(self, name))
            else:
                vars(self._inner).pop(name, None)

    def _take_settings(self, first: int = 0) -> None:
        """Takes over what the inner optimizer has completed or loaded, in groups from this index on."""
        for group, own in list(zip(self.param_groups, self._inner.param_groups, strict=False))[first:]:
            group.update(_settings_of(own))

    # Grads ------------------------------------------------------------------------------------------------------------

    def _on_grad(self, param: Tensor) -> None:
        """Sends a grad to the host, and drops it here."""
        self._pipeline.check_process()
        entry, chunk = self._entries[param]
        if param.grad is None:
            return
        grad = dtensor.local(dtensor.grad_like(param, param.grad, "a param"))
        if grad.layout != torch.strided or grad.shape != entry.sent.shape or grad.dtype != entry.sent.dtype:
            raise TypeError(
                f"A param of shape {tuple(param.shape)} and {param.dtype} has a grad of shape {tuple(grad.shape)}, "
                f"{grad.dtype} and {grad.layout}; expected a dense one of the param's shape and dtype"
            )
        with self._pipeline.lock:
            self._pipeline.finish([chunk])
            if chunk in self._pipeline.updating:
                raise RuntimeError(
                    "A grad has arrived for a param that is already updated: with update_in_backward=True, call step() "
                    f"after each {self._accumulate} backward passes, as `accumulate` says"
                )
            self._pipeline.send(entry, chunk, grad)
            if self._in_backward and chunk.is_complete(self._accumulate):
                self._give_settings()
                self._pipeline.update(chunk, self._update)

    def _send_others(self) -> None:
        """Sends the grads that no hook has seen, such as those that the caller has set."""
        for param, (_, chunk) in self._entries.items():
            if param.grad is not None and chunk not in self._pipeline.updating:
                self._on_grad(param)

    def _collect(self) -> None:
        """Waits for all grads, and gives them to the inner optimizer."""
        self._send_others()
        for entry, _ in self._entries.values():
            entry.give_grad(self._pipeline.device)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all grads, those on the host as well, or sets them to zero. step() has dropped those that it used."""
        if not set_to_none:
            self._send_others()
        for param in self._entries:
            param.grad = None
        self._pipeline.drop_grads(self._chunks, to_zero=not set_to_none)
        self._inner._clipped = None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips all grads to a maximum norm, as that of the inner optimizer does. Waits for the grads.

        Returns the norm before clipping, on the host.
        """
        self._refuse_in_backward("clip_grad_norm_()")
        self.wait()
        self._collect()
        self._give_settings()
        return self._inner.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)

    def _refuse_in_backward(self, what: str) -> None:
        if self._in_backward:
            raise RuntimeError(
                f"{what} cannot be used with update_in_backward=True: params are updated before all grads are known"
            )

    # Steps ------------------------------------------------------------------------------------------------------------

    _step_supports_amp_scaling = True  # the step unscales grads, and is skipped if they hold infs or NaNs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates all params whose grads have arrived, and sends them to the device.

        Returns once all are updated and on their way. What is computed from now on, on the current stream, comes after
        they have arrived.

        Raises
        ------
        TypeError
            For a closure, which would have to compute grads again.
        TypeError, ValueError
            For settings, before anything is written.
        Exception
            What failed in an update. Its chunk keeps its grads, so that another step() does what is left.
        """
        if closure is not None:
            raise TypeError("step() of an offloaded optimizer takes no closure; call backward() before it")
        pipeline = self._pipeline
        pipeline.check_process()
        pipeline.finish(list(pipeline.in_flight))
        self._send_others()
        self._give_settings()
        for i, group in enumerate(self._inner.param_groups):  # of all groups, before anything is written
            self._inner._step_settings(group, f"param group {i}", grad_factor=1.0)
        factor = None
        if self._inner._clipped is not None:
            self._collect()
            factor = self._inner._grad_factor()
        chunks = [chunk for chunk in pipeline.arrived if chunk.has_grads and chunk not in pipeline.updating]
        if self._deferred:  # in the order in which the next forward pass reads them
            chunks.sort(key=lambda chunk: (chunk in self._deferred, self._chunks.index(chunk)))
        pipeline.step(chunks, functools.partial(self._update, factor=factor))
        pipeline.finish([chunk for chunk in pipeline.in_flight if chunk not in self._deferred])

    def _update(self, chunk: Chunk, factor: Any = None) -> None:
        """Updates the params of a chunk on the host."""
        begin, end = chunk.begin, chunk.begin + len(chunk.entries)
        self._inner._step_params(chunk.group_index, begin, end, factor, self._threads)

    def wait(self) -> None:
        """Returns once all params are updated and on their way. What is computed from now on comes after them."""
        self._pipeline.settle()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property  # type: ignore[override]
    def state(self) -> Mapping[Tensor, Any]:
        """The states of the inner optimizer, by the params on the device. A new dict at each access."""
        if "_inner" not in vars(self):
            return {}
        self.wait()
        states = self._inner.state
        return {param: states[entry.host] for param, (entry, _) in self._entries.items() if entry.host in states}

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise AttributeError("the states of an offloaded optimizer are its inner one's; use load_state_dict()")

    def state_dict(self, **options: Any) -> dict[str, Any]:
        """The state dict that the inner optimizer would have for the params on the device, with its options."""
        self.wait()
        self._give_settings()
        return self._inner.state_dict(**options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the inner optimizer loads."""
        self.wait()
        self._inner.load_state_dict(state_dict)
        self._take_settings()

    def __getstate__(self) -> Any:
        raise TypeError("an offloaded optimizer cannot be copied or pickled; save its state_dict()")


class OffloadedAdam(OffloadedOptimizer):
    """DeepSpeedCPUAdam on the host, for params on an accelerator.

    ::

        optimizer = adamops.OffloadedAdam(model.parameters(), lr=1e-3, state_dtype="8bit", master_weight_bits=24)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    See OffloadedOptimizer, whose arguments these are, beside those of DeepSpeedCPUAdam.
    """

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(DeepSpeedCPUAdam, params, lr=lr, **settings)


def _on_grad(owner: weakref.ref[OffloadedOptimizer], param: Tensor) -> None:
    """The hook of a param. It does not keep the optimizer alive."""
    optimizer = owner()
    if optimizer is not None and param in optimizer._entries:
        optimizer._on_grad(param)


def _finish(owner: weakref.ref[OffloadedOptimizer], chunks: Sequence[Chunk]) -> None:
    """What a block calls before its params are read."""
    optimizer = owner()
    if optimizer is not None:
        optimizer._pipeline.finish(chunks)


def _as_groups(params: Any) -> list[dict[str, Any]]:
    """The param groups, with lists of params."""
    if isinstance(params, Tensor):
        raise TypeError(f"params is a {type(params).__name__}; expected an iterable of tensors or dicts")
    given = list(params)
    if not given:
        raise ValueError("optimizer got an empty parameter list")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "params": _params_of(group)} for group in groups]


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _params_of(group: Mapping[str, Any]) -> list[Tensor]:
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def _device_of(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    (device,) = _check_devices(param for group in groups for param in group["params"])
    if device.type != "cuda":
        raise ValueError(f"The params are on {device}; offloading is for those on CUDA devices")
    return device


def _check_devices(params: Iterable[Tensor]) -> set[torch.device]:
    devices = {param.device for param in params}
    if len(devices) != 1:
        raise ValueError(f"The params are on {', '.join(sorted(map(str, devices)))}; expected one device")
    return devices

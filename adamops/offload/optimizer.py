"""Optimizers whose states, master weights and updates are on the host, for params on an accelerator.

An inner optimizer of adamops steps on copies of the params in pinned memory. Grads arrive there as the backward pass
makes them, and the updated copies go back. Must not know any one rule, nor any one accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _torch_compat
from ..optim import dtensor
from ..optim.backward import register_hook
from ..optim.batch import check_param
from ..optim.interrupts import deferred_signals
from ..optim.optimizer import RuleOptimizer
from ..optim.step_settings import StepSettings
from .blocks import before_access, params_by_block
from .checkpointed import CheckpointedOffload
from .chunks import Chunk, Entry, chunks_of, give_memory, group_on_host
from .device import CudaDevice, Device
from .given import (
    check_arguments,
    check_model,
    check_params,
    check_trained,
    group_of,
    groups_of,
    offloadable_device,
    params_of,
    take_ownership,
)
from .pipeline import Pipeline


class OffloadedOptimizer(CheckpointedOffload):
    """Steps an optimizer of adamops on the host, for params on an accelerator.

    The backward pass sends each grad to the host as soon as it is there, and frees it on the device: afterwards
    ``param.grad`` is None. step() updates the params chunk by chunk, about in the order in which their grads arrived;
    each chunk goes back to the device while the next one is updated. What is computed on the device after step() comes
    after all of them. step() also drops the grads that it used. Params that others write in between, as a model's
    load_state_dict() does, are read again; not so in-place writes through ``param.data``, which torch does not count.

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
        check_arguments(optimizer, accumulate, chunk_mb, threads, update_in_backward, model, device)
        groups = groups_of(params)
        place = check_params(groups)
        check_model(model, groups)
        self._pipeline = Pipeline(device or CudaDevice(offloadable_device(place)))
        self._accumulate = accumulate
        self._most_bytes = int(chunk_mb * 2**20)
        self._threads = threads
        self._in_backward = bool(update_in_backward)
        self._chunks: list[Chunk] = []
        self._entries: dict[Tensor, tuple[Entry, Chunk]] = {}
        self._deferred: set[Chunk] = set()  # that step() need not wait for
        self._blocks: list[list[Chunk]] = []  # what each block of the model waits for
        self._early: set[Chunk] = set()  # updated in a backward pass, before step()
        self._early_settings: list[StepSettings] | None = None
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._hooks).atexit = False
        self._unfrozen = False  # whether params are to be checked that were frozen before
        chunks = [self._new_chunks(i, group) for i, group in enumerate(groups)]
        self._inner = optimizer([group_on_host(*pair) for pair in zip(groups, chunks, strict=True)], **settings)
        self._add = functools.partial(self._inner._backends[torch.device("cpu")].add_grad, threads=threads)
        super().__init__(groups, self._inner.defaults)
        self._take_settings()
        self._ids: list[list[int]] = []
        for new in chunks:
            self._take_chunks(new)
        if model is not None:
            self._wait_by_block(model)

    def __repr__(self) -> str:
        if "_ids" not in vars(self):  # under construction
            return object.__repr__(self)
        pinned = f"{self.pinned_bytes / 1e6:.1f} MB of pinned memory"
        self._give_settings()  # which it shows
        return f"{type(self).__name__}, with {pinned}, on the host: {self._inner!r}"

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory: of params and grads on their way. torch rounds each piece up, at most to twice."""
        return sum(
            2 * entry.sent.numel() * entry.sent.element_size()
            for entry, _ in self._entries.values()
            if entry.sent is not None
        )

    # Param groups -----------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups, whose params are those on the device."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        if not _is_grad_scaler(sys._getframe(1)):
            return groups
        # It looks for grads that overflowed, and these are on the host.
        self._refuse_in_backward("torch.amp.GradScaler")
        self._begin_anew()
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer does."""
        index = len(self.param_groups)
        if index < len(self._inner.param_groups):  # one of the constructor's
            super().add_param_group(param_group)
            return
        self.wait()
        checked = group_of(param_group, f"param group {index}")
        check_params([checked], self._entries.keys(), index)
        param_group["params"] = checked["params"]
        chunks = self._new_chunks(index, checked)
        self._inner.add_param_group(group_on_host(checked, chunks))
        try:
            super().add_param_group(param_group)
        except BaseException:
            del self._inner.param_groups[index]
            raise
        self._take_settings(index)
        self._take_chunks(chunks)

    def _new_chunks(self, index: int, group: Mapping[str, Any]) -> list[Chunk]:
        device, accumulates = self._pipeline.device, self._accumulate > 1
        with torch.inference_mode(False):  # what is made there could be written there only
            return chunks_of(index, params_of(group), self._most_bytes, device, accumulates)

    def _take_chunks(self, chunks: list[Chunk]) -> None:
        """Has the grads of chunks sent to the host."""
        hook = functools.partial(_on_grad, weakref.ref(self))
        for chunk in chunks:
            for entry in chunk.entries:
                if (handle := register_hook(entry.param, hook)) is not None:
                    self._hooks.append(handle)
                take_ownership(entry.param, self)
                self._entries[entry.param] = entry, chunk
        self._chunks += chunks
        self._ids.append([id(entry.param) for chunk in chunks for entry in chunk.entries])

    def _wait_by_block(self, model: nn.Module) -> None:
        """Has each block of a model wait for its params, and step() for the others."""
        if _torch_compat.may_compile():
            torch.compiler.reset()  # what is compiled already would not call the hooks
        self._deferred = set(self._chunks)
        of_blocks = set()
        for i, (block, params) in enumerate(params_by_block(model).items()):
            self._blocks.append(list(dict.fromkeys(self._entries[p][1] for p in params if p in self._entries)))
            self._hooks += before_access(block, self._finish_block, i)
            of_blocks.update(params)
        self._deferred.difference_update(chunk for param, (_, chunk) in self._entries.items() if param not in of_blocks)

    def _finish_block(self, index: int) -> None:
        """What a block calls before its params are read."""
        self._pipeline.finish(self._blocks[index])

    def _checked_settings(self) -> list[StepSettings]:
        """The settings of a step of each group as they are now. Raises what step() raises for them."""
        self._give_settings()
        inner = self._inner
        return [
            inner._step_settings(group, f"param group {i}", grad_factor=1.0, threads=self._threads).as_numbers()
            for i, group in enumerate(inner.param_groups)
        ]

    # Grads ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _on_grad(self, param: Tensor) -> None:
        """Sends a grad to the host, and drops it here."""
        entry, chunk = self._entries[param]
        if param.grad is None:
            return
        entry.was_left = True  # until it is sent
        self._pipeline.check_process()
        entry.check_param()
        grad = dtensor.local(dtensor.grad_like(param, param.grad, "a param").detach())
        held = dtensor.local(param)
        if grad.layout != torch.strided or grad.shape != held.shape or grad.dtype != held.dtype:
            raise TypeError(
                f"A param of shape {tuple(param.shape)} and {param.dtype} has a grad of shape {tuple(grad.shape)}, "
                f"{grad.dtype} and {grad.layout}; expected a dense one of the param's shape and dtype"
            )
        with self._pipeline.lock:
            if chunk in self._early:
                raise RuntimeError(
                    "A grad has arrived for a param that is already updated: with update_in_backward=True, call step() "
                    f"after each {self._accumulate} backward passes, as `accumulate` says"
                )
            self._pipeline.finish([chunk])
            if entry.sent is None:
                check_param(held, "a param that was frozen")
                with torch.inference_mode(False):
                    give_memory([entry], self._pipeline.device)
                self._unfrozen = True
            is_last = self._in_backward and entry.arrivals + 1 == self._accumulate
            self._pipeline.send(entry, chunk, grad, self._add, update_adds=is_last)
            entry.was_left = False
            if self._in_backward and chunk.is_complete(self._accumulate):
                self._check_unfrozen()
                early = self._early_settings or []
                if len(early) < len(self.param_groups):
                    early = self._early_settings = early + self._checked_settings()[len(early) :]
                with deferred_signals():
                    self._pipeline.update([chunk], early, self._update)
                    self._early.add(chunk)

    def _check_unfrozen(self) -> None:
        """Checks params that were frozen before together with the others."""
        if self._unfrozen:
            check_trained({}, [param for param, (entry, _) in self._entries.items() if entry.sent is not None])
            self._unfrozen = False

    def _send_others(self) -> None:
        """Sends the grads that no hook has sent, such as those that the caller has set in place of others."""
        for param, (entry, chunk) in self._entries.items():
            if param.grad is None or (chunk in self._early and entry.was_left):
                continue
            if not entry.was_left and chunk not in self._early:
                self._pipeline.finish([chunk])
                entry.drop_grads(self._pipeline.device)
            self._on_grad(param)

    def _collect(self) -> None:
        """Waits for the grads that have been sent, and gives them to the inner optimizer."""
        for entry, _ in self._entries.values():
            entry.give_grad(self._pipeline.device)

    def _begin_anew(self) -> None:
        """Waits for everything. What failed before will be updated with the settings of the next step()."""
        self.wait()
        self._send_others()
        self._collect()
        for chunk in self._chunks:
            chunk.settings = None

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all grads, those on the host as well, or sets them to zero. step() has dropped those that it used."""
        self._pipeline.check_process()
        with self._pipeline.lock:
            if not set_to_none:
                self._send_others()
            for param, (entry, _) in self._entries.items():
                param.grad, entry.was_left = None, False
            self._pipeline.drop_grads(self._chunks, to_zero=not set_to_none)
            self._inner._clipped = None
            self._early, self._early_settings = set(), None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips all grads to a maximum norm, as that of the inner optimizer does. Waits for the grads.

        Returns the norm before clipping, on the host.
        """
        self._refuse_in_backward("clip_grad_norm_()")
        self._pipeline.check_process()
        self._begin_anew()
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
            For settings, and for params that are no longer of the same shape and dtype, before anything is written.
        RuntimeError
            If settings have changed since a part was updated in the backward pass, before the rest is; if params were
            written while they were updated.
        Exception
            What failed in an update. Its chunk keeps its grads and settings, so that another step() does what is left.
        """
        if closure is not None:
            raise TypeError("step() of an offloaded optimizer takes no closure; call backward() before it")
        pipeline = self._pipeline
        pipeline.check_process()
        pipeline.finish([chunk for chunk in pipeline.in_flight if chunk not in self._early])
        settings = self._checked_settings()
        pipeline.update([chunk for chunk in pipeline.arrived if chunk.settings is not None], settings, self._update)
        with deferred_signals():
            self._send_others()
            self._check_unfrozen()
            if self._early_settings is not None and not all(map(StepSettings.is_like, settings, self._early_settings)):
                raise RuntimeError(
                    "Settings have changed after some params were updated with the former ones: with "
                    "update_in_backward=True, change them before the backward pass, or after step()"
                )
            if self._inner._clipped is not None:
                self._collect()
                factor = float(self._inner._grad_factor())
                settings = [dataclasses.replace(one, grad_factor=factor) for one in settings]
            chunks = [chunk for chunk in pipeline.arrived if chunk.has_grads]
            if self._deferred:  # in the order in which the next forward pass reads them
                chunks.sort(key=lambda chunk: (chunk in self._deferred, self._chunks.index(chunk)))
            pipeline.update(chunks, settings, self._update)
            self._early, self._early_settings, self._inner._clipped = set(), None, None
        pipeline.finish([chunk for chunk in pipeline.in_flight if chunk not in self._deferred])

    def _update(self, chunk: Chunk) -> None:
        """Updates the params of a chunk on the host."""
        add_grads = functools.partial(chunk.add_grads, self._add)
        self._inner._step_params(chunk.group_index, chunk.begin, chunk.end, chunk.settings, before=add_grads)


def _on_grad(owner: weakref.ref[OffloadedOptimizer], param: Tensor) -> None:
    """The hook of a param. It does not keep the optimizer alive."""
    optimizer = owner()
    if optimizer is not None and param in optimizer._entries:
        optimizer._on_grad(param)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _is_grad_scaler(caller: FrameType) -> bool:
    """Whether a GradScaler of torch, or of a class derived from it, looks at grads."""
    return "unscale" in caller.f_code.co_name and isinstance(caller.f_locals.get("self"), torch.amp.GradScaler)

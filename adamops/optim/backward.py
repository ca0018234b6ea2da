"""Updates each param during the backward pass, as soon as its grad is ready, so that few grads exist at once.

Knows autograd and module wrappers. Must not know how a param is updated: RuleOptimizer.step_param() does that.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch_compat
from . import data_parallel, dtensor
from .optimizer import RuleOptimizer

_ANCHOR = "_adamops_in_backward"  # an attribute of each param that has a hook


class OfParam:
    """An attribute of a param. Copied or pickled with it, it becomes an empty dict of a kind that
    torch.load(weights_only=True) accepts.
    """

    def __reduce__(self) -> Any:
        return OrderedDict, ()


class _Anchor(OfParam):
    """Keeps the handle alive as long as its params, even if the caller drops it.

    The hooks themselves refer to the handle weakly: Python's garbage collector cannot see what C++ holds, so a cycle
    through them would never be freed.
    """

    def __init__(self, handle: InBackward) -> None:
        self.handle = handle


class InBackward:
    """The hooks of step_in_backward().

    A backward pass is an autograd graph task. Its first grad opens the pass here, and autograd then calls _close() at
    its end. Reentrant checkpointing runs nested graph tasks, and a shared param gets a part of its grad in each. Those
    grads are used only at the end of the outermost task.
    """

    def __init__(self, model: nn.Module, optimizer: RuleOptimizer) -> None:
        self._optimizer = optimizer
        self._model = weakref.ref(model)
        self._modules = weakref.WeakSet(model.modules())
        self._names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self._places = _places_of(self._names, optimizer)
        _check(model, self._names, self._places, optimizer)
        self._accumulates = self._has_begun = False
        self._lock = threading.Lock()  # autograd has a thread for each GPU
        self._pass = self._nested = -1  # ids of the graph tasks last seen
        self._updated: set[int] = set()  # ids of the params updated in this pass
        self._hooks: dict[Tensor, Any] = {}
        self._counted = 0  # how many params of the model are in the optimizer
        self._seen: list[int] = []  # ids of all params in the optimizer
        try:
            self._hook_params()
        except BaseException:
            self.remove()
            raise
        _handles.add(self)
        data_parallel.watch_new_wrappers(_refuse_wrapper)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside this context only accumulate grads; the next one outside steps with their sum."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def remove(self) -> None:
        """Removes the hooks: from then on, the caller calls step(). A second call does nothing."""
        if not self._hooks:
            return
        for param in list(self._hooks):
            self._unhook(param)
        self._optimizer._params_in_backward -= self._counted
        _handles.discard(self)

    def updates(self, modules: Iterable[nn.Module], params: Iterable[Tensor]) -> bool:
        """Whether this updates one of the params, or a param of one of the modules."""
        return any(param in self._hooks for param in params) or any(module in self._modules for module in modules)

    def on_grad(self, param: Tensor) -> None:
        """Updates a param whose grad is ready, now or at the end of the backward pass."""
        if self._accumulates:
            return
        task = _torch_compat.current_backward_pass()
        if task == self._pass or self._begins_pass(task):
            self._step(param)

    def _begins_pass(self, task: int) -> bool:
        """Opens the pass of this graph task. If the task is nested, has the outer pass opened, and returns False."""
        if task == self._nested:
            return False
        outer = _outer_node()
        if outer is None:
            self._open(task)
            return True
        # The nodes after the outer node belong to the outermost pass, which is not accessible from inside this one.
        followers = [node for node, _ in outer.next_functions if node is not None]
        if not followers:
            raise RuntimeError(
                "step_in_backward() cannot tell where the outer one of two nested backward passes ends; with "
                "torch.utils.checkpoint, use_reentrant=False has no nested ones"
            )
        self._nested = task
        ref = weakref.ref(self)
        for node in followers:
            node.register_prehook(functools.partial(_on_outer_pass, ref))
        return False

    def _open(self, task: int) -> None:
        with self._lock:
            if task == self._pass:
                return
            _refuse_what_needs_all_grads(self._optimizer)
            if not self._has_begun:
                # Some wrappers do not register the module, so they were not seen when they were constructed.
                _refuse_wrapper_of(self._modules, self._hooks)
                self._has_begun = True
            if self._seen != _ids_of_params(self._optimizer):
                self._hook_params()
            _torch_compat.call_after_backward_pass(self._close)
            self._pass, self._updated = task, set()

    def _close(self) -> None:
        """Ends a pass: updates the params whose grads were deferred, and runs the step post-hooks."""
        if not self._hooks:  # removed meanwhile
            return
        for param in self._places:  # grads from nested passes or accumulate(), or of new layers
            if param.grad is not None:
                self._step(param)
        optimizer = self._optimizer
        _torch_compat.mark_as_stepped(optimizer)
        for hook in _torch_compat.step_post_hooks(optimizer):
            hook(optimizer, (), {})

    def _step(self, param: Tensor) -> None:
        if id(param) in self._updated:
            raise RuntimeError(
                f"The param {self._names[param]!r} got a second grad in one backward pass, after it had been updated "
                "with the first: one of them came from a pass nested in it, as of torch.utils.checkpoint with "
                "use_reentrant=True. Use use_reentrant=False, or optimizer.step() after the pass"
            )
        g, i = self._place(param)
        _wait_for_copy(param)
        self._optimizer.step_param(g, i)
        self._updated.add(id(param))
        param.grad = None

    def _place(self, param: Tensor) -> tuple[int, int]:
        """The index of the param's group, and the param's index in it."""
        groups = self._optimizer.param_groups
        for _ in range(2):
            g, i = self._places.get(param, (len(groups), 0))
            if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is param:
                return g, i
            self._places = _places_of(self._names, self._optimizer)  # groups have changed
        raise ValueError(
            f"The optimizer does not have the param {self._names[param]!r} of the model, which requires grads now; add "
            "it by add_param_group(), or freeze it"
        )

    def _forget(self, gone: set[Tensor]) -> None:
        """Releases params that are no longer in the model, if they are not in the optimizer either."""
        ids = set(_ids_of_params(self._optimizer))
        for param in gone:
            if id(param) not in ids:
                del self._names[param]
                if param in self._hooks:
                    self._unhook(param)

    def _unhook(self, param: Tensor) -> None:
        self._hooks.pop(param).remove()
        param.__dict__.pop(_ANCHOR, None)

    def _hook_params(self) -> None:
        """Registers hooks on the params of the model that have none, also on frozen ones, as they may be unfrozen."""
        model, ref = self._model(), weakref.ref(self)
        if model is not None:
            self._modules.update(model.modules())
            names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
            self._forget(self._names.keys() - names.keys())
            self._names.update(names)
        for param in self._names:
            hook = None if param in self._hooks else register_hook(param, functools.partial(_on_grad, ref))
            if hook is not None:
                self._hooks[param] = hook
                setattr(param, _ANCHOR, _Anchor(self))
        self._places = _places_of(self._names, self._optimizer)
        self._optimizer._params_in_backward += len(self._places) - self._counted
        self._counted, self._seen = len(self._places), _ids_of_params(self._optimizer)


_handles: weakref.WeakSet[InBackward] = weakref.WeakSet()


def _on_grad(ref: weakref.ref[InBackward], param: Tensor) -> None:
    handle = ref()
    if handle is not None:
        handle.on_grad(param)


def _on_outer_pass(ref: weakref.ref[InBackward], grads: object) -> None:
    handle = ref()
    if handle is not None:
        handle._open(_torch_compat.current_backward_pass())


def _check(model: nn.Module, names: dict[Tensor, str], places: dict[Tensor, Any], optimizer: RuleOptimizer) -> None:
    """Raises for what step_in_backward() does not support."""
    _torch_compat.check_backward_passes_are_known("step_in_backward()")
    trained = [param for param in names if param.requires_grad]
    missing = [names[param] for param in trained if param not in places]
    if missing:
        raise ValueError(
            f"The optimizer does not have the param {missing[0]!r} of the model; give it all, or freeze it"
        )
    taken = [name for param, name in names.items() if isinstance(getattr(param, _ANCHOR, None), _Anchor)]
    if taken:
        raise ValueError(
            f"step_in_backward() was called for the param {taken[0]!r} before; call remove() of that handle first"
        )
    _refuse_wrapper_of(model.modules(), trained)
    if _torch_compat.runs_no_hooks(model):
        raise RuntimeError("step_in_backward() with fully_shard() needs torch 2.5 or later, which runs hooks of shards")
    _refuse_what_needs_all_grads(optimizer)


def _refuse_wrapper_of(modules: Iterable[nn.Module], params: Iterable[Tensor]) -> None:
    wrapper = data_parallel.wrapper_of(modules, params)
    if wrapper:
        raise RuntimeError(_with_wrapper(wrapper))


def _refuse_wrapper(wrapper: str, modules: Iterable[nn.Module], params: Iterable[Tensor]) -> None:
    modules, params = list(modules), list(params)
    if any(handle.updates(modules, params) for handle in _handles):
        raise RuntimeError(_with_wrapper(wrapper))


def _with_wrapper(wrapper: str) -> str:
    return (
        f"step_in_backward() cannot be used with {wrapper}, which averages grads over processes after each param would "
        "have been updated with its own process' grad: replicas would diverge. Use optimizer.step(), or fully_shard(), "
        "whose params are updated once their grads are averaged"
    )


def _refuse_what_needs_all_grads(optimizer: RuleOptimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "step_in_backward() cannot be used with a scaled loss (the optimizer has a grad_scale): params would be "
            "updated before all grads are known to be finite; use optimizer.step()"
        )
    if _torch_compat.step_pre_hooks(optimizer):
        raise RuntimeError(
            "step_in_backward() cannot be used with step pre-hooks, which see all grads before the first param is "
            "updated; use optimizer.step(), or post-hooks, which run at the end of each backward pass"
        )


def _places_of(names: dict[Tensor, str], optimizer: RuleOptimizer) -> dict[Tensor, tuple[int, int]]:
    """The group index, and the index in that group, of each of the model's params that the optimizer has."""
    return {
        param: (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, param in enumerate(group["params"])
        if param in names
    }


def _ids_of_params(optimizer: RuleOptimizer) -> list[int]:
    return [id(param) for group in optimizer.param_groups for param in group["params"]]


def register_hook(param: Tensor, hook: Any) -> Any:
    """Registers the hook and returns its handle; None for a frozen param that can never be unfrozen."""
    if param.requires_grad:
        return param.register_post_accumulate_grad_hook(hook)
    if not (param.dtype.is_floating_point or param.dtype.is_complex):
        return None
    try:
        param.requires_grad_(True)  # torch requires it; the hook stays when the param is frozen again
        return param.register_post_accumulate_grad_hook(hook)
    except (RuntimeError, TypeError, NotImplementedError):  # created in inference mode, or of a quantized subclass
        return None
    finally:
        param.requires_grad_(False)


def _wait_for_copy(param: Tensor) -> None:
    """Waits for the grad of a shard on the CPU: before torch 2.13, CPUOffloadPolicy may still be copying it.

    The copy runs on the stream that is current in the hook. A copy without non_blocking is already complete.
    """
    if param.device.type == "cpu" and dtensor.is_sharded(param):
        kind = param.device_mesh.device_type  # type: ignore[attr-defined]
        if kind != "cpu":
            getattr(torch, kind).current_stream().synchronize()


def _outer_node() -> Any:
    """The node whose backward() runs this backward pass, as reentrant checkpointing does; None if there is none.

    Autograd does not tell a nested graph task that it is nested, nor in which task; the call stack does. If several
    graph tasks surround this one, the node belongs to the outermost. Raises RuntimeError if a hook, which has no node,
    has started one of them.
    """
    found, inside = None, False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.autograd.backward.__code__:
            if inside:
                raise RuntimeError(
                    "step_in_backward() cannot be used with a hook that starts another backward pass: both passes "
                    "would update the params; call optimizer.step() after the outer one instead"
                )
            inside = True
        elif inside and frame.f_code in _torch_compat.NODE_CODES:
            found, inside = frame.f_locals["self"], False
        frame = frame.f_back  # type: ignore[assignment]
    return found


def step_in_backward(model: nn.Module, optimizer: RuleOptimizer) -> InBackward:
    """Makes each backward pass of `model` update its params with `optimizer`, and free each grad once it is used.

    Results are bit-identical to a backward pass followed by ``optimizer.step()``. Leave that call out; if it stays, it
    does nothing, as no grads are left. Params unfrozen later are updated too, and so are layers added to both the model
    and the optimizer. Step post-hooks run at the end of each backward pass; a step() that has nothing to do runs none.

    Anything that needs all grads at once raises a RuntimeError: clip_grad_norm_() of the optimizer,
    torch.amp.GradScaler, step pre-hooks. Grads accumulate over several backward passes only inside
    ``handle.accumulate()``. A param used in reentrant checkpoints (``use_reentrant=True``) is updated at the end of the
    pass, with its whole grad; use_reentrant=False frees grads sooner.

    Shards of fully_shard() are updated once their grads are averaged (torch 2.5 or later). DistributedDataParallel,
    FullyShardedDataParallel and DeepSpeed's engine average grads too late for this. They are refused, even if they are
    constructed between this call and the first backward pass. Anything else that changes grads after the backward pass
    (``torch.nn.utils.clip_grad_norm_``, a manual all-reduce) comes too late, and this cannot be detected.

    The backward pass raises errors about a grad. The param with that grad, and params whose grads were not ready yet,
    are then unchanged.

    Parameters
    ----------
    model
        All its params that require grads must be in the optimizer.
    optimizer
        An optimizer of adamops.

    Returns
    -------
    InBackward
        A handle: ``accumulate()`` is a context in which grads only accumulate, ``remove()`` removes the hooks. It need
        not be kept.

    Raises
    ------
    ValueError
        If a param of the model is not in the optimizer, or has been given to step_in_backward() before.
    TypeError
        For another optimizer.
    RuntimeError
        Under a wrapper that averages grads, with a scaled loss, or with step pre-hooks.
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise TypeError(f"step_in_backward() takes an optimizer of adamops, not {type(optimizer).__name__}")
    return InBackward(model, optimizer)

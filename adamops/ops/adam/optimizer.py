"""What the Adam optimizers share: a torch.optim.Optimizer whose step is one call of the op per param group."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ... import op_builder
from .backend import Backend
from .batch import (
    MASTER,
    STATE_TENSORS,
    AdamBatch,
    check_in_host_memory,
    check_no_overlap,
    check_param,
    check_params_and_grads,
)
from .hyper import AdamHyper
from .loading import adopted_states, shield_states
from .native_backend import NativeBackend
from .torch_adam import TorchBackend

_HOST = torch.device("cpu")


def _load_host_backend() -> Backend:
    """The compiled CPU op, or torch calls with one warning that says why."""
    try:
        return NativeBackend(op_builder.get("cpu_adam").load())
    except op_builder.OpUnavailableError as error:
        return torch_calls(str(error))


def torch_calls(why: str) -> TorchBackend:
    """The last resort, with a warning that says why."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("adamops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"adamops falls back to torch calls, which are slow. {why}", RuntimeWarning, stacklevel=level)
    op_builder.get("torch_adam").load()
    return TorchBackend()


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of Optimizer without the guard that hides it from torch.compile, where nothing is being compiled.

    The guard imports torch._dynamo when it is first called, which takes about a second; unless someone has imported
    that already, there is nothing to hide from.
    """
    return method if "torch._dynamo" in sys.modules else inspect.unwrap(method)


class AdamOptimizer(Optimizer):
    """Adam and AdamW for params in host memory; the classes that users take differ in arguments, and in what they add.

    Under torch.amp.GradScaler the grads are unscaled inside the step, which reads them and does not write them.
    """

    _step_supports_amp_scaling = True  # what GradScaler asks: it then leaves unscaling and skipping to step()

    def __init__(
        self,
        params: Any,
        *,
        adam_w_mode: bool,
        fp32_optimizer_states: bool = True,
        master_weights: bool = False,
        **defaults: Any,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        self.master_weights = master_weights
        _check_hyper(defaults, "")
        super().__init__(params, defaults)
        self._backends: dict[torch.device, Backend] = {_HOST: _load_host_backend()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer does; its settings and params are checked first."""
        where = f"param group {len(self.param_groups)}"
        _check_hyper({**self.defaults, **param_group}, f" in {where}")
        params = param_group["params"]
        if isinstance(params, Tensor):
            params = [params]
        elif not isinstance(params, set):  # the base class explains what is wrong with a set
            params = list(params)
        for i, entry in enumerate(params):
            param = entry[1] if isinstance(entry, tuple) else entry  # named_parameters() gives pairs
            # Elsewhere than in host memory a param may wait: ZeRO-Offload takes an optimizer made for the model on the
            # GPU, and puts its own shards in host memory into the groups. step() checks again.
            if isinstance(param, Tensor) and param.device.type == "cpu":
                check_param(param, f"{where}, param {i}")
        _unguarded(Optimizer.add_param_group)(self, {**param_group, "params": params})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the grads to None, or to zero, as torch.optim.Optimizer does."""
        _unguarded(Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all params that have a grad.

        Everything is checked before anything is written: if this raises, no param and no state has changed.

        Parameters
        ----------
        closure
            Re-evaluates the model and returns the loss.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        TypeError, ValueError
            For a grad or state that does not fit its param: sparse, or of another shape, dtype or device; or params
            that share memory.
        """
        loss = evaluate(closure)
        groups = [(f"param group {i}", group) for i, group in enumerate(self.param_groups)]
        prepared = [self._prepare(group, where) for where, group in groups]
        if any(states_are_new for _, states_are_new in prepared):
            check_no_overlap({name: param for where, group in groups for name, param, _ in with_grads(group, where)})
        for update, _ in prepared:
            update()
        return loss

    def _prepare(self, group: dict[str, Any], where: str) -> tuple[Callable[[], None], bool]:
        """What updates the group when called, and whether any of its states is new and not yet in self.state."""
        hyper = self._hyper(group, where)
        params = group["params"]
        backend = self._backends.get(params[0].device) if params else None
        update = backend.prepare_group(where, hyper, params, self.state) if backend else None
        if backend and update:
            return (_nothing if backend.skips(hyper) else update), False

        prepared = [self._prepare_batch(*batch) for batch in self._batches(group, where, hyper)]

        def update_all() -> None:
            for update, _ in prepared:
                update()

        return update_all, any(states_are_new for _, states_are_new in prepared)

    def _batches(self, group: dict[str, Any], where: str, hyper: AdamHyper) -> list[tuple[Backend, AdamBatch]]:
        """The group's params that have a grad, by the backends that update them; without those to be skipped."""
        batches: dict[torch.device, tuple[Backend, AdamBatch]] = {}
        for name, param, grad in with_grads(group, where):
            if param.device not in batches:
                batches[param.device] = self._backend_of(param, name), AdamBatch([], hyper, [], [], [])
            batches[param.device][1].append(name, param, grad, self.state.get(param) or {})
        return [(backend, batch) for backend, batch in batches.values() if not backend.skips(hyper)]

    def _prepare_batch(self, backend: Backend, batch: AdamBatch) -> tuple[Callable[[], None], bool]:
        """As _prepare(), for a batch."""
        needed = [{"step", *batch.state_keys(param)} for param in batch.params]
        if all(state.keys() >= keys for state, keys in zip(batch.states, needed, strict=True)):
            return backend.prepare(batch), False
        check_params_and_grads(batch)
        self._complete_states(backend, batch)
        update = backend.prepare(batch)

        def update_and_keep_states() -> None:
            update()
            self.state.update(zip(batch.params, batch.states, strict=True))

        return update_and_keep_states, True

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """What updates the param. Raises ValueError if that can be nothing."""
        check_in_host_memory(param, name)
        return self._backends[_HOST]

    def _hyper(self, group: dict[str, Any], where: str) -> AdamHyper:
        """The group's hyper-parameters, checked, with what torch.amp.GradScaler sets for a step."""
        loss_scale = getattr(self, "grad_scale", None)
        hyper = AdamHyper.of_group(
            group,
            adamw_mode=self.adam_w_mode,
            master_weights=self.master_weights,
            loss_scale=1.0 if loss_scale is None else loss_scale,
            found_inf=getattr(self, "found_inf", None),
        )
        _check_betas(hyper.beta1, hyper.beta2, f" in {where}")
        return hyper

    def _complete_states(self, backend: Backend, batch: AdamBatch) -> None:
        """Gives the batch's states what they lack: a step count of 0, and zeros; master weights begin as the params."""
        completed = [
            {**state} if "step" in state else {"step": backend.new_step_count(batch.hyper), **state}
            for state in batch.states
        ]
        for key in STATE_TENSORS:
            lacking = [i for i, p in enumerate(batch.params) if key in batch.state_keys(p) and key not in completed[i]]
            like = [batch.params[i] for i in lacking]
            dtypes = [torch.float32] * len(like) if key == MASTER else self._state_dtypes(like)
            for i, zeros in zip(lacking, backend.zeros_like(like, dtypes), strict=True):
                completed[i][key] = zeros.copy_(batch.params[i]) if key == MASTER else zeros
        batch.states = completed

    def _state_dtypes(self, params: list[Tensor]) -> list[torch.dtype]:
        return [torch.float32 if self.fp32_optimizer_states else param.dtype for param in params]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of the classes here, of torch.optim.Adam or AdamW, or of DeepSpeed's or apex' Adam.

        Tensors of the state are taken as they are where they fit, and converted to this optimizer's state dtype
        otherwise.

        Raises
        ------
        ValueError, TypeError
            If a state does not fit its param; the optimizer is then as it was.
        """
        handle = self.register_load_state_dict_pre_hook(shield_states)  # last, so it sees what other hooks return
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by unpickling and, with loaded state, by load_state_dict()."""
        state = {**state}
        state.setdefault("fp32_optimizer_states", getattr(self, "fp32_optimizer_states", True))
        state.setdefault("master_weights", getattr(self, "master_weights", False))
        if "state" in state and "param_groups" in state:
            kinds = state["fp32_optimizer_states"], state["master_weights"]
            state["state"] = adopted_states(state["state"], state["param_groups"], *kinds)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
        if not hasattr(self, "_backends"):
            self._backends = {_HOST: _load_host_backend()}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "adam_w_mode": self.adam_w_mode,
            "fp32_optimizer_states": self.fp32_optimizer_states,
            "master_weights": self.master_weights,
        }


def _nothing() -> None:
    """The update of a step that is skipped."""


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with autograd on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_grads(group: dict[str, Any], where: str) -> list[tuple[str, Tensor, Tensor]]:
    """The name, the param and the grad of each param that has a grad."""
    return [
        (f"{where}, param {i}", param, param.grad) for i, param in enumerate(group["params"]) if param.grad is not None
    ]


def _check_hyper(group: dict[str, Any], where: str) -> None:
    """Raises ValueError for a hyper-parameter out of range, as torch.optim.Adam does; `where` ends the message."""
    lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must have one element, has shape {tuple(lr.shape)}{where}")
    if not float(lr) >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}{where}; expected 0 or more")
    if not float(eps) >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}{where}; expected 0 or more")
    if not float(weight_decay) >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}{where}; expected 0 or more")
    _check_betas(float(beta1), float(beta2), where)


def _check_betas(beta1: float, beta2: float, where: str) -> None:
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}{where}; expected 0 <= beta < 1")

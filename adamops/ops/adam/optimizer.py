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
from .batch import AdamBatch, check_no_overlap, check_param, check_params_and_grads
from .hyper import AdamHyper
from .loading import adopted_states, shield_states
from .native_backend import NativeBackend
from .torch_adam import TorchBackend


def _load_backend() -> NativeBackend | TorchBackend:
    """The compiled op, or torch calls with one warning that says why."""
    try:
        return NativeBackend(op_builder.get("cpu_adam").load())
    except op_builder.OpUnavailableError as error:
        warnings.warn(f"adamops falls back to torch calls, which are slow. {error}", RuntimeWarning, stacklevel=4)
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
        self, params: Any, defaults: dict[str, Any], *, adam_w_mode: bool, fp32_optimizer_states: bool = True
    ) -> None:
        self.adam_w_mode = adam_w_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        _check_hyper(defaults, "")
        super().__init__(params, defaults)
        self._backend = _load_backend()

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
        if self._overflowed():
            return loss
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
        update = self._backend.prepare_group(where, hyper, group["params"], self.state)
        if update is not None:
            return update, False
        found = with_grads(group, where)
        batch = AdamBatch(
            names=[name for name, _, _ in found],
            hyper=hyper,
            params=[param for _, param, _ in found],
            grads=[grad for _, _, grad in found],
            states=[self.state.get(param) or {} for _, param, _ in found],
        )
        if all(state.keys() >= {"step", *batch.state_keys} for state in batch.states):
            return self._backend.prepare(batch), False
        check_params_and_grads(batch)
        batch.states = self._with_new_states(batch.params, batch.states, batch.state_keys)
        update_batch = self._backend.prepare(batch)

        def update_and_keep_states() -> None:
            update_batch()
            self.state.update(zip(batch.params, batch.states, strict=True))

        return update_and_keep_states, True

    def _overflowed(self) -> bool:
        """Whether torch.amp.GradScaler, which sets `found_inf` while it steps, found infs or NaNs in the grads."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf.item())

    def _hyper(self, group: dict[str, Any], where: str) -> AdamHyper:
        """The group's hyper-parameters, checked, with the loss scale that torch.amp.GradScaler sets for a step."""
        loss_scale = getattr(self, "grad_scale", None)
        hyper = AdamHyper.of_group(group, self.adam_w_mode, 1.0 if loss_scale is None else float(loss_scale))
        _check_betas(hyper.beta1, hyper.beta2, f" in {where}")
        return hyper

    def _with_new_states(
        self, params: list[Tensor], states: list[dict[str, Any]], needed: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """The states with what they lack: a step count of 0, and zeros."""
        completed = [{"step": 0, **state} for state in states]
        for key in needed:
            lacking = [i for i, state in enumerate(completed) if key not in state]
            like = [params[i] for i in lacking]
            for i, zeros in zip(lacking, self._backend.zeros_like(like, self._state_dtypes(like)), strict=True):
                completed[i][key] = zeros
        return completed

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
        if "state" in state and "param_groups" in state:
            state["state"] = adopted_states(state["state"], state["param_groups"], state["fp32_optimizer_states"])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
        if not hasattr(self, "_backend"):
            self._backend = _load_backend()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "adam_w_mode": self.adam_w_mode,
            "fp32_optimizer_states": self.fp32_optimizer_states,
        }


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

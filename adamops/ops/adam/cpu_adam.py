"""DeepSpeedCPUAdam: Adam and AdamW for params in host memory, as in deepspeed.ops.adam."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ... import op_builder
from .batch import (
    STATE_TENSORS,
    AdamBatch,
    check_no_overlap,
    check_param,
    check_params_and_grads,
    check_state,
    like_param,
)
from .hyper import AdamHyper
from .native_backend import NativeBackend
from .rollback import undo_step
from .torch_adam import TorchBackend


class _Shielded:
    """Carries a state tensor through Optimizer.load_state_dict, which would cast it to the param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _load_backend() -> NativeBackend | TorchBackend:
    """The compiled op, or torch calls with one warning that says why."""
    try:
        return NativeBackend(op_builder.get("cpu_adam").load())
    except op_builder.OpUnavailableError as error:
        warnings.warn(f"adamops falls back to torch calls, which are slow. {error}", RuntimeWarning, stacklevel=3)
        op_builder.get("torch_adam").load()
        return TorchBackend()


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of Optimizer without the guard that hides it from torch.compile, where nothing is being compiled.

    The guard imports torch._dynamo when it is first called, which takes about a second; unless someone has imported
    that already, there is nothing to hide from.
    """
    return method if "torch._dynamo" in sys.modules else inspect.unwrap(method)


class DeepSpeedCPUAdam(Optimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) and AdamW (arXiv 1711.05101, Algorithm 2) in one pass over host memory.

    A drop-in for ``deepspeed.ops.adam.DeepSpeedCPUAdam`` and a true ``torch.optim.Optimizer``. Each step is one
    parallel region per param group, on torch's own threads. Results are the same bits on every CPU, for every number of
    threads and however the elements are cut into tensors.

    Parameters
    ----------
    model_params
        Params to optimise, or dicts of param groups, which may have settings of their own. Each param is a dense tensor
        in host memory of any shape and strides, of float32, bfloat16 or float16. Its grad has the same dtype or
        float32.
    lr
        Learning rate, 0 or more; a float or a 0-dim tensor.
    bias_correction
        Whether to correct the averages for their start at zero.
    betas
        Decay rates of the two averages, each in [0, 1).
    eps
        Added to the denominator, 0 or more.
    weight_decay
        0 or more. With `adamw_mode` the param is multiplied by ``1 - lr * weight_decay``; otherwise ``weight_decay *
        param`` is added to the grad (L2).
    amsgrad
        Whether to use the largest second moment so far (arXiv 1904.09237, Algorithm 2).
    adamw_mode
        AdamW if true, Adam with L2 otherwise.
    fp32_optimizer_states
        Whether states are float32 for params of every dtype; otherwise they have the param's dtype.
    maximize
        Whether to ascend.

    Raises
    ------
    ValueError
        For a hyper-parameter out of its range, or a param whose elements overlap or leave gaps.
    TypeError
        For a param of another dtype or layout.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        *,
        maximize: bool = False,
    ) -> None:
        self.adam_w_mode = adamw_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        _check_hyper(defaults, "")
        super().__init__(model_params, defaults)
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
        loss = _evaluate(closure)
        groups = [(f"param group {i}", group) for i, group in enumerate(self.param_groups)]
        prepared = [self._prepare(group, where) for where, group in groups]
        if any(states_are_new for _, states_are_new in prepared):
            check_no_overlap({name: param for where, group in groups for name, param, _ in _with_grads(group, where)})
        for update, _ in prepared:
            update()
        return loss

    def _prepare(self, group: dict[str, Any], where: str) -> tuple[Callable[[], None], bool]:
        """What updates the group when called, and whether any of its states is new and not yet in self.state."""
        hyper = AdamHyper.of_group(group, self.adam_w_mode)
        _check_betas(hyper.beta1, hyper.beta2, f" in {where}")
        update = self._backend.prepare_group(where, hyper, group["params"], self.state)
        if update is not None:
            return update, False
        found = _with_grads(group, where)
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

    @torch.no_grad()
    def step_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the one param that has a grad, with the state kept under `subgroup_id` instead of the param.

        DeepSpeed's ZeRO-3 and SuperOffload lend the optimizer one flat shard after another this way, each time as the
        only param with a grad.

        Raises
        ------
        ValueError
            If not exactly one param has a grad, or as step().
        """
        loss = _evaluate(closure)
        batch = self._subgroup_batch(subgroup_id)
        held = self.state.get(subgroup_id)  # type: ignore[call-overload]
        batch.states = self._with_new_states(batch.params, [held or {}], batch.state_keys)
        self._backend.prepare(batch)()
        self.state[subgroup_id] = batch.states[0]  # type: ignore[index]
        return loss

    @torch.no_grad()
    def rollback_subgroup(self, sub_group_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Undoes the last step_subgroup() of `sub_group_id`, given the grad and hyper-parameters of that step.

        The update is inverted by arithmetic in float64, not restored from a copy: see adamops.ops.adam.rollback for how
        near the former values it comes. The state before the first step, which is zero, is restored exactly.

        Raises
        ------
        RuntimeError
            If there is no step to undo, or it cannot be undone (amsgrad forgets, as does a beta of 0).
        ValueError
            If not exactly one param has a grad, or as step().
        """
        loss = _evaluate(closure)
        state = self.state.get(sub_group_id)  # type: ignore[call-overload]
        if not state:
            raise RuntimeError(f"Cannot roll back subgroup {sub_group_id}: it was never stepped")
        if state["step"] < 1:
            raise RuntimeError(f"Cannot roll back subgroup {sub_group_id}: all its steps have been undone")
        batch = self._subgroup_batch(sub_group_id)
        (param,), (grad,) = batch.params, batch.grads
        check_state(state, param, batch.names[0])
        undo_step(param, grad, state, batch.hyper)
        state["step"] -= 1
        return loss

    def _subgroup_batch(self, subgroup_id: int) -> AdamBatch:
        """The only param that has a grad, checked; without its state."""
        found = [
            (group, param, grad)
            for group in self.param_groups
            for param in group["params"]
            if (grad := param.grad) is not None
        ]
        if len(found) != 1:
            raise ValueError(
                f"a subgroup is the one param that has a grad, but {len(found)} have one; "
                "use step() to update many, or set the other grads to None"
            )
        ((group, param, grad),) = found
        where = f"subgroup {subgroup_id}"
        hyper = AdamHyper.of_group(group, self.adam_w_mode)
        _check_betas(hyper.beta1, hyper.beta2, f" in {where}")
        batch = AdamBatch([where], hyper, [param], [grad], [])
        check_params_and_grads(batch)
        return batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this class, of torch.optim.Adam or AdamW, or of DeepSpeed's CPU Adam.

        Tensors of the state are taken as they are where they fit, and converted to this optimizer's state dtype
        otherwise.

        Raises
        ------
        ValueError, TypeError
            If a state does not fit its param; the optimizer is then as it was.
        """
        handle = self.register_load_state_dict_pre_hook(_shield_states)  # last, so it sees what other hooks return
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by unpickling and, with loaded state, by load_state_dict()."""
        state = {**state}
        state.setdefault("fp32_optimizer_states", getattr(self, "fp32_optimizer_states", True))
        if "state" in state and "param_groups" in state:
            state["state"] = _adopted_states(state["state"], state["param_groups"], state["fp32_optimizer_states"])
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


CPUAdam = DeepSpeedCPUAdam


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with autograd on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_grads(group: dict[str, Any], where: str) -> list[tuple[str, Tensor, Tensor]]:
    """The name, the param and the grad of each param that has a grad."""
    return [
        (f"{where}, param {i}", param, param.grad) for i, param in enumerate(group["params"]) if param.grad is not None
    ]


def _shield_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the tensors of the states shielded from Optimizer.load_state_dict's casts."""
    shielded = {
        key: {name: _Shielded(value) if name in STATE_TENSORS else value for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def _adopted_states(states: dict[Any, Any], groups: list[dict[str, Any]], fp32: bool) -> defaultdict[Any, Any]:
    """Loaded states, checked, as this optimizer keeps them: steps as ints, tensors in dtype and layout as new ones."""
    adopted: defaultdict[Any, Any] = defaultdict(dict)
    names = {
        param: f"param group {g}, param {i}"
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    }
    for key, entry in states.items():
        if not isinstance(entry, dict):
            adopted[key] = entry
            continue
        state = {name: value.tensor if isinstance(value, _Shielded) else value for name, value in entry.items()}
        if "step" in state:
            state["step"] = int(state["step"])
        if isinstance(key, Tensor):
            state.update(_converted_tensors(state, key, names.get(key, "a param"), fp32))
        adopted[key] = state
    return adopted


def _converted_tensors(state: dict[str, Any], param: Tensor, name: str, fp32: bool) -> dict[str, Tensor]:
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
    if state and missing:
        raise ValueError(
            f"{name} has no {', '.join(map(repr, missing))} in its state but {', '.join(map(repr, state))}; "
            "this is not the state of an Adam optimizer"
        )
    dtype = torch.float32 if fp32 else param.dtype
    converted = {
        key: state[key].to(device=param.device, dtype=dtype)
        for key in STATE_TENSORS
        if isinstance(state.get(key), Tensor)
    }
    check_state({**state, **converted}, param, name)
    return {key: like_param(value, param) for key, value in converted.items()}


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

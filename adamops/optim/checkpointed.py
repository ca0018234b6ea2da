"""The part of an optimizer that saves and loads: state dicts, pickles, and params as float32 tensors.

Must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch_compat
from .async_step import after_async_step
from .checkpoint.loading import adopted_states, keep_own_settings, shield_states
from .checkpoint.pickling import share_step_counts, with_missing_attributes
from .checkpoint.saving import saved_state
from .dynamo_disabled import unguarded
from .float_environment import in_default_float_environment
from .fp32_params import checked_master, fp32_param, load_fp32_params
from .group_precisions import GroupPrecisions, checked_precision
from .rule import Rule
from .state.precision import SETTINGS, Precision


class CheckpointedOptimizer(Optimizer):
    """An optimizer whose states may be quantized, and whose params may have master weights in their states."""

    rule: Rule
    _precision: Precision
    _group_precisions: GroupPrecisions
    _shared: dict[str, Any]

    def _settle(self) -> None:
        """Waits for the background step, if there is one."""
        raise NotImplementedError

    @after_async_step
    @in_default_float_environment
    def state_dict(self, dequantize: bool = False) -> dict[str, Any]:
        """The state and settings, as torch.optim.Optimizer returns them.

        With `dequantize`, states are float32 whatever they are here, and what belongs to the params' precision is left
        out: an optimizer of torch with this rule can load the result. All states of DTensors are DTensors that
        torch.distributed.checkpoint can reshard, with float32 in place of quantized states; see portable_state_dicts().
        """

        def convert(state_dict: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: saved_state(entry, self.rule.states, dequantize) for key, entry in state_dict["state"].items()
            }
            groups = [
                {key: value for key, value in group.items() if key not in SETTINGS}
                for group in state_dict["param_groups"]
            ]
            return {**state_dict, "state": state, "param_groups": groups}

        return _torch_compat.converted_state_dict(self, unguarded(Optimizer.state_dict), convert)

    @after_async_step
    @in_default_float_environment
    @torch.no_grad()
    def fp32_params(self) -> list[Tensor]:
        """The params of all groups, in order, as new float32 tensors; from the master weights where there are any.

        For DTensors they are DTensors with the same placements. Params that are not floating-point, such as the frozen
        ones of quantized models, are copied as they are.
        """
        own = self._params_with_precision()
        for i, (param, precision) in enumerate(own):
            checked_master(param, self.state.get(param) or {}, precision, f"param {i}")
        return [fp32_param(param, self.state.get(param) or {}, precision) for param, precision in own]

    def _params_with_precision(self) -> list[tuple[Tensor, Precision]]:
        return [
            (param, precision)
            for i, group in enumerate(self.param_groups)
            for precision in [self._group_precisions.of(group, f"param group {i}", self._precision)]
            for param in group["params"]
        ]

    @after_async_step
    @in_default_float_environment
    @torch.no_grad()
    def load_fp32_params(self, params: Sequence[Tensor]) -> None:
        """Sets the params of all groups, in order, and their master weights from float32 tensors, as from a checkpoint.

        For DTensors these must be DTensors with the same placements; for params that are not floating-point, tensors
        of the same dtype.

        Raises
        ------
        ValueError, TypeError
            If there are too few or too many, or a shape, dtype or placement differs; the params are then unchanged.
        """
        load_fp32_params(self._params_with_precision(), params, self.state)

    @after_async_step
    @in_default_float_environment
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of one of torch, DeepSpeed or apex with this rule.

        State tensors that fit are taken as they are. Others are converted to this optimizer's state dtype.

        Raises
        ------
        ValueError, TypeError
            If it is not the state dict of an optimizer, or a state does not fit its param; the optimizer is then
            unchanged.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Invalid state dict: a {type(state_dict).__name__}; expected a dict")
        is_called_for = True

        def shield(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # A signal handler may raise before the hook is removed; it must then do nothing.
            return shield_states(state_dict, self.rule.states) if is_called_for else state_dict

        handle = None
        try:
            handle = self.register_load_state_dict_pre_hook(shield)  # last, to see what other hooks return
            unguarded(Optimizer.load_state_dict)(self, state_dict)
        finally:
            is_called_for = False
            if handle is not None:
                handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by unpickling and, with loaded state, by load_state_dict()."""
        is_pickled, is_loaded = "defaults" in state, "state" in state and "param_groups" in state
        state = with_missing_attributes(state, self.rule) if is_pickled else {**state}
        if is_loaded:
            groups = state["param_groups"]
            if is_pickled:
                self._precision = state["_precision"]
            else:
                keep_own_settings(groups, self.param_groups)
            precisions = [checked_precision(g, f"param group {i}", self._precision) for i, g in enumerate(groups)]
            state["state"] = adopted_states(state["state"], groups, precisions, self.rule)
            for i, group in enumerate(groups):
                self.rule.check_loaded_group(group, f"param group {i}")
        super().__setstate__(state)
        for group in self.param_groups:
            self.rule.add_missing_settings(group)
            group.setdefault("maximize", False)
            if "capturable" in self.defaults:
                group.setdefault("capturable", False)
            if "stochastic_rounding_seed" in self.defaults:
                group.setdefault("stochastic_rounding_seed", self.defaults["stochastic_rounding_seed"])
        if is_loaded:
            self._group_precisions.clear()
            for group, precision in zip(self.param_groups, precisions, strict=True):
                self._group_precisions.keep(group, precision)
            self._shared["was_loaded"] = True  # the next step checks params for shared memory, as the first does

    @after_async_step
    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            share_step_counts(self.state.values())
        return {**super().__getstate__(), "_precision": self._precision}

"""Checks a param group before an optimizer takes it. Must not know of states, nor which settings a rule has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from . import dtensor
from .batch import check_param
from .rule import Rule
from .settings import check_flags, checked_seed

_FLAGS = ("maximize", "capturable")  # settings of every rule


def check_settings(rule: Rule, group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Raises TypeError or ValueError for an invalid setting of a group; `where` is empty for the optimizer's own."""
    settings, in_group = {**defaults, **group}, f" in {where}" if where else ""
    check_flags({key: settings[key] for key in _FLAGS if key in settings}, in_group)
    rule.check_group(group, defaults, where)
    checked_seed(settings.get("stochastic_rounding_seed"), in_group)


def checked_params(group: Mapping[str, Any], where: str) -> Any:
    """The group's params as a list, or as whatever the base class refuses in words. Raises for an unusable param."""
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    elif not isinstance(params, set):  # the base class explains what is wrong with a set
        params = list(params)
    for i, entry in enumerate(params):
        param = entry[1] if isinstance(entry, tuple) else entry  # named_parameters() gives pairs
        # Params that are not on the CPU are accepted for now: ZeRO-Offload takes an optimizer built for the model on
        # the GPU, then puts its own CPU shards into the groups. Params of lazy layers have no shape yet. Frozen params
        # may be of any kind, such as those of quantized models. step() checks every param that gets a grad.
        if not isinstance(param, Tensor) or is_lazy(param) or _is_frozen(param):
            continue
        dtensor.check_placed(param, f"{where}, param {i}")
        if param.device.type == "cpu":
            check_param(dtensor.local(param), f"{where}, param {i}")
    return params


def _is_frozen(param: Tensor) -> bool:
    """Whether a param gets no grad. A plain tensor is not frozen: its user may give it one."""
    return isinstance(param, Parameter) and not param.requires_grad

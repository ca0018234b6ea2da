"""Adam and AdamW on lists of tensors, in one pass, for engines that keep params, grads and states themselves.

The updates, their checks and their bits are those of the optimizers. docs/frameworks/engines.md shows an engine.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .ops.adam.adam import ADAM, ADAMW
from .optim.batch import MOST_STEPS
from .optim.dynamo_disabled import dynamo_disabled
from .optim.rule import Rule
from .optim.settings import check_flags, shown, to_number
from .optim.state.precision import Master, Precision
from .optim.step_settings import StepSettings, rng_offset
from .optim.tensor_lists import TensorLists, check_tensor, step_on_lists

__all__ = ["adam_", "adamw_"]

Tensors: TypeAlias = Iterable[Tensor]
SomeTensors: TypeAlias = Iterable[Tensor | None]


@dynamo_disabled
def adamw_(
    params: Tensors,
    grads: SomeTensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors | None = None,
    state_steps: Tensors | None = None,
    *,
    step: int | None = None,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    bias_correction: bool = True,
    decoupled_weight_decay: bool = True,
    block_scales: SomeTensors | None = None,
    master_params: SomeTensors | None = None,
    param_remainders: SomeTensors | None = None,
    lowp_outs: SomeTensors | None = None,
    zero_grads: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: float | Tensor | None = None,
    stochastic_rounding: bool = False,
    stochastic_rounding_seed: int = 0,
) -> None:
    """One step of AdamW (arXiv 1711.05101, Algorithm 2) on lists of tensors, in place and in one pass.

    All lists are as long as `params`. The tensors of one param have its shape, device and memory layout. Everything is
    checked before anything is written. The bits are those of a step of FusedAdam on the same tensors.

    Parameters
    ----------
    params
        Dense tensors in float32, bfloat16 or float16.
    grads
        Their grads, in the dtype of the param or float32, or any of the three for a float32 param. A param with None is
        left alone.
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs
        The states of each param, all of one dtype: float32, bfloat16 or float16; or 8-bit, of int8 for exp_avgs and
        uint8 for the others, with `block_scales`. With max_exp_avg_sqs this is AMSGrad.
    state_steps
        The number of steps done, as a tensor of one element for each param, in memory of its own. It goes up by 1. On
        the device of its param in float32, it is not read on the host, and the call is CUDA-graph capturable.
    step
        Instead of `state_steps`: the number of this step for all params, 1 for the first.
    lr, beta1, beta2, eps, weight_decay, maximize
        As in torch.optim.AdamW. `lr` may be a tensor on a CUDA device, and is not read on the host then.
    bias_correction
        Whether averages are corrected for their start at zero.
    decoupled_weight_decay
        As in torch.optim.Adam; adam_() is this function without it.
    block_scales
        For 8-bit states, a contiguous bfloat16 tensor with a row for each 256 elements, and a column for each state;
        zeros at first.
    master_params
        For 16-bit params, their float32 master weights; None for float32 params.
    param_remainders
        Or what completes the 16-bit params to master weights of 24 bits (int8) or 32 bits (int16); zeros at first.
    lowp_outs
        Where to also write the new params, in bfloat16 or float16, rounded to nearest; or None.
    zero_grads
        Whether to also set the grads to zero.
    grad_scale
        What the loss was multiplied by, as by torch.amp.GradScaler: the grads are divided by it. To clip the grads as
        well, divide it by the factor.
    found_inf
        Not 0 to skip the step: nothing is updated or counted. Grads are still set to zero if `zero_grads` says so, and
        copies written. Tensors on a CUDA device are not read on the host.
    stochastic_rounding, stochastic_rounding_seed
        As in FusedAdam, for params without master weights or with those of 24 bits. The bits are those of its first
        param group.

    Raises
    ------
    TypeError, ValueError
        As FusedAdam and its step() raise, before anything is written: for tensors that do not belong together, lists of
        different lengths and numbers out of range; for tensors to be written that share memory with one another, or
        with a grad other than their own.
    """
    flags = {"maximize": maximize, "bias_correction": bias_correction, "zero_grads": zero_grads}
    check_flags({**flags, "decoupled_weight_decay": decoupled_weight_decay, "stochastic_rounding": stochastic_rounding})
    given = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    masters = {"master_params": master_params, "param_remainders": param_remainders}
    others = {"state_steps": state_steps, "block_scales": block_scales, "lowp_outs": lowp_outs}
    lists = _as_lists({"params": params, **given, **masters, **others})
    states = [lists[name] for name in list(given)[1:] if lists[name] is not None]
    kind = _kind_of_masters(lists["master_params"], lists["param_remainders"])
    rule = ADAMW if decoupled_weight_decay else ADAM
    hyper = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    seed = {"stochastic_rounding_seed": stochastic_rounding_seed}
    settings = StepSettings(
        rule,
        _checked_hyper(rule, {**hyper, "bias_correction": bias_correction}),
        rule.states_of({"amsgrad": len(states) == 3}),
        bool(maximize),
        _precision(kind, bool(stochastic_rounding)),
        loss_scale=1.0 if grad_scale is None else to_number(grad_scale, "grad_scale"),
        found_inf=None if found_inf is None else to_number(found_inf, "found_inf"),
        zero_grads=bool(zero_grads),
        rng_offset=rng_offset(seed, "param group 0") if stochastic_rounding else 0,
    )
    of_kind = lists["master_params" if kind is Master.FP32 else "param_remainders"]
    count = _count_before(step, lists["state_steps"])
    step_on_lists(
        settings,
        TensorLists(lists["params"], lists["grads"], states, count, lists["block_scales"], of_kind, lists["lowp_outs"]),
    )


def adam_(
    params: Tensors,
    grads: SomeTensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors | None = None,
    state_steps: Tensors | None = None,
    *,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    **others: Any,
) -> None:
    """One step of Adam (arXiv 1412.6980, Algorithm 1), with L2 weight decay: adamw_() with other defaults.

    `others` are the other keyword arguments of adamw_(): step, lr, beta1, beta2, eps, maximize and so on.
    """
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps
    adamw_(*lists, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay, **others)


def _checked_hyper(rule: Rule, group: dict[str, Any]) -> tuple[Any, ...]:
    """The rule's hyper-parameters as numbers. A learning rate on a GPU stays there, and its range is not checked."""
    hyper = rule.hyper_of_group(group, "", to_number)
    lr, _, _, eps, weight_decay, *_ = hyper
    is_on_gpu = isinstance(lr, Tensor)
    if not ((is_on_gpu or lr >= 0.0) and eps >= 0.0 and weight_decay >= 0.0):
        rule.check_group({**group, "lr": 0.0} if is_on_gpu else group, {}, "")  # raises
    return hyper


def _kind_of_masters(master_params: list[Any] | None, param_remainders: list[Any] | None) -> Master:
    """What the 16-bit params are completed by. Raises for both lists, and for remainders of another dtype."""
    if master_params is not None and param_remainders is not None:
        raise ValueError("master_params and param_remainders: give one of them")
    if master_params is not None:
        return Master.FP32
    if param_remainders is None:
        return Master.NONE
    kinds = {torch.int8: Master.REMAINDER_8, torch.int16: Master.REMAINDER_16}
    for i, remainder in enumerate(param_remainders):
        if remainder is None:
            continue
        check_tensor(remainder, f"param_remainders[{i}]")
        if remainder.dtype not in kinds:
            raise TypeError(f"param_remainders[{i}] is of {remainder.dtype}; use torch.int8 or torch.int16")
        return kinds[remainder.dtype]
    return Master.REMAINDER_16  # there are none: each 16-bit param lacks one


@functools.cache
def _precision(master: Master, stochastic_rounding: bool) -> Precision:
    return Precision(master=master, stochastic_rounding=stochastic_rounding)


def _as_lists(given: dict[str, Any]) -> dict[str, Any]:
    """The sequences as lists as long as the first, None for None. An empty list of states that are optional is None.

    Raises TypeError or ValueError for other objects and other lengths.
    """
    lists: dict[str, Any] = {}
    length = 0
    for name, values in given.items():
        if type(values) is not list and (values is not None or name == "params"):
            if isinstance(values, (Tensor, str, dict)) or not isinstance(values, Iterable):
                raise TypeError(f"{name} is a {type(values).__name__}; expected a list of tensors")
            values = list(values)
        if name == "params":
            length = len(values)
        elif name == "max_exp_avg_sqs" and values == []:  # how torch's adamw() says that there are none
            values = None
        elif values is not None and len(values) != length:
            raise ValueError(f"{name} has {len(values)} entries, expected {length}, one for each param")
        lists[name] = values
    return lists


def _count_before(step: Any, state_steps: list[Any] | None) -> int | list[Any]:
    """The count before this step, or the tensors with those of each param."""
    if (step is None) == (state_steps is None):
        raise TypeError("step and state_steps: give one of them, the number of this step or tensors that count steps")
    if state_steps is not None:
        return state_steps
    try:
        if isinstance(step, Tensor):
            raise TypeError
        count = operator.index(step)
    except TypeError:
        raise TypeError(
            f"Invalid step: {shown(step)}; expected an int of 1 or more, or tensors as state_steps"
        ) from None
    if not 1 <= count <= MOST_STEPS:
        raise ValueError(f"Invalid step: {count}; expected 1 for the first step, and at most {MOST_STEPS}")
    return count - 1

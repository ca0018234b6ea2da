"""Adam and AdamW with the names, arguments and defaults of torch.optim's, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...optim.rule import Flag, Rule
from .adam import AdamRule
from .adam_optimizer import AdamOptimizer


class _Implementation(Flag):
    """Asks torch for one of its implementations; None leaves the choice to torch. Kept, and without effect here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.default = None

    def check(self, value: Any, where: str) -> None:
        if value is not None:
            super().check(value, where)


class _Differentiable(Flag):
    """Asks for a step that autograd records."""

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        if value:
            raise ValueError(
                f"Invalid {self.name}: True{where}; a step of adamops writes params in place, and autograd does not "
                "record it; use torch.optim for a step to differentiate through"
            )


class _TorchAdamRule(AdamRule):
    """Adam's rule for param groups that have torch's settings."""

    settings = (
        *(setting for setting in AdamRule.settings if setting.name != "bias_correction"),
        _Implementation("foreach"),
        _Implementation("fused"),
        _Differentiable("differentiable"),
    )
    hyper_names = AdamRule.hyper_names

    def __init__(self, adamw_mode: bool) -> None:
        super().__init__(adamw_mode)
        self.settings = (*type(self).settings, Flag("decoupled_weight_decay", adamw_mode))  # type: ignore[misc]

    def hyper_of_group(self, group: Mapping[str, Any], where: str, to_number: Callable[..., Any]) -> tuple[Any, ...]:
        *numbers, _ = super().hyper_of_group(group, where, to_number)
        return (*numbers, 1.0 if self._is_decoupled(group) else 0.0)

    def in_words(self, groups: Sequence[Mapping[str, Any]]) -> str:
        decoupled = set(map(self._is_decoupled, groups)) or {self._adamw_mode}
        if len(decoupled) == 2:
            return "Adam: weight decay decoupled, or added to the grads, by param group"
        return str(_ADAMW if decoupled.pop() else _ADAM)

    def _is_decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", self._adamw_mode))

    def check_group(self, group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        Rule.check_group(self, group, defaults, where)  # not AdamRule's: here groups may differ in their weight decay
        if all(group.get(name, defaults.get(name)) for name in ("foreach", "fused")):
            raise ValueError("`fused` and `foreach` cannot be `True` together" + (f" in {where}" if where else ""))


_ADAMW, _ADAM = _TorchAdamRule(adamw_mode=True), _TorchAdamRule(adamw_mode=False)


class Adam(AdamOptimizer):
    """Adam (arXiv 1412.6980, Algorithm 1) with the signature and the defaults of ``torch.optim.Adam``.

    A program that uses ``torch.optim.Adam`` uses this one after a change of that name. The compiled ops do the step:
    the CPU op for params on the CPU, the CUDA op for those on CUDA devices. State dicts go both ways.

    What goes beyond torch, as 8-bit states, master weights or stochastic rounding, is in FusedAdam. Step counts in
    ``state[param]["step"]`` are ints, where torch has tensors, unless steps are captured or scaled on a GPU.

    Parameters
    ----------
    params
        Params to optimize, named or not, or dicts of param groups. Each param is a dense tensor in float32, bfloat16 or
        float16. States are float32 for all of them, where torch's have the params' dtype.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in torch, numbers or tensors of one element.
    capturable
        Whether steps on CUDA devices are CUDA-graph capturable. Has no effect on the CPU.
    foreach, fused
        Accepted and kept in the param groups, for torch if it loads their state dict. There is one implementation here.
    differentiable
        Must be false: autograd does not record a step.

    Raises
    ------
    ValueError, TypeError
        As in DeepSpeedCPUAdam; also for ``differentiable=True``, and for `foreach` and `fused` together.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(
            params,
            adam_w_mode=decoupled_weight_decay,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    @property
    def rule(self) -> AdamRule:  # type: ignore[override]
        """AdamW or Adam."""
        return _ADAMW if self.adam_w_mode else _ADAM


class AdamW(Adam):
    """AdamW (arXiv 1711.05101, Algorithm 2) with the signature and the defaults of ``torch.optim.AdamW``.

    Like Adam, but for weight decay, which is decoupled, and 0.01 by default. What goes beyond torch, as 8-bit states,
    master weights or stochastic rounding, is in FusedAdam.

    Parameters
    ----------
    params
        Params to optimize, named or not, or dicts of param groups. Each param is a dense tensor in float32, bfloat16 or
        float16. States are float32 for all of them, where torch's have the params' dtype.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As in torch, numbers or tensors of one element.
    capturable
        Whether steps on CUDA devices are CUDA-graph capturable. Has no effect on the CPU.
    foreach, fused
        Accepted and kept in the param groups, for torch if it loads their state dict. There is one implementation here.
    differentiable
        Must be false: autograd does not record a step.

    Raises
    ------
    ValueError, TypeError
        As in DeepSpeedCPUAdam; also for ``differentiable=True``, and for `foreach` and `fused` together.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also those of a checkpoint of Adam, as in torch
            group["decoupled_weight_decay"] = True

"""The base class of all optimizers: a torch.optim.Optimizer whose step hands whole param groups to the op of its rule.

step() is short: resolve the settings, prepare all groups (step.py), commit (commit.py). Must not know any one rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import dtensor
from .amp import StepSupportsAmpScaling
from .async_step import AsyncStep, ForBackground, after_async_step, start_step
from .backends.base import Backend
from .backends.loading import load_backend
from .checkpointed import CheckpointedOptimizer
from .clip_grad_norm import clip_grad_norm, grad_factor
from .clipping import ClippedGrads
from .commit import commit
from .description import described
from .dynamo_disabled import dynamo_disabled, unguarded
from .float_environment import in_default_float_environment
from .grads import check_not_quantized, with_grads
from .group_precisions import GroupPrecisions, checked_precision
from .memory import check_readable, check_writable
from .param_groups import check_settings, checked_params
from .profiled import profiled
from .settings import checked_seed, to_number
from .state.precision import EIGHT_BIT, Precision, precision_of
from .step import Before, GroupToStep, check_shared_memory, checked_lowp_outs, evaluate, prepare, prepare_group
from .step_settings import StepSettings
from .step_settings import rng_offset as rng_offset_of
from .wrapper_shared_attribute import WrapperSharedAttribute

_CPU = torch.device("cpu")
# Called for each param group of any optimizer, with whether its states are quantized to 8 bits.
group_watchers: list[Callable[[bool], object]] = []
# Called with an optimizer and the caller's frame when its defaults are read. They may raise.
defaults_watchers: list[Callable[[Any, FrameType], object]] = []


class RuleOptimizer(CheckpointedOptimizer):
    """An optimizer with any rule, for params on any device.

    A subclass has the rule as its attribute `rule`, and a constructor with the rule's settings and defaults, which
    passes on all other arguments.

    Under torch.amp.GradScaler the step itself unscales the grads. It reads them and does not write them.

    Parameters
    ----------
    params
        Params to optimize, or dicts of param groups.
    fp32_optimizer_states, master_weights, state_dtype, master_weight_bits, maximize
        As the classes of adamops.ops.adam describe them.
    stochastic_rounding, stochastic_rounding_seed, capturable
        Likewise. Param groups have `capturable` as a setting only if it is given.
    settings
        The settings of the rule, each with its default.

    Raises
    ------
    ValueError, TypeError
        For a setting that is invalid, missing or unknown, or a param that cannot be updated.
    """

    _clipped = WrapperSharedAttribute[ClippedGrads | None](None)  # the clip factor and its grads
    _running = WrapperSharedAttribute[AsyncStep | None](None)  # the step now running in the background
    _params_in_backward = WrapperSharedAttribute[int](0)  # number that adamops.step_in_backward() updates
    _to_number = staticmethod(to_number)  # converts hyper-parameters; those on a GPU stay there
    _step_supports_amp_scaling = StepSupportsAmpScaling()  # the attribute that GradScaler looks for

    def __init__(
        self,
        params: Any,
        *,
        fp32_optimizer_states: bool = True,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        stochastic_rounding_seed: int | None = None,
        maximize: bool = False,
        capturable: bool | None = None,
        **settings: Any,
    ) -> None:
        if unknown := settings.keys() - {setting.name for setting in self.rule.settings}:
            raise TypeError(f"{type(self).__name__}() got an unexpected argument {min(unknown)!r}")
        self._shared: dict[str, Any] = {}
        self.fp32_optimizer_states = fp32_optimizer_states
        self.master_weights = master_weights
        arguments = {
            "state_dtype": state_dtype,
            "fp32_optimizer_states": fp32_optimizer_states,
            "master_weight_bits": master_weight_bits,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        self._precision = precision_of(arguments, Precision())
        self._group_precisions = GroupPrecisions()
        defaults = {**settings, "maximize": maximize}
        if capturable is not None:
            defaults["capturable"] = capturable
        if stochastic_rounding or stochastic_rounding_seed is not None:
            # A setting, so the state dict has it. Not drawn at random: replicas seed torch's generator differently, for
            # their data.
            defaults["stochastic_rounding_seed"] = checked_seed(stochastic_rounding_seed, "")
        check_settings(self.rule, defaults, {}, "")
        super().__init__(params, defaults)
        self._backends: dict[torch.device, Backend] = {_CPU: load_backend(self.rule, _CPU)}

    def __repr__(self) -> str:
        return described(self, super().__repr__())

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of param groups that do not set their own."""
        for watcher in defaults_watchers:
            watcher(self, sys._getframe(1))
        if "defaults" not in self.__dict__:
            raise AttributeError("defaults")  # for a wrapper of this class, which then asks the optimizer
        defaults: dict[str, Any] = self.__dict__["defaults"]
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.__dict__["defaults"] = value

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps step() with hooks and profiling, as Optimizer does, and hides all of it from torch.compile."""
        return dynamo_disabled(profiled(func, RuleOptimizer._steps_in_backward))

    @after_async_step
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer does, after checking its settings and params."""
        where = f"param group {len(self.param_groups)}"
        check_settings(self.rule, param_group, self.defaults, where)
        precision = checked_precision(param_group, where, self._precision)
        param_group["params"] = checked_params(param_group, where)
        unguarded(Optimizer.add_param_group)(self, param_group)  # keeps the dict itself; others rely on that
        if precision.stochastic_rounding:
            param_group.setdefault("stochastic_rounding_seed", 0)
        self._group_precisions.keep(param_group, precision)
        for watcher in group_watchers:
            watcher(precision.state_dtype == EIGHT_BIT)

    @after_async_step
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the grads to None or to zero, as torch.optim.Optimizer does."""
        self._clipped = None
        if not set_to_none:
            for i, group in enumerate(self.param_groups):
                for index, name, _, grad in with_grads(group, f"param group {i}"):
                    # torch itself raises for zero tensors, but not for those inside DTensors.
                    is_sharded = dtensor.is_sharded(group["params"][index])
                    (check_writable if is_sharded else check_readable)(grad, f"{name}: its grad")
                    check_not_quantized(grad, f"{name}: its grad")
        unguarded(Optimizer.zero_grad)(self, set_to_none)

    @after_async_step
    @in_default_float_environment
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips all grads to a maximum norm, as ``torch.nn.utils.clip_grad_norm_`` does, but without writing them.

        The grads are read once, for their norm, which is bit-identical for any number of threads. The next step()
        multiplies them by ``min(1, max_norm / (norm + 1e-6))`` as it reads them. The factor belongs to these grads as
        they are now: it is dropped once they are replaced or written, by anyone. If ``self.grad_scale`` is set (what
        the loss was multiplied by), the norm is that of the unscaled grads.

        On a GPU the norm stays on the device, nothing waits for it, and step counts are kept there from then on. If
        grads are on several devices, torch's function does all of it, and writes them.

        Parameters
        ----------
        max_norm
            Maximum norm.
        norm_type
            Order of the norm; may be infinity.
        error_if_nonfinite
            Whether to raise if the norm is infinite or NaN. Otherwise the params become NaN in the next step, as they
            do with torch's function.

        Returns
        -------
        Tensor
            The norm before clipping, a 0-dim float32 tensor. With DTensors it is the norm over all processes: each of
            them must call this, and their results are bit-identical.

        Raises
        ------
        RuntimeError
            If the norm is not finite and `error_if_nonfinite` is set; nothing is clipped then. If params are shards of
            FullyShardedDataParallel, which has its own clip_grad_norm_(). If adamops.step_in_backward() is in use.
        """
        self._refuse_in_backward("clip_grad_norm_()")
        return clip_grad_norm(self, float(max_norm), float(norm_type), error_if_nonfinite)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        zero_grads: bool = False,
        lowp_out: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Updates all params that have a grad.

        Everything is checked before anything is written: if this raises, no param and no state has changed.

        Parameters
        ----------
        closure
            Re-evaluates the model and returns the loss.
        zero_grads
            Whether to also set the grads to zero, in the pass that reads them.
        lowp_out
            For each param of all groups, in order: None, or a bfloat16 or float16 tensor of its shape and strides. The
            same pass writes the new param there, rounded to nearest, for example to be copied to a GPU.

        Returns
        -------
        Any
            The closure's loss, or None.

        Raises
        ------
        TypeError, ValueError
            For a grad or state that does not fit its param (sparse, or of another shape, dtype or device), and for
            params that share memory.
        """
        self._settle()
        background = zero_grads.running if isinstance(zero_grads, ForBackground) else None
        zero_grads = bool(zero_grads)
        loss = None
        if closure is not None:
            loss = evaluate(closure)
            self._settle()  # the closure may have started a step in the background
        # First convert everything that must become a number: it may be an object that runs code of its own.
        factor = grad_factor(self)
        threads = None if background is None else background.threads
        groups = [
            GroupToStep(where, group, self._step_settings(group, where, zero_grads, factor, threads=threads))
            for i, group in enumerate(self.param_groups)
            for where in [f"param group {i}"]
        ]
        self._group_precisions.forget_others(self.param_groups)
        outs = checked_lowp_outs(self.param_groups, lowp_out)
        steps = prepare(self, groups, outs, zero_grads)
        if outs and steps:
            steps[-1].sharded += [out for out in lowp_out or () if out is not None and dtensor.is_sharded(out)]
        check_shared_memory(self, groups, steps)
        commit(self.state, steps, background)
        return loss

    @dynamo_disabled
    def step_async(
        self, *, threads: int | None = None, zero_grads: bool = False, lowp_out: Sequence[Tensor | None] | None = None
    ) -> AsyncStep:
        """Starts a step in the background, and returns a handle whose ``wait()`` returns once the step is done.

        The step uses the current grads and hyper-parameters. Grads may be set to None and learning rates changed in the
        meantime. But until the step is done, nobody may write the grads, nor read or write params and states. Methods
        of the optimizer wait for it. Params on a GPU are updated in the order of torch's current stream, as by step().

        Parameters
        ----------
        threads
            How many threads the step uses; by default as many as step(). Fewer leave cores to the other work.
        zero_grads, lowp_out
            As for step().

        Raises
        ------
        ValueError
            If `threads` is less than 1. All other errors are raised by ``wait()`` or, if that is not called, by the
            next method of the optimizer.
        RuntimeError
            If there are step post-hooks: the step would not be done when they are called.
        """
        return start_step(self, threads, zero_grads, lowp_out)

    def _settle(self) -> None:
        """Waits for the background step, if there is one, and raises its error if nobody has seen it yet."""
        if self._running is not None:
            running = self._running
            try:
                running.settle()
            finally:
                if running.done():
                    self._running = None

    @after_async_step
    @torch.no_grad()
    def step_param(self, group_index: int, index: int) -> None:
        """Updates the param at `index` of a group, as step() would; for adamops.step_in_backward()."""
        where = f"param group {group_index}"
        try:
            self._step_params(group_index, index, index + 1)
        except (TypeError, ValueError) as error:  # it is param 0 there, and the message says so
            raise type(error)(str(error).replace(f"{where}, param 0", f"{where}, param {index}")) from None

    @torch.no_grad()
    def _step_params(
        self, group_index: int, begin: int, end: int, settings: StepSettings | None = None, before: Before | None = None
    ) -> None:
        """Updates params next to each other in a group, as step() would, or as one with these settings would have.

        `before` is called with the prepared step before it is run.
        """
        group, where = self.param_groups[group_index], f"param group {group_index}"
        settings = self._step_settings(group, where) if settings is None else settings
        own = GroupToStep(where, {**group, "params": group["params"][begin:end]}, settings.from_param(begin))
        step = prepare_group(self, own, {})
        if before is not None:
            before(step)
        commit(self.state, [step])

    def _steps_in_backward(self) -> bool:
        """Whether adamops.step_in_backward() updates all params, so that step() has nothing to do."""
        if not self._params_in_backward:
            return False
        params = [param for group in self.param_groups for param in group["params"]]
        return self._params_in_backward == len(params) and all(param.grad is None for param in params)

    def _refuse_in_backward(self, what: str) -> None:
        """Raises RuntimeError if adamops.step_in_backward() is in use: `what` needs grads after the backward pass."""
        if self._params_in_backward:
            raise RuntimeError(
                f"{what} cannot be used while adamops.step_in_backward() updates the params of this optimizer: their "
                "grads are used, and gone, before the backward pass ends; call remove() of its handle first"
            )

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """The backend that updates the param. Raises ValueError if there is none."""
        device = param.device
        if device not in self._backends:
            self._backends[device] = load_backend(self.rule, device)
        return self._backends[device]

    def _step_settings(
        self,
        group: dict[str, Any],
        where: str,
        zero_grads: bool = False,
        grad_factor: float | Tensor | None = None,
        threads: int | None = None,
    ) -> StepSettings:
        """The group's settings, checked, with what torch.amp.GradScaler sets on the optimizer for a step."""
        loss_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rule, precision = self.rule, self._group_precisions.of(group, where, self._precision)
        return StepSettings(
            rule,
            rule.hyper_of_group(group, f" in {where}", self._to_number),
            rule.states_of(group),
            bool(group["maximize"]),
            precision,
            bool(group.get("capturable", False)),
            loss_scale=1.0 if loss_scale is None else self._to_number(loss_scale, "grad_scale"),
            found_inf=None if found_inf is None else self._to_number(found_inf, "found_inf"),
            grad_factor=self._grad_factor() if grad_factor is None else grad_factor,
            zero_grads=zero_grads,
            threads=threads,
            rng_offset=rng_offset_of(group, where) if precision.stochastic_rounding else 0,
        )

    def _grad_factor(self) -> float | Tensor:
        """What to multiply the grads by; see clip_grad_norm_()."""
        return grad_factor(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            if group.get("capturable") and "capturable" in self.defaults:
                self._place_step_counts(group, f"param group {i}")

    def _place_step_counts(self, group: dict[str, Any], where: str) -> None:
        """Moves loaded step counts to where a captured step expects them."""
        hyper = self.rule.hyper_of_group(group, f" in {where}", to_number)
        settings = StepSettings(self.rule, hyper, self.rule.states_of(group), capturable=True)
        for i, param in enumerate(group["params"]):
            state = self.state.get(param)
            if state and "step" in state:
                backend = self._backend_of(param, f"{where}, param {i}")
                state["step"] = backend.new_step_count(settings, state["step"])

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "fp32_optimizer_states": self.fp32_optimizer_states,
            "master_weights": self.master_weights,
        }

"""The base class of the Adam optimizers: a torch.optim.Optimizer whose step hands whole param groups to the op."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import _torch_compat, op_builder
from . import dtensor
from .accelerate import check_not_replaced
from .amp import StepSupportsAmpScaling
from .async_step import AsyncStep, are_one_call, run_in_one_call, run_updates
from .backends.base import Backend, Update
from .backends.cpu import NativeBackend
from .backends.torch import TorchBackend
from .batch import (
    AdamBatch,
    check_lowp_out,
    check_no_overlap,
    check_nothing_lost,
    check_on_cpu,
    check_param,
    check_params_and_grads,
    check_state,
)
from .checkpoint.loading import adopted_states, check_groups, keep_own_settings, shield_states
from .checkpoint.saving import saved_state
from .clipping import ClippedGrads
from .dynamo_disabled import dynamo_disabled
from .float_environment import in_default_float_environment
from .hyper import AdamHyper, to_number
from .interrupts import deferred_signals
from .layout import is_dense, like_param
from .memory import (
    PLAIN_TYPES,
    check_memory,
    check_readable,
    check_still_there,
    check_torch_computes,
    check_viewable,
    check_writable,
    count_writes,
    is_in_memory,
)
from .profiled import profiled
from .settings import FLAGS, check_betas, check_flags, check_hyper, checked_seed
from .state import remainders
from .state.memory_layout import in_layout_of, is_in_layout_of
from .state.precision import (
    AVERAGES,
    EIGHT_BIT,
    MASTER,
    REMAINDER,
    SCALES,
    SETTINGS,
    STATE_TENSORS,
    Master,
    Precision,
    own_settings,
    precision_of,
    scales_shape,
)
from .state.quantized_states import is_quantized, with_held_names
from .wrapper_shared_attribute import WrapperSharedAttribute

_CPU = torch.device("cpu")
# Called for each param group of any optimizer, with whether its states are quantized to 8 bits.
group_watchers: list[Callable[[bool], object]] = []
# By id() of a param group: the group, its own precision settings, the Precision they give, and its number of keys.
_GroupPrecisions: TypeAlias = dict[int, tuple[dict[str, Any], dict[str, Any], Precision, int]]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _load_host_backend() -> Backend:
    """The compiled CPU op, or pure PyTorch with one warning that says why."""
    try:
        return NativeBackend(op_builder.get("cpu_adam").load())
    except op_builder.OpUnavailableError as error:
        return pure_pytorch(str(error))


def pure_pytorch(why: str) -> TorchBackend:
    """The pure PyTorch fallback, with a warning that says why."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("adamops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"adamops falls back to pure PyTorch, which is slow. {why}", RuntimeWarning, stacklevel=level)
    op_builder.get("torch_adam").load()
    return TorchBackend()


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Strips the guard that hides a method of Optimizer from torch.compile, unless something may be compiling.

    At its first call the guard imports torch._dynamo, which takes about a second. If nobody has imported that yet,
    nothing is being compiled, and there is nothing to hide from.
    """
    return method if _torch_compat.may_compile() else inspect.unwrap(method)


def after_async_step(method: _Method) -> _Method:
    """Makes a method of AdamOptimizer wait for the background step first, and hides it from torch.compile."""

    @dynamo_disabled
    @functools.wraps(method)
    def waiting(self: AdamOptimizer, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return method(self, *args, **kwargs)

    return cast(_Method, waiting)


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class GroupStep:
    """A prepared step of a param group, or of part of one. Nothing has been written yet."""

    updates: list[tuple[Backend, Update]]
    new_states: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)  # with their keys in `state`
    after: list[Callable[[], object]] = dataclasses.field(default_factory=list)  # what torch does after the ops
    sharded: list[Tensor] = dataclasses.field(default_factory=list)  # DTensors that the step writes: params and grads
    ran_python: bool = False  # whether preparing it ran Python code of tensor subclasses
    has_new_params: bool = False  # whether some were never checked for shared memory


class _ForBackground(int):
    """What step_async() gives step() as `zero_grads`: by it, step() tells this call from those of step hooks."""

    running: AsyncStep

    def __new__(cls, zero_grads: bool, running: AsyncStep) -> _ForBackground:
        self = super().__new__(cls, bool(zero_grads))
        self.running = running
        return self


class AdamOptimizer(Optimizer):
    """Adam and AdamW for params on the CPU. The public classes differ in their arguments and in what they add.

    Under torch.amp.GradScaler the step itself unscales the grads. It reads them and does not write them.
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
        adam_w_mode: bool,
        fp32_optimizer_states: bool = True,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        stochastic_rounding_seed: int | None = None,
        **defaults: Any,
    ) -> None:
        self._shared: dict[str, Any] = {}
        self.adam_w_mode = adam_w_mode
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
        self._group_precisions: _GroupPrecisions = {}
        if stochastic_rounding or stochastic_rounding_seed is not None:
            # A setting, so the state dict has it. Not drawn at random: replicas seed torch's generator differently, for
            # their data.
            defaults["stochastic_rounding_seed"] = checked_seed(stochastic_rounding_seed, "")
        check_flags({"adam_w_mode": adam_w_mode, **{key: defaults[key] for key in FLAGS if key in defaults}})
        check_hyper(defaults, "")
        super().__init__(params, defaults)
        self._backends: dict[torch.device, Backend] = {_CPU: _load_host_backend()}

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of param groups that do not set their own."""
        check_not_replaced(self, sys._getframe(1))
        if "defaults" not in self.__dict__:
            raise AttributeError("defaults")  # for a wrapper of this class, which then asks the optimizer
        defaults: dict[str, Any] = self.__dict__["defaults"]
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.__dict__["defaults"] = value

    def not_in_deepspeeds_adam(self) -> list[str]:
        """What DeepSpeed's class with L2 would lose if built from these param groups, as words for a message."""
        groups = self.param_groups
        found = {
            "decoupled weight decay": self.adam_w_mode and any(group["weight_decay"] for group in groups),
            "precision of states and params": self._precision != Precision() or any(map(own_settings, groups)),
            "amsgrad": any(group["amsgrad"] for group in groups),
            "maximize": any(group["maximize"] for group in groups),
        }
        return [words for words, is_lost in found.items() if is_lost]

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps step() with hooks and profiling, as Optimizer does, and hides all of it from torch.compile."""
        return dynamo_disabled(profiled(func, AdamOptimizer._steps_in_backward))

    @after_async_step
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer does, after checking its settings and params."""
        where = f"param group {len(self.param_groups)}"
        settings = {**self.defaults, **param_group}
        check_flags({key: settings[key] for key in FLAGS if key in settings}, f" in {where}")
        check_hyper(settings, f" in {where}")
        for key in ("decoupled_weight_decay", "adamw_mode", "adam_w_mode"):
            if bool(param_group.get(key, self.adam_w_mode)) != self.adam_w_mode:
                raise ValueError(
                    f"{where} has {key}={param_group[key]!r}: whether weight decay is decoupled is an argument of the "
                    f"optimizer, and the same for all groups; here it is {self.adam_w_mode}"
                )
        precision = self._checked_precision(param_group, where)
        params = param_group["params"]
        if isinstance(params, Tensor):
            params = [params]
        elif not isinstance(params, set):  # the base class explains what is wrong with a set
            params = list(params)
        for i, entry in enumerate(params):
            param = entry[1] if isinstance(entry, tuple) else entry  # named_parameters() gives pairs
            # Params that are not on the CPU are accepted for now: ZeRO-Offload takes an optimizer built for the model
            # on the GPU, then puts its own CPU shards into the groups. Params of lazy layers have no shape yet. Frozen
            # params may be of any kind, such as those of quantized models. step() checks every param that gets a grad.
            if not isinstance(param, Tensor) or is_lazy(param) or _is_frozen(param):
                continue
            dtensor.check_placed(param, f"{where}, param {i}")
            if param.device.type == "cpu":
                check_param(dtensor.local(param), f"{where}, param {i}")
        param_group["params"] = params
        _unguarded(Optimizer.add_param_group)(self, param_group)  # keeps the dict itself; others rely on that
        if precision.stochastic_rounding:
            param_group.setdefault("stochastic_rounding_seed", 0)
        self._keep_precision(param_group, precision)
        for watcher in group_watchers:
            watcher(precision.state_dtype == EIGHT_BIT)

    def _checked_precision(self, group: dict[str, Any], where: str) -> Precision:
        """The precision that the group's own settings give, else the optimizer's. Raises what precision_of() raises."""
        settings = own_settings(group)
        if not settings:
            return self._precision
        try:
            return precision_of(settings, self._precision)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _keep_precision(self, group: dict[str, Any], precision: Precision) -> None:
        settings = own_settings(group)
        self._group_precisions[id(group)] = group, settings, precision, -1 if settings else len(group)

    def _forget_removed_groups(self) -> None:
        """Releases param groups that were taken out of `param_groups`, with their params."""
        ids = set(map(id, self.param_groups))
        self._group_precisions = {key: kept for key, kept in self._group_precisions.items() if key in ids}

    def _precision_of(self, group: dict[str, Any], where: str) -> Precision:
        """The precision of a group's params and states.

        Raises ValueError if the group's precision settings were changed: its states still have the former precision.
        """
        kept = self._group_precisions.get(id(group))
        if kept is None:  # a copy of a group
            return self._checked_precision(group, where)
        _, before, precision, size = kept
        if size == len(group) and group.keys().isdisjoint(SETTINGS):  # none before, and none now
            return precision
        settings = own_settings(group)
        if settings != before:
            raise ValueError(
                f"The precision of {where} was set to {settings}, from {before}: it cannot be changed in the middle of "
                "training, but optimizer.load_state_dict(optimizer.state_dict()) converts the states"
            )
        self._keep_precision(group, precision)
        return precision

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
        _unguarded(Optimizer.zero_grad)(self, set_to_none)

    @after_async_step
    @in_default_float_environment
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips all params' grads to a maximum norm, as torch.nn.utils.clip_grad_norm_ does, but without writing them.

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
        The norm before clipping, a 0-dim float32 tensor. With DTensors it is the norm over all processes: each of them
        must call this, and their results are bit-identical.

        Raises
        ------
        RuntimeError
            If the norm is not finite and `error_if_nonfinite` is set; nothing is clipped then. If params are shards of
            FullyShardedDataParallel, which has its own clip_grad_norm_(). If adamops.step_in_backward() is in use.
        """
        self._refuse_in_backward("clip_grad_norm_()")
        max_norm, norm_type = float(max_norm), float(norm_type)
        params = [param for group in self.param_groups for param in group["params"]]
        dtensor.check_norm_is_known(params)
        named = [
            (name, group["params"][index], param, grad)
            for i, group in enumerate(self.param_groups)
            for index, name, param, grad in with_grads(group, f"param group {i}")
        ]
        if len({grad.device for *_, grad in named}) > 1:
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        backend = self._backend_of(named[0][2], named[0][0]) if named else self._backends[_CPU]
        # From all params, not only those with a grad in this process: every process must add up the same parts.
        layouts = [dtensor.shard_layout(param) for param in params]
        parts: dict[dtensor.ShardLayout, list[Tensor]] = {layout: [] for layout in layouts} or {None: []}
        for _, owner, _, grad in named:
            parts[dtensor.shard_layout(owner)].append(grad)
        device = named[0][3].device if named else _CPU
        all_grads = [grad for *_, grad in named]
        factor = self._grad_factor(all_grads)  # first: it may have to multiply some of them
        norms = {layout: _norm_of(backend, device, grads, norm_type) for layout, grads in parts.items()}
        norm = in_memory = dtensor.all_reduce_norm(norms, norm_type)
        before = None if self._clipped is None else self._clipped.norm_of(all_grads)
        if before is not None:
            factor = _factor_if_unchanged(factor, before, norm)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            scale = to_number(scale, "grad_scale")
            norm = norm / torch.as_tensor(scale, dtype=torch.float64, device=norm.device).reshape(()).abs()
        norm = norm * factor
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} of the grads is {float(norm)}, so they cannot be clipped; "
                "to go on regardless, set error_if_nonfinite=False"
            )
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) * factor  # NaN stays
        self._clipped = ClippedGrads(factor, in_memory, all_grads, backend.samples(all_grads))
        if not _torch_compat.COUNTS_WRITES:  # nobody could tell at the step whether these are still the grads
            self._clipped.settle(all_grads)
            self._clipped = None
        return norm.float()

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
        The closure's loss, or None.

        Raises
        ------
        TypeError, ValueError
            For a grad or state that does not fit its param (sparse, or of another shape, dtype or device), and for
            params that share memory.
        """
        self._settle()
        background = zero_grads.running if isinstance(zero_grads, _ForBackground) else None
        zero_grads = bool(zero_grads)
        loss = None
        if closure is not None:
            loss = evaluate(closure)
            self._settle()  # the closure may have started a step in the background
        # First convert everything that must become a number: it may be an object that runs code of its own.
        factor = self._grad_factor()
        threads = None if background is None else background.threads
        groups = [
            (f"param group {i}", group, self._hyper(group, f"param group {i}", zero_grads, factor, threads=threads))
            for i, group in enumerate(self.param_groups)
        ]
        if len(self._group_precisions) > len(groups):
            self._forget_removed_groups()
        outs = self._checked_lowp_outs(lowp_out)
        steps = [self._prepare(group, where, hyper, outs) for where, group, hyper in groups]
        if outs and steps:
            steps[-1].sharded += [out for out in lowp_out or () if out is not None and dtensor.is_sharded(out)]
        # Python code of tensor subclasses may have changed what was read from other groups.
        if len(steps) > 1 and any(step.ran_python for step in steps):
            steps = [
                step if step.ran_python else self._prepare(group, where, hyper, outs)
                for step, (where, group, hyper) in zip(steps, groups, strict=True)
            ]
        if zero_grads and self._grads_overlap(steps):
            steps = [
                self._prepare(group, where, dataclasses.replace(hyper, zero_grads=False), outs)
                for where, group, hyper in groups
            ]
            for step, (where, group, _) in zip(steps, groups, strict=True):
                step.sharded += _sharded_grads(group["params"])
                steps[-1].after += [grad.zero_ for grad in _zeroable_grads(group, where)]
        has_new_params = self._shared.get("was_loaded") or any(step.has_new_params for step in steps)
        if has_new_params or self._shared.get("shares_memory"):
            check_no_overlap(
                {name: param for where, group, _ in groups for _, name, param, _ in with_grads(group, where)}
            )
        if has_new_params:
            self._shared.update(was_loaded=False, shares_memory=self._shares_memory())
        self._commit(steps, background)
        return loss

    def _shares_memory(self) -> bool:
        """Whether params that have a grad, or have had one, share memory, so that no step may update two of them."""
        params = [param for group in self.param_groups for param in group["params"]]
        held = [dtensor.local(param) for param in params if param.grad is not None or param in self.state]
        try:
            check_no_overlap({str(i): param for i, param in enumerate(held) if is_in_memory(param)})
        except ValueError:
            return True
        return False

    def _grads_overlap(self, steps: list[GroupStep]) -> bool:
        """Whether grads share memory, as autograd's may. Then none may be zeroed before all have been read."""
        by_backend: dict[int, tuple[Any, list[Any]]] = {}
        updates = [entry for step in steps for entry in step.updates]
        if len(updates) > 1 and any(update.table is None for _, update in updates):
            return True  # perhaps: pure PyTorch does not check, and zeroes an update's grads right after it
        for backend, update in updates:
            if update.table is not None:
                by_backend.setdefault(id(backend), (backend, []))[1].append(update.table)
        return any(backend.module.grads_overlap(tables) for backend, tables in by_backend.values())

    def _commit(self, steps: Sequence[GroupStep], background: AsyncStep | None = None) -> None:
        """Runs the prepared steps: all of them, or none if a signal handler raises before they begin.

        Those of params on the CPU are handed to the background step, if one is given.
        """
        if any(step.after for step in steps):
            check_torch_computes()
        if not any(step.ran_python for step in steps):
            self._commit_proved(steps, background)
            return
        with _torch_compat.without_torch_function():  # from here on, no Python code of tensor subclasses runs
            for step in steps:
                for _, update in step.updates:
                    check_still_there(update.borrowed(), None if update.table is None else update.table.spans)
            self._commit_proved(steps, background)

    def _commit_proved(self, steps: Sequence[GroupStep], background: AsyncStep | None) -> None:
        new_states = [entry for step in steps for entry in step.new_states]
        former = self._insert(new_states) if new_states else {}
        if background is not None:
            self._hand_to_background(steps, background)
            return
        updates = [entry for step in steps for entry in step.updates]
        others = [step for step in steps if step.after or step.sharded]
        if not others and are_one_call(updates):
            run_in_one_call(updates)
            return
        with deferred_signals():
            done: list[Update] = []
            try:
                run_updates(updates, done)
            except BaseException:
                if not done:  # a device that refused the first launch
                    self._restore_states(former)
                raise
            for step in others:
                self._finish(step)

    def _insert(self, new_states: list[tuple[Any, dict[str, Any]]]) -> dict[Any, Any]:
        """Adds new states, all or none. They are equivalent to what was there: zeros with no step counted to no state.

        Returns what was there before, or None, by key.
        """
        states: Any = self.state
        former = {key: states.get(key) for key, _ in new_states}
        try:
            for key, state in new_states:
                states[key] = state
        except BaseException:
            self._restore_states(former)
            raise
        return former

    def _restore_states(self, former: dict[Any, Any]) -> None:
        for key, state in former.items():
            if state is None:
                self.state.pop(key, None)
            else:
                self.state[key] = state

    def _finish(self, step: GroupStep) -> None:
        for call in step.after:
            call()
        # For params and grads alike: autograd sees the DTensors, but their local tensors were written.
        for param in step.sharded:
            state = self.state.get(param) or {}
            count_writes([param, *(value for value in state.values() if dtensor.is_sharded(value))])

    def _hand_to_background(self, steps: Sequence[GroupStep], background: AsyncStep) -> None:
        """Hands updates of params on the CPU to the background; enqueues the others on this thread's stream."""
        for step in steps:
            for backend, update in step.updates:
                if update.on_cpu:
                    background.add(backend, update)
                else:
                    update()
        for step in steps:
            if step.after or step.sharded:
                background.add(None, Update(functools.partial(self._finish, step), list))

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
        if threads is not None and operator.index(threads) < 1:
            raise ValueError(f"Invalid threads: {threads}; expected 1 or more")
        if _torch_compat.step_post_hooks(self):
            raise RuntimeError(
                "step_async() ends before the step does, so hooks after the step cannot be called; use step()"
            )
        self._settle()
        running = AsyncStep(threads or torch.get_num_threads())
        try:
            # By its name, as schedulers and hooks wrap it.
            self.step(zero_grads=_ForBackground(zero_grads, running), lowp_out=lowp_out)  # type: ignore[arg-type]
        except Exception as error:
            running.fail(error)
        else:
            with deferred_signals():  # no thread may write params without the optimizer knowing
                self._running = running
                running.start()
        self._running = running
        return running

    def _settle(self) -> None:
        """Waits for the background step, if there is one, and raises its error if nobody has seen it yet."""
        if self._running is not None:
            running = self._running
            try:
                running.settle()
            finally:
                if running.done():
                    self._running = None

    def _checked_lowp_outs(self, lowp_out: Sequence[Tensor | None] | None) -> dict[Tensor, Tensor]:
        """The 16-bit tensor to write each param to. Raises TypeError or ValueError if one does not fit."""
        if lowp_out is None:
            return {}
        named = [
            (f"param group {g}, param {i}", param)
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        ]
        if len(lowp_out) != len(named):
            raise ValueError(f"lowp_out has {len(lowp_out)} entries, expected {len(named)}, one for each param")
        outs = {}
        for (name, param), out in zip(named, lowp_out, strict=True):
            if out is not None:
                check_lowp_out(dtensor.local_like(out, param, f"{name}: its lowp_out"), dtensor.local(param), name)
                outs[param] = dtensor.local(out)
        names = {f"the lowp_out of {name}": outs[param] for name, param in named if param in outs}
        written = {name: dtensor.local(p) for name, p in named if p.grad is not None or p in outs}
        check_no_overlap({**written, **names})
        return outs

    def _prepare(
        self, group: dict[str, Any], where: str, hyper: AdamHyper, lowp_outs: dict[Tensor, Tensor]
    ) -> GroupStep:
        """Prepares a group's step with these hyper-parameters. Raises if anything is wrong; nothing is written."""
        params = group["params"]
        backend = self._backends.get(params[0].device) if params else None
        update = backend.prepare_group(where, hyper, params, self.state) if backend and not lowp_outs else None
        if backend and update and not backend.skips(hyper):
            sharded = [param for param in params if param.grad is not None] if update.table.sharded else []
            sharded += _sharded_grads(params) if sharded and hyper.zero_grads else []
            return GroupStep([(backend, update)], sharded=sharded)

        check_torch_computes()
        batches = self._batches(group, where, hyper)
        left = {param: lowp_outs[param] for param in params if param in lowp_outs}
        step = GroupStep([])
        for backend, batch in batches:
            if left and backend.writes_copies:
                batch.lowp_outs = [left.pop(owner, None) for owner in batch.owners]
            self._prepare_batch(step, backend, batch)
        if hyper.zero_grads:
            # The other grads were copied before the update, or belong to a step that is skipped.
            read = {id(grad) for _, batch in batches for grad in batch.grads}
            step.after += [grad.zero_ for grad in _zeroable_grads(group, where) if id(grad) not in read]
            step.sharded += _sharded_grads(params)
        for param, out in left.items():
            self._checked_master(param, hyper.precision, f"{where}: a param with a lowp_out")
            check_writable(out, f"{where}: a lowp_out")
        step.after += [functools.partial(self._write_copy, param, out, hyper.precision) for param, out in left.items()]
        return step

    def _write_copy(self, param: Tensor, out: Tensor, precision: Precision) -> None:
        out.copy_(dtensor.local(self._fp32_param(param, precision)))

    @after_async_step
    @torch.no_grad()
    def step_param(self, group_index: int, index: int) -> None:
        """Updates the param at `index` of a group, as step() would; for adamops.step_in_backward()."""
        group, where = self.param_groups[group_index], f"param group {group_index}"
        own = {**group, "params": group["params"][index : index + 1]}
        try:
            step = self._prepare(own, where, self._hyper(group, where, rng_offset=index), {})
        except (TypeError, ValueError) as error:  # it is param 0 of `own`, and the message says so
            raise type(error)(str(error).replace(f"{where}, param 0", f"{where}, param {index}")) from None
        self._commit([step])

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

    def _batches(self, group: dict[str, Any], where: str, hyper: AdamHyper) -> list[tuple[Backend, AdamBatch]]:
        """The group's params that have a grad, in a batch for each backend that does not skip this step."""
        batches: dict[torch.device, tuple[Backend, AdamBatch]] = {}
        for index, name, param, grad in with_grads(group, where):
            if param.device not in batches:
                batches[param.device] = self._backend_of(param, name), AdamBatch([], hyper, [], [], [])
            owner = group["params"][index]
            batch = batches[param.device][1]
            state = self.state.get(owner, {})
            if not isinstance(state, Mapping):
                raise TypeError(f"{name} has a {type(state).__name__} as its state; expected a dict")
            if dtensor.is_sharded(owner):
                state = dtensor.local_state(state, owner, name, batch.needed_of(state, param))
            batch.append(index, name, param, grad, state, owner)
        return [(backend, batch) for backend, batch in batches.values() if not backend.skips(hyper)]

    def _prepare_batch(self, step: GroupStep, backend: Backend, batch: AdamBatch) -> None:
        """Adds a batch to its group's step."""
        complete = all(map(_is_complete, batch.states, batch.params, [batch] * len(batch.params)))
        if not complete:
            check_params_and_grads(batch)
            self._complete_states(backend, batch)
        if not complete or batch.has_shards:
            batch.owned_states = [
                dtensor.owned_state(state, owner, self.state.get(owner))
                for owner, state in zip(batch.owners, batch.states, strict=True)
            ]
            step.new_states += zip(batch.owners, batch.owned_states, strict=True)
        step.has_new_params |= not complete
        update = backend.prepare(batch)
        step.ran_python |= any(type(tensor) not in PLAIN_TYPES for tensor in update.borrowed())
        step.updates.append((backend, update))
        step.sharded += [owner for owner in batch.owners if dtensor.is_sharded(owner)]

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """The backend that updates the param. Raises ValueError if there is none."""
        check_on_cpu(param, name)
        return self._backends[_CPU]

    def _hyper(
        self,
        group: dict[str, Any],
        where: str,
        zero_grads: bool = False,
        grad_factor: float | Tensor | None = None,
        rng_offset: int = 0,
        threads: int | None = None,
    ) -> AdamHyper:
        """The group's hyper-parameters, checked, with what torch.amp.GradScaler sets on the optimizer for a step."""
        loss_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        in_group, precision = f" in {where}", self._precision_of(group, where)
        hyper = AdamHyper.of_group(
            group,
            in_group,
            self._to_number,
            adamw_mode=self.adam_w_mode,
            precision=precision,
            grad_factor=self._grad_factor() if grad_factor is None else grad_factor,
            zero_grads=zero_grads,
            rng_offset=_rng_offset(group, where, rng_offset) if precision.stochastic_rounding else 0,
            loss_scale=1.0 if loss_scale is None else self._to_number(loss_scale, "grad_scale"),
            found_inf=None if found_inf is None else self._to_number(found_inf, "found_inf"),
            threads=threads,
        )
        if not (0.0 <= hyper.beta1 < 1.0 and 0.0 <= hyper.beta2 < 1.0):
            check_betas(hyper.beta1, hyper.beta2, in_group)
        return hyper

    def _grad_factor(self, grads: Sequence[Tensor] | None = None) -> float | Tensor:
        """What to multiply the grads by, as clip_grad_norm_() found; 1 if they are no longer the grads that it saw."""
        if self._clipped is None:
            return 1.0
        if grads is None:
            groups = enumerate(self.param_groups)
            grads = [grad for i, group in groups for grad in _local_grads(group, f"param group {i}")]
        samples = self._backends[_CPU].samples(grads)
        if self._clipped.were_written_unseen(grads, samples):
            self._clipped = None
            return 1.0
        if not self._clipped.are(grads):
            self._clipped.settle(grads)
            self._clipped = None
            return 1.0
        return self._to_number(self._clipped.factor, "clip factor")

    def _complete_states(self, backend: Backend, batch: AdamBatch) -> None:
        """Adds what the batch's states lack: a step count of 0, zeros, and master weights that start as the params.

        Where the memory layout of a param has changed, its state follows.
        """
        held = [with_held_names(state, name) for name, state in zip(batch.names, batch.states, strict=True)]
        for i, (name, param, state) in enumerate(zip(batch.names, batch.params, held, strict=True)):
            check_nothing_lost(state, name)
            check_state(batch.needed_of(state, param), param, name)  # before torch reads them
            if not is_in_layout_of(param, state):
                check_state(state, param, name)
                held[i] = in_layout_of(param, state)
        completed = [
            {**state} if "step" in state else {"step": backend.new_step_count(batch.hyper), **state} for state in held
        ]
        needed = list(map(batch.state_dtypes, batch.params))
        for key in STATE_TENSORS:
            lacking = [i for i, names in enumerate(needed) if key in names and key not in completed[i]]
            if key == SCALES or not lacking:
                continue
            like = [batch.params[i] for i in lacking]
            dtypes = [needed[i][key] for i in lacking]
            if key == AVERAGES[2]:  # the other averages may have another dtype than new ones would
                dtypes = [completed[i][AVERAGES[1]].dtype for i in lacking]
            for i, zeros in zip(lacking, backend.zeros_like(like, dtypes), strict=True):
                is_master = key == MASTER
                completed[i][key] = _initialized_master(zeros, batch.params[i], completed[i]) if is_master else zeros
        for param, state in zip(batch.params, completed, strict=True):
            if _has_stale_masters(state, param, batch.hyper.precision):
                state.pop(MASTER, None)
                state.pop(REMAINDER, None)
            if is_quantized(state):
                _complete_scales(state, param, batch.hyper.amsgrad)
        batch.states = completed

    @after_async_step
    @in_default_float_environment
    def state_dict(self, dequantize: bool = False) -> dict[str, Any]:
        """The state and settings, as torch.optim.Optimizer returns them.

        With `dequantize`, states are float32 whatever they are here, and what belongs to the params' precision is left
        out: torch.optim.AdamW can load the result. All states of DTensors are DTensors that
        torch.distributed.checkpoint can reshard, with float32 in place of quantized states; see portable_state_dicts().
        """

        def convert(state_dict: dict[str, Any]) -> dict[str, Any]:
            state = {key: saved_state(entry, dequantize) for key, entry in state_dict["state"].items()}
            groups = [
                {key: value for key, value in group.items() if key not in SETTINGS}
                for group in state_dict["param_groups"]
            ]
            return {**state_dict, "state": state, "param_groups": groups}

        return _torch_compat.converted_state_dict(self, _unguarded(Optimizer.state_dict), convert)

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
            self._checked_master(param, precision, f"param {i}")
        return [self._fp32_param(param, precision) for param, precision in own]

    def _params_with_precision(self) -> list[tuple[Tensor, Precision]]:
        return [
            (param, precision)
            for i, group in enumerate(self.param_groups)
            for precision in [self._precision_of(group, f"param group {i}")]
            for param in group["params"]
        ]

    def _checked_master(self, param: Tensor, precision: Precision, name: str) -> Tensor | None:
        """The local part of a param's master weights or remainder; None if it has neither."""
        held = dtensor.local(param).detach()
        check_viewable(held, name)
        state, kind = self.state.get(param) or {}, precision.master_of(param)
        for key in (MASTER, REMAINDER) if kind is Master.FP32 else (REMAINDER,) if kind else ():
            if key in state:
                if key == REMAINDER:  # it belongs to the param's bits as they are in memory
                    check_memory(held, name)
                master = dtensor.local(state[key])
                check_state({key: master}, held, name, elsewhere=True)
                return master
        return None

    def _fp32_param(self, param: Tensor, precision: Precision) -> Tensor:
        master, held = self._checked_master(param, precision, "a param"), dtensor.local(param).detach()
        if master is not None:
            values = master.clone() if master.dtype == torch.float32 else remainders.join(held, master)
        elif held.is_floating_point() and held.layout == torch.strided:
            values = held.to(torch.float32, copy=True)
        else:
            values = held.clone()
        return dtensor.like_param_placed(values, param)

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
        own = self._params_with_precision()
        if len(own) != len(params):
            raise ValueError(f"There are {len(own)} params in this optimizer, and {len(params)} were given")
        pairs = zip((param for param, _ in own), params, strict=True)
        values = [_value_for(param, value, f"param {i}") for i, (param, value) in enumerate(pairs)]
        masters = [_new_master(dtensor.local(param), precision.master_of(param)) for param, precision in own]
        with deferred_signals(), _torch_compat.without_torch_function():
            # Again after _value_for(), now that no Python code of subclasses runs that could free another's memory.
            for i, ((param, _), value) in enumerate(zip(own, values, strict=True)):
                check_readable(dtensor.local(param), f"param {i}")
                check_readable(value, f"param {i}: what was given")
            self._write_params([param for param, _ in own], values, masters)

    def _write_params(
        self, params: Sequence[Tensor], values: Sequence[Tensor], masters: Sequence[Tensor | None]
    ) -> None:
        """Writes values to the params and to their new master weights or remainders, which become part of the state."""
        for param, value, master in zip(params, values, masters, strict=True):
            held = dtensor.local(param)
            if master is None:
                held.copy_(value)
                continue
            if master.dtype == torch.float32:
                held.copy_(master.copy_(value))
            else:
                remainders.split_into(held, master, like_param(value, held))
            state = {**(self.state.get(param) or {})}
            for name in (MASTER, REMAINDER):
                state.pop(name, None)
            state[MASTER if master.dtype == torch.float32 else REMAINDER] = dtensor.like_param_placed(master, param)
            self.state[param] = state

    @after_async_step
    @in_default_float_environment
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the classes here, of torch.optim.Adam or AdamW, or of DeepSpeed's or apex's Adam.

        State tensors that fit are taken as they are. Others are converted to this optimizer's state dtype.

        Raises
        ------
        ValueError, TypeError
            If a state does not fit its param; the optimizer is then unchanged.
        """
        is_called_for = True

        def shield(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # A signal handler may raise before the hook is removed; it must then do nothing.
            return shield_states(optimizer, state_dict) if is_called_for else state_dict

        handle = None
        try:
            handle = self.register_load_state_dict_pre_hook(shield)  # last, to see what other hooks return
            _unguarded(Optimizer.load_state_dict)(self, state_dict)
        finally:
            is_called_for = False
            if handle is not None:
                handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by unpickling and, with loaded state, by load_state_dict()."""
        state = {**state}
        if "defaults" in state:  # a pickled optimizer, perhaps of an older version
            state.setdefault("_shared", {})
            state.setdefault("_backends", {_CPU: _load_host_backend()})
            state.setdefault("fp32_optimizer_states", True)
            state.setdefault("master_weights", False)
            arguments = {key: state[key] for key in ("fp32_optimizer_states", "master_weights")}
            state.setdefault("_precision", precision_of(arguments, Precision()))
            state.setdefault("_group_precisions", {})
        loaded = "state" in state and "param_groups" in state
        if loaded:
            groups = state["param_groups"]
            if "defaults" not in state:  # called by load_state_dict()
                keep_own_settings(groups, self.param_groups)
            else:
                self._precision = state["_precision"]
            precisions = [self._checked_precision(group, f"param group {i}") for i, group in enumerate(groups)]
            state["state"] = adopted_states(state["state"], groups, precisions)
            check_groups(groups)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            if "stochastic_rounding_seed" in self.defaults:
                group.setdefault("stochastic_rounding_seed", self.defaults["stochastic_rounding_seed"])
        if loaded:
            self._group_precisions.clear()
            for group, precision in zip(self.param_groups, precisions, strict=True):
                self._keep_precision(group, precision)
            self._shared["was_loaded"] = True  # the next step checks params for shared memory, as the first does

    def _share_step_counts(self) -> None:
        """Moves step counts into shared memory, as multiprocessing does with the tensors that it gives to a process."""
        for state in self.state.values():
            if isinstance(state, dict) and type(state.get("step")) is int:
                state["step"] = torch.tensor(state["step"], dtype=torch.int64, device="cpu").share_memory_()

    @after_async_step
    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            self._share_step_counts()
        return {
            **super().__getstate__(),
            "adam_w_mode": self.adam_w_mode,
            "fp32_optimizer_states": self.fp32_optimizer_states,
            "master_weights": self.master_weights,
            "_precision": self._precision,
        }


def _is_frozen(param: Tensor) -> bool:
    """Whether a param gets no grad. A plain tensor is not frozen: its user may give it one."""
    return isinstance(param, torch.nn.Parameter) and not param.requires_grad


def _value_for(param: Tensor, value: Tensor, name: str) -> Tensor:
    """The local part of the value for a param. Raises ValueError or TypeError if it does not fit."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a {type(value).__name__} was given; expected a tensor")
    if param.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(param.shape)}, and {tuple(value.shape)} was given")
    value = dtensor.local_like(value, param, f"{name}: what was given")
    held = dtensor.local(param)
    check_writable(held, name)
    check_readable(value, f"{name}: what was given")
    if not held.is_floating_point() or held.layout != torch.strided:
        if (value.dtype, value.layout) != (held.dtype, held.layout):
            raise TypeError(f"{name} is of {held.dtype} and {held.layout}, and {value.dtype}, {value.layout} was given")
    elif value.is_complex() or value.layout != torch.strided:
        raise TypeError(f"{name} is of {held.dtype}, and {value.dtype}, {value.layout} was given")
    if value.is_quantized != held.is_quantized:
        raise TypeError(f"{name} is of {held.dtype}, and a quantized tensor was given or is there")
    if value.device.type == "meta" and held.device.type != "meta":
        raise ValueError(f"{name}: what was given is on the device meta, and has no values")
    if held.layout == torch.strided and any(n > 1 and not s for n, s in zip(held.shape, held.stride(), strict=True)):
        if not torch.equal(held, value.to(held)):
            raise ValueError(f"{name} is expanded, and cannot be written")
        return held  # copying it to itself does nothing
    return value


def _new_master(param: Tensor, kind: Master) -> Tensor | None:
    """Memory for a param's master weights or remainder; None if it has neither, or has gaps, as frozen params may."""
    return torch.empty_like(param, dtype=kind.dtype, requires_grad=False) if kind and is_dense(param) else None


def _initialized_master(master: Tensor, param: Tensor, state: dict[str, Any]) -> Tensor:
    """Initializes float32 master weights from the param, and from its loaded remainder if there is one."""
    remainder = state.pop(REMAINDER, None)
    return master.copy_(param if remainder is None else remainders.join(param, remainder))


def _rng_offset(group: dict[str, Any], where: str, offset: int) -> int:
    """The rng_offset, 32 bits, of a group's first param, or of the one at `offset`.

    It depends only on what all replicas share: the seed, which is a setting, and the indices of the group and param.
    """
    seed = checked_seed(group.get("stochastic_rounding_seed"), f" in {where}")
    begin = int.from_bytes(hashlib.blake2s(f"{seed} {where}".encode(), digest_size=4).digest(), "little")
    return (begin + offset) & 0xFFFFFFFF


def _has_stale_masters(state: Mapping[str, Any], param: Tensor, precision: Precision) -> bool:
    """Whether the param, now float32, had master weights when it was of 16 bits: a step makes them stale."""
    is_used = precision.master is Master.NONE or param.dtype != torch.float32
    return not is_used and (MASTER in state or REMAINDER in state)


def _is_complete(state: dict[str, Any], param: Tensor, batch: AdamBatch) -> bool:
    """Whether a state has everything that a step needs, in the memory layout of the param."""
    needed = {"step", *batch.state_dtypes(param)} - {SCALES}
    if not state.keys() >= needed or _has_stale_masters(state, param, batch.hyper.precision):
        return False
    if not is_in_layout_of(param, state):
        return False
    scales = state.get(SCALES)
    if not is_quantized(state) or not isinstance(scales, Tensor) or scales.dim() != 2:
        return True
    return scales.shape[1] >= len(needed & {*AVERAGES})


def _complete_scales(state: dict[str, Any], param: Tensor, amsgrad: bool) -> None:
    """Adds the scales that a quantized state lacks. Its elements are zeros there, which any scale fits."""
    shape = scales_shape(param, amsgrad)
    scales = state.get(SCALES)
    if scales is None or scales.shape != shape:
        state[SCALES] = torch.zeros(shape, dtype=torch.bfloat16, device=param.device)
        if scales is not None:
            columns = min(scales.shape[1], shape[1])
            state[SCALES][:, :columns] = scales[:, :columns]


def _norm_of(backend: Backend, device: torch.device, grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all elements of grads on the device, as a float64 tensor there."""
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.full((), dtensor.norm_of_nothing(norm_type), dtype=torch.float64, device=device)
    norm = backend.grad_norm(grads, norm_type)
    if norm is not None:
        return torch.as_tensor(norm, dtype=torch.float64, device=device)
    for grad in grads:
        check_readable(grad, "a grad")
    norms = torch.stack([grad.float().norm(norm_type) for grad in grads])
    return torch.linalg.vector_norm(norms, norm_type).double()


def _factor_if_unchanged(factor: float | Tensor, before: Tensor, norm: Tensor) -> float | Tensor:
    """The clip factor of grads, or 1 if their norm in memory is not what it was: something wrote them unseen."""
    before = before.to(norm.device)
    is_unchanged = (norm == before) | (norm.isnan() & before.isnan())
    if isinstance(factor, Tensor):
        return torch.where(is_unchanged, factor, 1.0)
    return factor if is_unchanged else 1.0


def _local_grads(group: dict[str, Any], where: str) -> list[Tensor]:
    """The grad of each param that has one; for DTensors, the local tensor."""
    params = group["params"]
    grads = [grad for param in params if (grad := param.grad) is not None]
    if {*map(type, params), *map(type, grads)}.issubset(PLAIN_TYPES):
        return grads
    return [grad for *_, grad in with_grads(group, where)]


def _zeroable_grads(group: dict[str, Any], where: str) -> list[Tensor]:
    """The local grads of a group that have memory to zero."""
    grads = [grad for grad in _local_grads(group, where) if not _torch_compat.is_zero_tensor(grad)]
    for grad in grads:
        check_writable(grad, f"{where}: a grad")
    return grads


def _sharded_grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None and dtensor.is_sharded(param.grad)]


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with autograd on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_grads(group: dict[str, Any], where: str) -> list[tuple[int, str, Tensor, Tensor]]:
    """The index in the group, name, param and grad of each param that has a grad; for DTensors, the local tensors."""
    return [
        (i, name, dtensor.local(param), dtensor.local(dtensor.grad_like(param, param.grad, name)))
        for i, param in enumerate(group["params"])
        if param.grad is not None
        for name in [f"{where}, param {i}"]
    ]

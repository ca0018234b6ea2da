"""What the Adam optimizers share: a torch.optim.Optimizer whose step is one call of the op per param group."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks

from ... import _neighbours, op_builder
from . import remainders, sharding
from .amp import UnscalesInStep
from .backend import Backend
from .background import AsyncStep
from .batch import (
    AdamBatch,
    check_in_host_memory,
    check_lowp_out,
    check_no_overlap,
    check_param,
    check_params_and_grads,
    is_dense,
    like_param,
)
from .hyper import AdamHyper
from .loading import adopted_states, shield_states
from .native_backend import NativeBackend
from .precision import EIGHT_BIT, MASTER, REMAINDER, SCALES, STATE_TENSORS, Master, Precision, scales_shape
from .profiled import profiled
from .saving import in_fp32, portable
from .shared import Shared
from .torch_adam import TorchBackend
from .uncompiled import uncompiled

_HOST = torch.device("cpu")
_Method = TypeVar("_Method", bound=Callable[..., Any])


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


def waits(method: _Method) -> _Method:
    """The method of an AdamOptimizer, begun when no step runs in the background any more; not for torch.compile."""

    @uncompiled
    @functools.wraps(method)
    def waiting(self: AdamOptimizer, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return method(self, *args, **kwargs)

    return cast(_Method, waiting)


class AdamOptimizer(Optimizer):
    """Adam and AdamW for params in host memory; the classes that users take differ in arguments, and in what they add.

    Under torch.amp.GradScaler the grads are unscaled inside the step, which reads them and does not write them.
    """

    _grad_factor = Shared[float | Tensor](1.0)  # what clip_grad_norm_() has the next step multiply the grads by
    _running = Shared[AsyncStep | None](None)  # the step in the background
    _preparing = Shared[AsyncStep | None](None)  # where step() is to leave its work instead of doing it
    _step_supports_amp_scaling = UnscalesInStep()  # by the name that GradScaler asks for

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
        **defaults: Any,
    ) -> None:
        self._shared: dict[str, Any] = {}
        self.adam_w_mode = adam_w_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        self.master_weights = master_weights
        self._precision = _precision_of(
            fp32_optimizer_states, master_weights, state_dtype, master_weight_bits, stochastic_rounding
        )
        if stochastic_rounding:
            defaults["stochastic_rounding_seed"] = int(torch.randint(2**62, ()))  # in the state dict, as a setting
        _check_hyper(defaults, "")
        super().__init__(params, defaults)
        self._backends: dict[torch.device, Backend] = {_HOST: _load_host_backend()}

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that param groups have unless they have their own."""
        _neighbours.check_not_replaced(self, sys._getframe(1))
        defaults: dict[str, Any] = self.__dict__["defaults"]
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.__dict__["defaults"] = value

    def not_in_deepspeeds_adam(self) -> list[str]:
        """In words: what would be lost if DeepSpeed's class took over with L2 and all else from these param groups."""
        groups = self.param_groups
        own = {"state_dtype", "fp32_optimizer_states", "master_weight_bits", "master_weights", "stochastic_rounding"}
        found = {
            "decoupled weight decay": self.adam_w_mode and any(group["weight_decay"] for group in groups),
            "precision of states and params": self._precision != Precision()
            or any(own & group.keys() for group in groups),
            "amsgrad": any(group["amsgrad"] for group in groups),
            "maximize": any(group["maximize"] for group in groups),
        }
        return [words for words, is_lost in found.items() if is_lost]

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What Optimizer makes of step(), with hooks and profiling, hidden from torch.compile as a whole."""
        return uncompiled(profiled(func))

    @waits
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
            # GPU, and puts its own shards in host memory into the groups. Those of lazy layers have no shape yet.
            # step() checks again.
            if not isinstance(param, Tensor) or is_lazy(param):
                continue
            sharding.check_placed(param, f"{where}, param {i}")
            if param.device.type == "cpu":
                check_param(sharding.local(param), f"{where}, param {i}")
        param_group["params"] = params
        _unguarded(Optimizer.add_param_group)(self, param_group)  # which keeps the dict itself, as others rely on
        _neighbours.expect_deepspeed(EIGHT_BIT in (self._precision.state_dtype, param_group.get("state_dtype")))

    @waits
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the grads to None, or to zero, as torch.optim.Optimizer does."""
        self._grad_factor = 1.0
        _unguarded(Optimizer.zero_grad)(self, set_to_none)

    @waits
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips the grads of all params to a norm, as torch.nn.utils.clip_grad_norm_ does, without writing them.

        They are read once for their norm, which is the same bits for any number of threads; the next step() multiplies
        them by ``min(1, max_norm / (norm + 1e-6))`` where it reads them anyway. zero_grad() forgets the factor. If
        ``self.grad_scale`` is set (what the loss was multiplied by), the norm is that of the unscaled grads. On a GPU
        the norm stays there, nothing waits for it, and step counts are kept there from then on. With grads on several
        devices torch's function does it all, which writes them.

        Parameters
        ----------
        max_norm
            The most that the norm is to be.
        norm_type
            Which norm; may be infinity.
        error_if_nonfinite
            Whether to raise if the norm is infinite or NaN. Otherwise the params become NaN in the next step, as with
            torch.

        Returns
        -------
        The norm before clipping, a 0-dim float32 tensor. With DTensors it is that of all processes: each must call
        this, and gets the same bits.

        Raises
        ------
        RuntimeError
            If the norm is not finite and `error_if_nonfinite`; nothing is clipped then. Or if params are shards of
            FullyShardedDataParallel, which has a clip_grad_norm_() of its own.
        """
        max_norm, norm_type = float(max_norm), float(norm_type)
        params = [param for group in self.param_groups for param in group["params"]]
        sharding.check_norm_is_known(params)
        named = [
            (name, group["params"][index], param, grad)
            for i, group in enumerate(self.param_groups)
            for index, name, param, grad in with_grads(group, f"param group {i}")
        ]
        if len({grad.device for *_, grad in named}) > 1:
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        backend = self._backend_of(named[0][2], named[0][0]) if named else self._backends[_HOST]
        # By all params, not by those with a grad in this process: each process must add up the same parts.
        parts: dict[sharding.Spread, list[Tensor]] = {sharding.spread(param): [] for param in params} or {None: []}
        for _, owner, _, grad in named:
            parts[sharding.spread(owner)].append(grad)
        device = named[0][3].device if named else _HOST
        norms = {spread: _norm_of(backend, device, grads, norm_type) for spread, grads in parts.items()}
        norm = sharding.add_up_norms(norms, norm_type)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            norm = norm / torch.as_tensor(scale, dtype=torch.float64, device=norm.device).reshape(()).abs()
        norm = norm * self._grad_factor
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} of the grads is {float(norm)}, so they cannot be clipped; "
                "to go on regardless, set error_if_nonfinite=False"
            )
        self._grad_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) * self._grad_factor  # NaN stays
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
            Whether to set the grads to zero as well, where they are read anyway.
        lowp_out
            For each param of all groups, in order, None or a tensor of bfloat16 or float16 of its shape and strides,
            which gets the new param, rounded to the nearest, in the same pass: what is to be copied to a GPU.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        TypeError, ValueError
            For a grad or state that does not fit its param: sparse, or of another shape, dtype or device; or params
            that share memory.
        """
        self._settle()
        loss = evaluate(closure)
        groups = [(f"param group {i}", group) for i, group in enumerate(self.param_groups)]
        outs = self._checked_lowp_outs(lowp_out)
        prepared = [self._prepare(group, where, zero_grads, outs) for where, group in groups]
        if any(states_are_new for _, states_are_new in prepared):
            check_no_overlap({name: param for where, group in groups for _, name, param, _ in with_grads(group, where)})
        for (_, group), (update, _) in zip(groups, prepared, strict=True):
            if self._preparing and all(param.device.type == "cpu" for param in group["params"]):
                self._preparing.add(update)
            else:
                update()  # on a GPU it is only enqueued, and has to be on the stream of this thread
        self._grad_factor = 1.0
        return loss

    @uncompiled
    def step_async(
        self, *, threads: int | None = None, zero_grads: bool = False, lowp_out: Sequence[Tensor | None] | None = None
    ) -> AsyncStep:
        """Begins a step that goes on in the background, and returns a handle whose ``wait()`` returns once it is done.

        Grads and hyper-parameters are those of now: grads may be set to None and learning rates changed meanwhile, but
        until the step is done nobody may write to the grads, nor read or write params and states. Methods of the
        optimizer wait for it. Params on a GPU are updated in the order of torch's current stream, as by step().

        Parameters
        ----------
        threads
            On how many threads the step runs; by default on as many as step(). Fewer leave cores to what goes on.
        zero_grads, lowp_out
            As for step().

        Raises
        ------
        ValueError
            If `threads` is less than 1. Whatever else is wrong is raised by ``wait()``, or, if that is not called, by
            the next method of the optimizer.
        RuntimeError
            If there are hooks to be called after the step, as it will not be done by then.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"Invalid threads: {threads}; expected 1 or more")
        if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            raise RuntimeError(
                "step_async() ends before the step does, so hooks after the step cannot be called; use step()"
            )
        self._settle()
        running = self._preparing = AsyncStep(threads or torch.get_num_threads())
        try:
            self.step(zero_grads=zero_grads, lowp_out=lowp_out)  # by its name, as schedulers and hooks watch it
        except Exception as error:
            running.fail(error)
        else:
            running.start()
        finally:
            self._preparing = None
        self._running = running
        return running

    def _settle(self) -> None:
        """Waits for the step in the background, if there is one, and raises its error if nobody has seen it."""
        if self._running is not None:
            running = self._running
            try:
                running.settle()
            finally:
                if running.done():
                    self._running = None

    def _checked_lowp_outs(self, lowp_out: Sequence[Tensor | None] | None) -> dict[Tensor, Tensor]:
        """Where to write each param in 16 bits. Raises TypeError or ValueError if that cannot be."""
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
                check_lowp_out(sharding.local_like(out, param, f"{name}: its lowp_out"), sharding.local(param), name)
                outs[param] = sharding.local(out)
        names = {f"the lowp_out of {name}": outs[param] for name, param in named if param in outs}
        check_no_overlap({**{name: sharding.local(param) for name, param in named}, **names})
        return outs

    def _prepare(
        self,
        group: dict[str, Any],
        where: str,
        zero_grads: bool,
        lowp_outs: dict[Tensor, Tensor],
        stream_offset: int = 0,
    ) -> tuple[Callable[[], None], bool]:
        """What updates the group when called, and whether any of its states is new and not yet in self.state."""
        hyper = self._hyper(group, where, zero_grads, stream_offset)
        params = group["params"]
        backend = self._backends.get(params[0].device) if params else None
        update = backend.prepare_group(where, hyper, params, self.state) if backend and not lowp_outs else None
        if backend and update and not backend.skips(hyper):
            return update, False

        batches = self._batches(group, where, hyper)
        left = {param: lowp_outs[param] for param in params if param in lowp_outs}
        for backend, batch in batches:
            if left and backend.writes_copies:
                batch.lowp_outs = [left.pop(owner, None) for owner in batch.owners]
        prepared = [self._prepare_batch(*batch) for batch in batches]
        read = {id(grad) for _, batch in batches for grad in batch.grads}  # others were copied first, or are skipped
        unread = [grad for _, _, _, grad in with_grads(group, where) if id(grad) not in read]

        def update_all() -> None:
            for update, _ in prepared:
                update()
            if zero_grads:
                for grad in unread:
                    grad.zero_()
            for param, out in left.items():
                out.copy_(sharding.local(self._fp32_param(param)))

        return update_all, any(states_are_new for _, states_are_new in prepared)

    @waits
    @torch.no_grad()
    def step_param(self, group_index: int, index: int) -> None:
        """Updates one param, given by its places, as step() would; for adamops.step_in_backward()."""
        group, where = self.param_groups[group_index], f"param group {group_index}"
        own = {**group, "params": group["params"][index : index + 1]}
        update, _ = self._prepare(own, where, False, {}, stream_offset=index)
        update()

    def _batches(self, group: dict[str, Any], where: str, hyper: AdamHyper) -> list[tuple[Backend, AdamBatch]]:
        """The group's params that have a grad, by the backends that update them; without those to be skipped."""
        batches: dict[torch.device, tuple[Backend, AdamBatch]] = {}
        for index, name, param, grad in with_grads(group, where):
            if param.device not in batches:
                batches[param.device] = self._backend_of(param, name), AdamBatch([], hyper, [], [], [])
            owner = group["params"][index]
            state = sharding.local_state(self.state.get(owner) or {}, owner, name)
            batches[param.device][1].append(index, name, param, grad, state, owner)
        return [(backend, batch) for backend, batch in batches.values() if not backend.skips(hyper)]

    def _prepare_batch(self, backend: Backend, batch: AdamBatch) -> tuple[Callable[[], None], bool]:
        """As _prepare(), for a batch."""
        needed = [{"step", *batch.state_dtypes(param)} for param in batch.params]
        complete = all(state.keys() >= keys for state, keys in zip(batch.states, needed, strict=True))
        if not complete:
            check_params_and_grads(batch)
            self._complete_states(backend, batch)
        update = backend.prepare(batch)
        if complete and not batch.has_shards:
            return update, False

        def update_and_keep_states() -> None:
            update()
            for owner, state in zip(batch.owners, batch.states, strict=True):
                self.state[owner] = sharding.owned_state(state, owner, self.state.get(owner))

        return update_and_keep_states, not complete

    def _backend_of(self, param: Tensor, name: str) -> Backend:
        """What updates the param. Raises ValueError if that can be nothing."""
        check_in_host_memory(param, name)
        return self._backends[_HOST]

    def _hyper(self, group: dict[str, Any], where: str, zero_grads: bool = False, stream_offset: int = 0) -> AdamHyper:
        """The group's hyper-parameters, checked, with what torch.amp.GradScaler sets for a step."""
        loss_scale = getattr(self, "grad_scale", None)
        hyper = AdamHyper.of_group(
            group,
            adamw_mode=self.adam_w_mode,
            precision=self._precision,
            grad_factor=self._grad_factor,
            zero_grads=zero_grads,
            stream=(_stream(group.get("stochastic_rounding_seed"), where) + stream_offset) & 0xFFFFFFFF,
            loss_scale=1.0 if loss_scale is None else loss_scale,
            found_inf=getattr(self, "found_inf", None),
            threads=self._preparing.threads if self._preparing else None,
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
            lacking = [
                i
                for i, param in enumerate(batch.params)
                if key != SCALES and key in batch.state_dtypes(param) and key not in completed[i]
            ]
            like = [batch.params[i] for i in lacking]
            dtypes = [batch.state_dtypes(param)[key] for param in like]
            for i, zeros in zip(lacking, backend.zeros_like(like, dtypes), strict=True):
                completed[i][key] = zeros.copy_(batch.params[i]) if key == MASTER else zeros
        for param, state in zip(batch.params, completed, strict=True):
            if SCALES in batch.state_dtypes(param):
                _complete_scales(state, param, batch.hyper.amsgrad)
        batch.states = completed

    @waits
    def state_dict(self, dequantize: bool = False) -> dict[str, Any]:
        """The state and settings, as torch.optim.Optimizer gives them.

        With `dequantize`, states are float32 whatever they are here, without what belongs to the params' precision:
        torch.optim.AdamW loads that. Of DTensors all states are DTensors that torch.distributed.checkpoint can cut
        anew, float32 in the place of codes; see portable_state_dicts().
        """
        state_dict = super().state_dict()

        def saved(entry: Any) -> Any:
            if not isinstance(entry, dict):
                return entry
            entry = portable(entry) if sharding.is_sharded(entry.get("exp_avg")) else entry
            return in_fp32(entry) if dequantize else entry

        return {**state_dict, "state": {key: saved(entry) for key, entry in state_dict["state"].items()}}

    @waits
    @torch.no_grad()
    def fp32_params(self) -> list[Tensor]:
        """The params of all groups in order, in float32: new tensors, of the masters where there are any.

        Of DTensors they are DTensors placed alike.
        """
        return [self._fp32_param(param) for group in self.param_groups for param in group["params"]]

    def _fp32_param(self, param: Tensor) -> Tensor:
        master, state = self._precision.master_of(param), self.state.get(param) or {}
        held = sharding.local(param)
        if master is Master.NONE or master.key not in state:
            values = held.detach().float().clone()
        elif master is Master.FP32:
            values = sharding.local(state[MASTER]).clone()
        else:
            values = remainders.join(held.detach(), sharding.local(state[REMAINDER]))
        return sharding.like_param_placed(values, param)

    @waits
    @torch.no_grad()
    def load_fp32_params(self, params: Sequence[Tensor]) -> None:
        """Sets the params of all groups, in order, and their masters from float32 tensors, as of a checkpoint.

        Of DTensors they must be DTensors placed alike.

        Raises
        ------
        ValueError, TypeError
            If there are too few or too many, or a shape or placement differs; the params are then as they were.
        """
        own = [param for group in self.param_groups for param in group["params"]]
        if len(own) != len(params):
            raise ValueError(f"There are {len(own)} params in this optimizer, and {len(params)} were given")
        for i, (param, value) in enumerate(zip(own, params, strict=True)):
            if param.shape != value.shape:
                raise ValueError(f"param {i} has shape {tuple(param.shape)}, and {tuple(value.shape)} was given")
        values = [
            sharding.local_like(value, param, f"param {i}: what was given")
            for i, (param, value) in enumerate(zip(own, params, strict=True))
        ]
        for param, value in zip(own, values, strict=True):
            master, held = self._precision.master_of(param), sharding.local(param)
            if master in (Master.REMAINDER_8, Master.REMAINDER_16):
                upper, rest = remainders.split(
                    like_param(value.to(held.device, torch.float32), held), held.dtype, master.dtype
                )
                held.copy_(upper)
                rest = sharding.like_param_placed(rest, param)
                self.state[param] = {**(self.state.get(param) or {}), REMAINDER: rest}
            else:
                held.copy_(value)
                if master is Master.FP32 and MASTER in (self.state.get(param) or {}):
                    sharding.local(self.state[param][MASTER]).copy_(value)

    @waits
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
        if "defaults" in state:  # a whole optimizer, perhaps of an older version
            state.setdefault("_shared", {})
            state.setdefault("_backends", {_HOST: _load_host_backend()})
            state.setdefault("fp32_optimizer_states", True)
            state.setdefault("master_weights", False)
            state.setdefault("_precision", _precision_of(state["fp32_optimizer_states"], state["master_weights"]))
        if "state" in state and "param_groups" in state:
            precision = state.get("_precision") or self._precision
            state["state"] = adopted_states(state["state"], state["param_groups"], precision)
            for i, group in enumerate(state["param_groups"]):
                if "betas" not in group:
                    raise ValueError(f"param group {i} has no betas; this is not the state of an Adam optimizer")
                beta1, beta2 = group["betas"]
                _check_betas(float(beta1), float(beta2), f" in param group {i}")
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            if "stochastic_rounding_seed" in self.defaults:
                group.setdefault("stochastic_rounding_seed", self.defaults["stochastic_rounding_seed"])

    @waits
    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "adam_w_mode": self.adam_w_mode,
            "fp32_optimizer_states": self.fp32_optimizer_states,
            "master_weights": self.master_weights,
            "_precision": self._precision,
        }


def _precision_of(
    fp32_states: bool,
    fp32_masters: bool,
    state_dtype: torch.dtype | str | None = None,
    master_weight_bits: int | None = None,
    stochastic_rounding: bool = False,
) -> Precision:
    """The precision that the arguments of an optimizer ask for. Raises ValueError if they contradict each other."""
    if state_dtype is not None and not fp32_states:
        raise ValueError(f"fp32_optimizer_states=False and state_dtype={state_dtype!r}: give one of them")
    master = Master.of_bits(master_weight_bits)
    if fp32_masters and master:
        raise ValueError(f"master_weights=True and master_weight_bits={master_weight_bits}: give one of them")
    if fp32_masters and state_dtype not in (None, torch.float32):
        raise ValueError(f"master_weights=True goes with float32 states, not {state_dtype}; use master_weight_bits=32")
    if stochastic_rounding and (fp32_masters or master is Master.REMAINDER_16):
        raise ValueError(
            "stochastic_rounding=True goes with params without masters, or of 24 bits: others lose nothing"
        )
    default = torch.float32 if fp32_states else None
    return Precision(
        default if state_dtype is None else state_dtype, Master.FP32 if fp32_masters else master, stochastic_rounding
    )


def _stream(seed: int | None, where: str) -> int:
    """Where the random bits of a group's params begin, 32 bits."""
    if seed is None:
        return 0
    return int.from_bytes(hashlib.blake2s(f"{seed} {where}".encode(), digest_size=4).digest(), "little")


def _complete_scales(state: dict[str, Any], param: Tensor, amsgrad: bool) -> None:
    """Gives a state in codes the scales that it lacks: of zeros, which all scales fit."""
    shape = scales_shape(param, amsgrad)
    scales = state.get(SCALES)
    if scales is None or scales.shape != shape:
        state[SCALES] = torch.zeros(shape, dtype=torch.bfloat16, device=param.device)
        if scales is not None:
            columns = min(scales.shape[1], shape[1])
            state[SCALES][:, :columns] = scales[:, :columns]


def _norm_of(backend: Backend, device: torch.device, grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all elements of grads on the device, in float64 there."""
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.full((), sharding.norm_of_nothing(norm_type), dtype=torch.float64, device=device)
    if all(grad.layout == torch.strided for grad in grads):
        dense = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
        norm = backend.grad_norm(dense, norm_type)
        if norm is not None:
            return torch.as_tensor(norm, dtype=torch.float64)
    norms = torch.stack([grad.float().norm(norm_type) for grad in grads])
    return torch.linalg.vector_norm(norms, norm_type).double()


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, with autograd on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_grads(group: dict[str, Any], where: str) -> list[tuple[int, str, Tensor, Tensor]]:
    """The index in the group, the name, the param and the grad of each that has one; of DTensors the local tensors."""
    return [
        (i, name, sharding.local(param), sharding.local(sharding.grad_like(param, param.grad, name)))
        for i, param in enumerate(group["params"])
        if param.grad is not None
        for name in [f"{where}, param {i}"]
    ]


def _check_hyper(group: dict[str, Any], where: str) -> None:
    """Raises ValueError for a hyper-parameter out of range, as torch.optim.Adam does; `where` ends the message."""
    lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, has shape {tuple(lr.shape)}{where}")
    for i, beta in enumerate((beta1, beta2)):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element, has shape {tuple(beta.shape)}{where}")
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

"""Makes DeepSpeed use the prebuilt ops instead of those that it compiles at first use: patch(), unpatch().

    import adamops.deepspeed
    adamops.deepspeed.patch()  # before deepspeed.initialize()

or, without a change to the script, `python -m adamops.deepspeed train.py`. DeepSpeed's optimizers remain its own
classes; only the op that their builders load is replaced. Optimizers of adamops are kept as they are. Must not know how
an update is computed. Must not change what DeepSpeed computes, with one exception: bfloat16 averages are rounded with
noise, as everywhere in adamops (csrc/formats/average_rounding.h).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import op_builder
from ._deepspeed_children import PatchedChildren
from ._deepspeed_config import read_settings, take_16_bit_masters
from .ops.adam import DeepSpeedCPUAdam, FusedAdam
from .ops.adam.adam import AdamRule, adam_settings
from .ops.adam.adam_optimizer import AdamOptimizer
from .ops.adam.rollback import undo_step
from .optim.backends.base import Backend
from .optim.backends.cpu import NativeBackend
from .optim.backends.cuda import CudaBackend
from .optim.batch import Batch, check_params_and_grads, check_states
from .optim.step_settings import StepSettings

__all__ = ["TESTED_VERSION", "Patch", "UnknownDeepSpeedError", "patch", "unpatch"]

TESTED_VERSION = "0.19.8"
SHM_COMM = "deepspeed_shm_comm"  # the op with which CPU ranks all-reduce activations in inference


class UnknownDeepSpeedError(RuntimeError):
    """DeepSpeed differs from what patch() expects. Nothing has been changed."""


@functools.lru_cache(maxsize=256)
def _settings_of_numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bias_correction: bool, adamw_mode: bool
) -> StepSettings:
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"Invalid betas: {(beta1, beta2)}; expected 0 <= beta < 1")
    return adam_settings(lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode)


def _settings(
    lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, bias_correction: Any, adamw_mode: Any
) -> StepSettings:
    """From DeepSpeed's arguments, which may be 0-dim tensors, or numbers instead of bools."""
    rates = (float(rate) for rate in (lr, beta1, beta2, eps, weight_decay))
    return _settings_of_numbers(*rates, bias_correction=bool(bias_correction), adamw_mode=bool(adamw_mode))


def _update(
    backend: Backend,
    settings: StepSettings,
    names: list[str],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: list[dict[str, Any]],
) -> None:
    """Updates params with Adam, in place. The states hold the step counts from before the step."""
    batch = Batch(names, settings, list(params), list(grads), states, list(range(len(names))))
    # torch refuses a wrong shape or device, or a float32 grad for a 16-bit param; batch.grads is used then.
    with contextlib.suppress(RuntimeError):
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if param.grad is not grad:  # the op reads grads from param.grad
                batch.params[i] = alias = param.detach()
                alias.grad = grad
    backend.prepare(batch)()


class _Op:
    """What a builder of DeepSpeed loads. Its functions have the names and arguments of DeepSpeed's own op."""

    def __init__(self, builder: Any, registry: dict[str, Any]) -> None:
        self._builder = builder
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        """A function that is missing here, such as ZenFlow's, from DeepSpeed's own op, which is then compiled."""
        if name.startswith("_"):
            raise AttributeError(name)
        patched = self._registry.get(self._builder.NAME) is self
        if patched:
            del self._registry[self._builder.NAME]
        try:
            return getattr(self._builder().load(), name)
        finally:
            if patched:
                self._registry[self._builder.NAME] = self

    def _check_arguments(self, function: str, arguments: Sequence[Any], expected: int) -> None:
        if len(arguments) != expected:
            raise UnknownDeepSpeedError(
                f"DeepSpeed calls {function}() of its op {self._builder.NAME} with {len(arguments)} arguments; "
                f"adamops.deepspeed knows {expected} of DeepSpeed {TESTED_VERSION}, and this is {_version()}. "
                "Call adamops.deepspeed.unpatch(), and DeepSpeed compiles its own op"
            )


class CPUAdamOp(_Op):
    """Replaces DeepSpeed's op cpu_adam, which its DeepSpeedCPUAdam calls for each param."""

    def __init__(self, builder: Any, registry: dict[str, Any], backend: Backend) -> None:
        super().__init__(builder, registry)
        self._backend = backend
        self._adamw_modes: dict[int, bool] = {}  # by optimizer id

    def create_adam(self, *arguments: Any) -> int:
        """(optimizer_id, lr, beta1, beta2, eps, weight_decay, adamw_mode, should_log): only id and mode are used."""
        self._check_arguments("create_adam", arguments, 8)
        self._adamw_modes[arguments[0]] = bool(arguments[6])
        return 0

    def destroy_adam(self, optimizer_id: int) -> int:
        """Forgets the optimizer."""
        self._adamw_modes.pop(optimizer_id, None)
        return 0

    def adam_update(self, *arguments: Any) -> int:
        """Takes the arguments of _unpacked() and updates param, exp_avg and exp_avg_sq."""
        self._check_arguments("adam_update", arguments, 12)
        settings, step, param, grad, state = self._unpacked(*arguments)
        state["step"] = step - 1
        _update(self._backend, settings, ["a param of DeepSpeedCPUAdam"], [param], [grad], [state])
        return 0

    def adam_rollback(self, *arguments: Any) -> int:
        """Undoes the adam_update() that had the same arguments."""
        self._check_arguments("adam_rollback", arguments, 12)
        settings, step, param, grad, state = self._unpacked(*arguments)
        state["step"] = step
        batch = Batch(["a param of DeepSpeedCPUAdam"], settings, [param], [grad], [state])
        check_params_and_grads(batch)
        check_states(batch)
        undo_step(param, batch.grads[0], state, settings)
        return 0

    def _unpacked(
        self,
        optimizer_id: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    ) -> tuple[StepSettings, int, Tensor, Tensor, dict[str, Any]]:
        settings = _settings(lr, beta1, beta2, eps, weight_decay, bias_correction, self._adamw_modes[optimizer_id])
        return settings, int(step), param, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


class FusedAdamOp(_Op):
    """Replaces DeepSpeed's op fused_adam, which its FusedAdam calls once for each param group and dtype."""

    def __init__(self, builder: Any, registry: dict[str, Any], backend_of: Callable[[torch.device], Backend]) -> None:
        super().__init__(builder, registry)
        self._backend_of = functools.cache(backend_of)

    def multi_tensor_adam(self, *arguments: Any) -> None:
        """(chunk_size, noop_flag, [grads, params, exp_avgs, exp_avg_sqs], lr, ..., step, adam_w_mode, ...)."""
        self._check_arguments("multi_tensor_adam", arguments, 11)
        (_, _, lists, lr, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay) = arguments
        settings = _settings(lr, beta1, beta2, eps, weight_decay, bias_correction, adam_w_mode)
        grads, params, exp_avgs, exp_avg_sqs = lists
        states = [
            {"step": int(step) - 1, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for exp_avg, exp_avg_sq in zip(exp_avgs, exp_avg_sqs, strict=True)
        ]
        names = [f"param {i} of FusedAdam" for i in range(len(params))]
        _update(self._backend_of(params[0].device), settings, names, params, grads, states)


class Patch:
    """What a patch() has changed. undo(), or the end of a `with` block, reverts it.

    Attributes
    ----------
    replaced
        The names of DeepSpeed's ops that adamops replaces.
    left
        Those that DeepSpeed still compiles, each with the reason.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self._undo: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Restores everything. Existing optimizers keep the op that they were created with."""
        global _patch
        while self._undo:
            self._undo.pop()()
        if _patch is self:
            _patch = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    # For patch() ------------------------------------------------------------------------------------------------------

    def set_entry(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        """Sets an entry of a dict; undo() reverts it."""
        if key in mapping:
            self._undo.append(functools.partial(mapping.__setitem__, key, mapping[key]))
        else:
            self._undo.append(functools.partial(mapping.pop, key, None))
        mapping[key] = value

    def set_attribute(self, owner: Any, name: str, value: Any) -> Any:
        """Sets an attribute; undo() reverts it. Returns the former value."""
        former = getattr(owner, name)
        self._undo.append(functools.partial(setattr, owner, name, former))
        setattr(owner, name, value)
        return former

    def add(self, sequence: list[Any], value: Any) -> None:
        """Adds a value to a list, unless it is there already; undo() reverts it."""
        if value not in sequence:
            sequence.append(value)
            self._undo.append(functools.partial(sequence.remove, value))

    def enable(self, thing: PatchedChildren) -> None:
        """Enables something; undo() disables it."""
        self._undo.append(thing.disable)
        thing.enable()


_patch: Patch | None = None


def patch(*, shm_comm: bool = False) -> Patch:
    """Makes DeepSpeed's DeepSpeedCPUAdam and FusedAdam use the ops of adamops, in this process, until unpatch().

    They remain DeepSpeed's classes, so its engine, its config and its checkpoints work as before. They no longer need a
    compiler. If params are on GPUs, FusedAdam keeps DeepSpeed's op unless the CUDA op is available.

    ZeRO accepts the classes of adamops as client optimizers, offloaded or not, whatever the config says about untested
    optimizers. Accelerate does not replace them. A config whose optimizer has one of adamops' settings among its params
    (``"state_dtype": "8bit"``) gets the class of adamops instead of DeepSpeed's. ZeRO accepts them with
    ``bf16_master_weights_and_grads`` too.

    A second call changes nothing, and neither does undoing its result. Call it in each process that trains, before
    ``deepspeed.initialize()``. Processes that multiprocessing spawns afterwards, such as SuperOffload's, are patched
    when they import DeepSpeed. Those that `subprocess` starts are not.

    Parameters
    ----------
    shm_comm
        Whether DeepSpeed may compile its op for shared-memory reductions, as it does when it starts on CPUs. Only its
        inference_all_reduce() uses it, and torch's all-reduce otherwise.

    Raises
    ------
    ImportError
        If DeepSpeed cannot be imported.
    UnknownDeepSpeedError
        If it lacks what this relies on, as a version other than TESTED_VERSION may.
    adamops.op_builder.OpUnavailableError
        If adamops has no compiled CPU op here.
    """
    global _patch
    if _patch is not None:
        return Patch()
    try:
        import deepspeed
        import deepspeed.ops.op_builder as builders
    except ImportError as error:
        raise ImportError(
            f"adamops.deepspeed.patch() needs DeepSpeed, which cannot be imported ({error}); pip install deepspeed"
        ) from error
    cpu_builder, registry = _builder_and_registry(builders, "CPUAdamBuilder", "cpu_adam")
    fused_builder, _ = _builder_and_registry(builders, "FusedAdamBuilder", "fused_adam")
    backend = NativeBackend(op_builder.get("cpu_adam").load())

    new = Patch()
    try:
        _replace(new, cpu_builder, registry, CPUAdamOp(cpu_builder, registry, backend))
        device_type = deepspeed.accelerator.get_accelerator().device_name()
        reason = _why_not_fused(fused_builder, device_type)
        if reason is None:
            _replace(new, fused_builder, registry, FusedAdamOp(fused_builder, registry, _backends(backend)))
        else:
            new.left[fused_builder.NAME] = reason
        _accept_as_client_optimizers(new)
        read_settings(new.set_attribute)
        take_16_bit_masters(new.set_attribute)
        _keep_under_accelerate(new)
        _convert_quantized_states(new)
        new.enable(PatchedChildren("adamops.deepspeed", shm_comm=shm_comm))
        if device_type == "cpu" and not shm_comm:
            new.set_entry(deepspeed.ops.__compatible_ops__, SHM_COMM, False)
    except BaseException:
        new.undo()
        raise
    _patch = new
    return new


def unpatch() -> None:
    """Undoes patch(); does nothing if nothing is patched."""
    if _patch is not None:
        _patch.undo()


def _version() -> str:
    deepspeed = sys.modules.get("deepspeed")
    return getattr(deepspeed, "__version__", "of unknown version")


def _builder_and_registry(builders: Any, class_name: str, op_name: str) -> tuple[Any, dict[str, Any]]:
    """A builder class, and the dict of loaded ops that all builders check first."""
    builder = getattr(builders, class_name, None)
    registry = getattr(builder, "_loaded_ops", None)
    if builder is None or not isinstance(registry, dict) or getattr(builder, "NAME", None) != op_name:
        raise UnknownDeepSpeedError(
            f"DeepSpeed {_version()} has no deepspeed.ops.op_builder.{class_name} that keeps loaded ops in "
            f"_loaded_ops, as DeepSpeed {TESTED_VERSION} has, with which adamops.deepspeed was tested. "
            "adamops.DeepSpeedCPUAdam and FusedAdam can be given to deepspeed.initialize(optimizer=) all the same"
        )
    return builder, registry


def _replace(new: Patch, builder: Any, registry: dict[str, Any], op: _Op) -> None:
    new.set_entry(registry, builder.NAME, op)
    if builder().load() is not op:
        raise UnknownDeepSpeedError(
            f"DeepSpeed {_version()} does not take its op {builder.NAME} from where {TESTED_VERSION} does"
        )
    new.replaced.append(builder.NAME)


def _why_not_fused(builder: Any, device_type: str) -> str | None:
    """Why FusedAdam keeps DeepSpeed's op; None if adamops has an op for it."""
    if device_type == "cpu":
        return None
    if device_type != "cuda" or torch.version.hip:
        return f"adamops has no op for {'AMD GPUs' if torch.version.hip else device_type}"
    try:
        op_builder.get("fused_adam").load()
    except op_builder.OpUnavailableError as error:
        return str(error)
    return None


def _backends(host: Backend) -> Callable[[torch.device], Backend]:
    def backend_of(device: torch.device) -> Backend:
        if device.type == "cpu":
            return host
        builder: Any = op_builder.get("fused_adam")
        return CudaBackend(builder.load_for_device(device.index), device)

    return backend_of


def _accept_as_client_optimizers(new: Patch) -> None:
    """Makes ZeRO accept our classes, offloaded or not, without settings in the config."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import utils

    supported = getattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if isinstance(supported, list):
        new.add(supported, DeepSpeedCPUAdam)
        new.add(supported, FusedAdam)

    def zero_force_ds_cpu_optimizer(engine: Any) -> bool:
        return not isinstance(engine.client_optimizer, AdamOptimizer) and forces(engine)

    if hasattr(DeepSpeedEngine, "zero_force_ds_cpu_optimizer"):
        forces = new.set_attribute(DeepSpeedEngine, "zero_force_ds_cpu_optimizer", zero_force_ds_cpu_optimizer)


def _keep_under_accelerate(new: Patch) -> None:
    """Keeps our offloaded optimizers, which Accelerate, and so the Trainer, would replace by DeepSpeedCPUAdam."""
    try:
        import accelerate.accelerator
        import accelerate.utils.deepspeed
    except Exception:  # missing or broken, which does not matter to those who do not use it
        return
    name = "map_pytorch_optim_to_deepspeed"
    replace = getattr(accelerate.utils.deepspeed, name, None)
    if replace is None:
        return

    @functools.wraps(replace)
    def keep_or_replace(optimizer: Any) -> Any:
        return optimizer if isinstance(optimizer, AdamOptimizer) else replace(optimizer)

    for module in (accelerate.utils.deepspeed, accelerate.utils, accelerate.accelerator):
        if hasattr(module, name):
            new.set_attribute(module, name, keep_or_replace)


def _convert_quantized_states(new: Patch) -> None:
    """Dequantizes states for DeepSpeed's ds_to_universal, which splits the states of checkpoints by name."""
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError:
        return

    def main(*arguments: Any, **named: Any) -> None:
        from ._deepspeed_states import dequantizing_loads

        with dequantizing_loads(AdamRule.states):
            original(*arguments, **named)

    original = new.set_attribute(ds_to_universal, "main", main)


def main(arguments: list[str]) -> None:
    """Runs a script or module with DeepSpeed patched, as `python -m adamops.deepspeed` does."""
    from . import _deepspeed_runner

    _deepspeed_runner.main(arguments, patch)


if __name__ == "__main__":
    from adamops.deepspeed import main as _main  # not this copy of the module, which is named __main__

    _main(sys.argv[1:])

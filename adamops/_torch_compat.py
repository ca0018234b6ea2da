"""Every name of torch that is not public, each with what is done without it.

torch may rename or remove such names in any release. Nothing else in adamops uses one (tests/test_torch_compat.py), and
without any of them the optimizers still work, more slowly, or raise an error that says what is missing. Must not know
of optimizers' states or of ops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import Optimizer

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _find(module: str, path: str) -> Any:
    """What an imported module of torch has at this dotted path; None if it has nothing there."""
    found: Any = sys.modules.get(module)  # torch.optim hides torch.optim.optimizer, so this is not a path as well
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# Tensors ------------------------------------------------------------------------------------------------------------

# Whether torch says how often a tensor was written in place.
COUNTS_WRITES = hasattr(Tensor, "_version")


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written in place; None if torch does not count that."""
    try:
        return tensor._version
    except (RuntimeError, AttributeError):  # an inference tensor, even if it was given other data since
        return None


def _no(tensor: Tensor) -> bool:
    return False


# Whether this is a tensor of zeros without memory, as forward-mode autograd makes. Without the name, its missing memory
# is an error of memory.py.
is_zero_tensor: Callable[[Tensor], bool] = getattr(Tensor, "_is_zerotensor", None) or _no

# Whether the tensor only records operations (functionalization). Without the name, its missing memory is an error too.
is_functional: Callable[[Tensor], bool] = getattr(torch, "_is_functional_tensor", None) or _no


# A context in which no Python code of tensor subclasses runs. Without it, such code could free what was just checked.
without_torch_function: Callable[[], contextlib.AbstractContextManager[Any]] = (
    getattr(torch._C, "DisableTorchFunctionSubclass", None)
    or getattr(torch._C, "DisableTorchFunction", None)
    or contextlib.nullcontext
)


def dlpack_exchange_table() -> Any:
    """The capsule with torch's DLPack functions for C, from torch 2.10 on; without it, tensors are read in Python."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


# The next two raise AttributeError without the name; tensor_layout.py then finds no layout, and tensors are checked
# in Python.


def address_in_torch(of: Tensor | torch.UntypedStorage) -> int:
    """The address of torch's C++ object, a TensorImpl or StorageImpl."""
    return of._cdata


def dispatch_keys(tensor: Tensor) -> int:
    """The dispatch key set of a tensor, as a number."""
    return torch._C._dispatch_keys(tensor).raw_repr()


# torch.compile ------------------------------------------------------------------------------------------------------

_disable_dynamo = getattr(torch, "_disable_dynamo", None)
_has_dynamo = importlib.util.find_spec("torch._dynamo") is not None


def may_compile() -> bool:
    """Whether torch.compile may be in use: whether anyone has imported what it consists of."""
    return not _has_dynamo or "torch._dynamo" in sys.modules


def disable_dynamo(method: _Method, why: str) -> Callable[..., Any]:
    """The method hidden from torch.compile. Its first call imports torch._dynamo, which takes a second."""
    if _disable_dynamo is None:
        at_first_call = functools.cache(lambda: torch.compiler.disable(method))
        return lambda *args, **kwargs: at_first_call()(*args, **kwargs)
    disabled = _disable_dynamo(method)
    disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, why
    return disabled


# Optimizers and the profiler ----------------------------------------------------------------------------------------

_global_pre_hooks = _find("torch.optim.optimizer", "_global_optimizer_pre_hooks")
_global_post_hooks = _find("torch.optim.optimizer", "_global_optimizer_post_hooks")
_STATE_DICT_HOOKS = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
_RecordFunction = _find("torch._C._profiler", "_RecordFunctionFast")


def step_pre_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """The hooks that torch calls before a step, as far as they can be found."""
    return [*getattr(optimizer, "_optimizer_step_pre_hooks", {}).values(), *(_global_pre_hooks or {}).values()]


def step_post_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """The hooks that torch calls after a step, as far as they can be found."""
    return [*getattr(optimizer, "_optimizer_step_post_hooks", {}).values(), *(_global_post_hooks or {}).values()]


def converted_state_dict(
    optimizer: Optimizer, state_dict: Callable[[Any], Any], convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """What Optimizer.state_dict(), given as `state_dict`, returns, converted before the user's hooks see it.

    torch's method runs on a stand-in, whose first hook converts. Were that hook registered with the optimizer, another
    call, in a signal handler or a thread, would run it too. If torch keeps hooks elsewhere, they see it unconverted.
    """
    if not all(hasattr(optimizer, name) for name in _STATE_DICT_HOOKS):
        return convert(state_dict(optimizer))

    def bound(name: str) -> dict[Any, Callable[..., Any]]:
        """The user's hooks, which get the optimizer itself."""
        own = list(getattr(optimizer, name).items())
        return {key: functools.partial(_call_with, hook, optimizer) for key, hook in own}

    before, after = _STATE_DICT_HOOKS
    hooks = {before: bound(before), after: {"convert": lambda _, saved: convert(saved), **bound(after)}}
    stand_in = types.SimpleNamespace(param_groups=optimizer.param_groups, state=optimizer.state, **hooks)
    saved: dict[str, Any] = state_dict(stand_in)
    return saved


def _call_with(hook: Callable[..., Any], optimizer: Optimizer, _: object, *arguments: Any) -> Any:
    return hook(optimizer, *arguments)


def is_watched(optimizer: Any) -> bool:
    """Whether a profiler or hooks may have to see the optimizer's steps. Yes if torch cannot be asked."""
    try:
        return (
            profiler._is_profiler_enabled
            or _RecordFunction is None
            or _global_pre_hooks is None
            or _global_post_hooks is None
            or bool(
                _global_pre_hooks
                or _global_post_hooks
                or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks
            )
        )
    except AttributeError:
        return True


def record_event(name: str) -> contextlib.AbstractContextManager[Any]:
    """Records an event for profilers that are started from outside. For optimizers that are not watched."""
    event: contextlib.AbstractContextManager[Any] = _RecordFunction(name)
    return event


def mark_as_stepped(optimizer: Any) -> None:
    """Tells torch's schedulers, which warn otherwise, that the optimizer has stepped."""
    optimizer._opt_called = True


# Backward passes ----------------------------------------------------------------------------------------------------

_current_task = _find("torch._C", "_current_graph_task_id")
_queue_callback = _find("torch.autograd", "Variable._execution_engine.queue_callback")
_NODE = _find("torch.autograd.function", "BackwardCFunction")

# The code of the functions in which torch calls backward() of a Function. Without it, nested passes are refused.
NODE_CODES = {getattr(_NODE, name).__code__ for name in ("apply", "apply_boxed") if hasattr(_NODE, name)}


def check_backward_passes_are_known(what: str) -> None:
    """Raises RuntimeError if torch does not say which backward pass runs, and when it ends."""
    if _current_task is None or _queue_callback is None:
        raise RuntimeError(
            f"{what} needs torch._C._current_graph_task_id and queue_callback of torch's execution engine, and torch "
            f"{torch.__version__} lacks one of them; use optimizer.step()"
        )


def current_backward_pass() -> int:
    """The id of the backward pass, a graph task of autograd, that runs in this thread."""
    return _current_task()


def call_after_backward_pass(callback: Callable[[], None]) -> None:
    """Has autograd call this at the end of the backward pass that runs."""
    _queue_callback(callback)


# Sharded and replicated params --------------------------------------------------------------------------------------

# The attributes of a DTensor with this process' part, and with how it is sharded; the op's reader has them too.
_LOCAL_TENSOR, _SPEC = "_local_tensor", "_spec"
# The attributes that FullyShardedDataParallel (not fully_shard()) marks its params with.
_FSDP_MARKS = ("_is_flat_param", "_fsdp_flattened")


def dtensor_class() -> Any:
    """torch's DTensor class, or None if nobody has imported it yet."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the latter up to torch 2.4
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found
    return None


def dtensor_class_for_op() -> Any:
    """dtensor_class(), but None if the op cannot read DTensors of this torch."""
    found = dtensor_class()
    return found if hasattr(found, _LOCAL_TENSOR) and hasattr(found, _SPEC) else None


def local_tensor(sharded: Any) -> Tensor:
    """The local tensor of a DTensor."""
    found = getattr(sharded, _LOCAL_TENSOR, None)  # not to_local(), which would create a view of a param at each call
    if found is None:
        with torch.no_grad():
            found = sharded.to_local()
    return found


def dtensor_like(held: Tensor, sharded: Any) -> Tensor:
    """A DTensor with this local tensor, of the shape and placements of another."""
    spec = getattr(sharded, _SPEC, None)
    if spec is None:
        layout = {"shape": sharded.shape, "stride": sharded.stride()}
        mesh, placements = sharded.device_mesh, sharded.placements
        return dtensor_class().from_local(held, mesh, placements, run_check=False, **layout)
    # Not from_local(), which moves tensors to the device of the mesh: CPUOffloadPolicy keeps the shards of a
    # GPU mesh on the CPU. fully_shard() constructs its DTensors this way too.
    meta = spec.tensor_meta._replace(dtype=held.dtype)
    return dtensor_class()(held, dataclasses.replace(spec, tensor_meta=meta), requires_grad=False)


def is_marked_by_fsdp(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel has flattened or sharded the param."""
    return any(getattr(param, mark, False) for mark in _FSDP_MARKS)


def fsdp_marks_are_known() -> bool:
    """Whether FullyShardedDataParallel still marks its params the way is_marked_by_fsdp() expects, or is not in use."""
    modules = [sys.modules.get(f"torch.distributed.fsdp.{name}") for name in ("_flat_param", "_common_utils")]
    if modules == [None, None]:
        return "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules
    flat, flattened = _FSDP_MARKS
    make = getattr(getattr(modules[0], "FlatParameter", None), "__new__", None)
    return flat in getattr(getattr(make, "__code__", None), "co_names", ()) and (
        getattr(modules[1], "FSDP_FLATTENED", None) == flattened
    )


def averaged_params(wrapper: nn.Module) -> Iterable[Tensor]:
    """The params whose grads a wrapper averages; DistributedDataParallel can leave some out."""
    averaged = wrapper.__dict__.get("_module_parameters")
    return wrapper.parameters() if averaged is None else averaged


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def runs_no_hooks(model: nn.Module) -> bool:
    """Whether the model was sharded by fully_shard() of torch 2.4, which does not run the hooks of its params."""
    if _torch_version() >= (2, 5):
        return False
    modules = ("torch.distributed._composable.fsdp.", "torch.distributed.fsdp._fully_shard.")
    return any(cls.__module__.startswith(modules) for part in model.modules() for cls in type(part).__mro__)

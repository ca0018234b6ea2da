"""Reads and checks what the constructor of an offloaded optimizer is given. Must not know what is done with it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..optim import data_parallel, dtensor
from ..optim.backward import OfParam
from ..optim.batch import check_no_overlap, check_param
from ..optim.optimizer import RuleOptimizer
from ..optim.settings import check_flags

_OWNER = "_adamops_offloaded"  # an attribute of each param that is offloaded


class _Owner(OfParam):
    """The optimizer of a param, kept alive by others."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = weakref.ref(optimizer)


def check_arguments(
    optimizer: Any, accumulate: Any, chunk_mb: Any, threads: Any, update_in_backward: Any, model: Any, device: Any
) -> None:
    """Raises TypeError or ValueError."""
    if not (isinstance(optimizer, type) and issubclass(optimizer, RuleOptimizer)):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise TypeError(f"Only optimizer classes of adamops can be offloaded, such as DeepSpeedCPUAdam; got {name}")
    for name, value in (("accumulate", accumulate), ("threads", 1 if threads is None else threads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"Invalid {name}: {value!r}; expected an int of 1 or more")
    if type(chunk_mb) not in (int, float) or not 0 < chunk_mb < math.inf:
        raise ValueError(f"Invalid chunk_mb: {chunk_mb!r}; expected a number of more than 0")
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model is a {type(model).__name__}; expected the nn.Module whose params these are")
    check_flags({"update_in_backward": update_in_backward})
    if device is not None and (isinstance(device, type) or not hasattr(device, "new_stream")):
        raise TypeError(
            f"device is {device!r}; expected an object with the methods of adamops.offload.device.Device, or nothing: "
            "the params say on which device they are"
        )


def check_model(model: nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a model whose blocks cannot wait for their params."""
    if model is None:
        return
    params = {param for group in groups for param in params_of(group)}
    if any(map(dtensor.is_sharded, params)):
        raise ValueError("model= cannot be given for DTensors, which fully_shard() may read ahead of their block")
    if params.isdisjoint(model.parameters()):
        raise ValueError("model has none of the params of the optimizer")


def groups_of(params: Any) -> list[dict[str, Any]]:
    """The param groups, each with a list of tensors, or of pairs of a name and a tensor."""
    if isinstance(params, (Tensor, str, bytes, nn.Module, dict)):
        raise TypeError(f"params is a {type(params).__name__}; expected an iterable of tensors or dicts")
    given = list(params)
    if not given:
        raise ValueError("optimizer got an empty parameter list")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    return [group_of(group, f"param group {i}") for i, group in enumerate(groups)]


def group_of(group: Any, where: str) -> dict[str, Any]:
    """The same for one group, in a new dict."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"{where} is a {type(group).__name__} without params; expected a dict with 'params'")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(f"{where} has a set as its params, whose order changes; expected a list")
    entries = [params] if isinstance(params, Tensor) else list(params)
    for i, param in enumerate(map(param_of, entries)):
        if not isinstance(param, Tensor):
            raise TypeError(f"{where}, param {i} is a {type(param).__name__}; expected a tensor")
    return {**group, "params": entries}


def param_of(entry: Any) -> Any:
    """The param of an entry of a group: this may be a pair of its name and itself."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def params_of(group: Mapping[str, Any]) -> list[Tensor]:
    """The params of a group."""
    return list(map(param_of, group["params"]))


def check_params(groups: Sequence[Mapping[str, Any]], others: Collection[Tensor] = (), first: int = 0) -> torch.device:
    """The device of the params of groups, whose indices start at `first`, and of the others that the optimizer has.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For params that cannot be updated, that are there twice, that share memory, that are on several devices, that
        another offloaded optimizer has, or whose grads are averaged by a wrapper of their module.
    """
    named = {
        f"param group {first + g}, param {i}": param
        for g, group in enumerate(groups)
        for i, param in enumerate(params_of(group))
    }
    seen = set(others)
    for name, param in named.items():
        if param in seen:
            raise ValueError(f"{name} is in the optimizer already; pass each param once")
        seen.add(param)
        if is_lazy(param):
            raise ValueError(f"{name} has no shape yet, as it is of a lazy module; call the model once before")
        if _is_owned(param):
            raise ValueError(f"{name} is a param of another offloaded optimizer, which gets its grads; delete that one")
    trained = {name: param for name, param in named.items() if param.requires_grad}
    device = check_trained(trained, [param for param in others if param.requires_grad])
    wrapper = data_parallel.wrapper_of((), named.values())
    if wrapper is not None:
        raise RuntimeError(_averaged(wrapper))
    return device or next((param.device for param in named.values()), torch.device("cpu"))


def check_trained(named: Mapping[str, Tensor], others: Iterable[Tensor]) -> torch.device | None:
    """The device of params that get grads, given by name, and of others. Raises ValueError or TypeError."""
    for name, param in named.items():
        dtensor.check_placed(param, name)
        check_param(dtensor.local(param), name)
    every = {**named, **{f"a param of shape {tuple(p.shape)}, number {i}": p for i, p in enumerate(others)}}
    check_no_overlap({name: dtensor.local(param) for name, param in every.items()})
    devices = {param.device for param in every.values()}
    if len(devices) > 1:
        raise ValueError(f"The params are on {', '.join(sorted(map(str, devices)))}; expected one device")
    return devices.pop() if devices else None


def take_ownership(param: Tensor, optimizer: object) -> None:
    """Has other offloaded optimizers, and wrappers of its module that average grads, refuse the param."""
    setattr(param, _OWNER, _Owner(optimizer))
    data_parallel.watch_new_wrappers(_refuse_wrapper)


def _owner(param: Tensor) -> Any:
    owner = getattr(param, _OWNER, None)
    return owner.optimizer() if isinstance(owner, _Owner) else None


def _is_owned(param: Tensor) -> bool:
    """Whether another optimizer has the param. One that nobody refers to any more may still be updating it."""
    if (owner := _owner(param)) is not None:
        owner.wait()
        del owner
        gc.collect()  # schedulers make cycles of optimizers
    return _owner(param) is not None


def _refuse_wrapper(wrapper: str, modules: Iterable[nn.Module], params: Iterable[Tensor]) -> None:
    if any(_owner(param) is not None for param in params):
        raise RuntimeError(_averaged(wrapper))


def _averaged(wrapper: str) -> str:
    return (
        f"{wrapper} averages grads over processes, after an offloaded optimizer has sent them to the host: replicas "
        "would diverge. Use fully_shard(), which gives params grads that are averaged already"
    )


def offloadable_device(device: torch.device) -> torch.device:
    """The device, if torch has copies for it that need no waiting. Raises ValueError."""
    if device.type != "cuda":
        raise ValueError(f"The params are on {device}; offloading is for those on CUDA devices")
    return device

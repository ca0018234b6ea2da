"""Makes DeepSpeed read, write, move and convert the states of adamops' optimizers correctly.

DeepSpeed accesses states by name, a piece at a time, and does not know that 8-bit states have scales. Its helpers get
dequantized float32 values instead. States of other optimizers pass through unchanged. `states` are those of the rule
whose optimizers DeepSpeed is to know. Must not know how a step is done.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .optim.checkpoint.saving import without_quantized
from .optim.optimizer import RuleOptimizer
from .optim.rule import State
from .optim.state.precision import REMAINDER, SCALES, names_of
from .optim.state.quantization import QUANTIZATION_BLOCK
from .optim.state.quantized_states import dequantized_states, is_quantized, quantized_states
from .optim.state.remainders import join

_ELASTIC = (
    'with "elastic_checkpoint" DeepSpeed could not load this again: it wants a step count in param groups, which only '
    "its own FusedAdam has, and would lose the scales of 8-bit states. Leave it out: "
    "python -m adamops.deepspeed -m deepspeed.checkpoint.ds_to_universal converts checkpoints for any world size"
)
# Where files of ZeRO-1 and 2, and of ZeRO-3, have the optimizer's state dict, and its params.
_NAMES_IN_FILES = (
    ("base_optimizer_state", "single_partition_of_fp32_groups"),
    ("optimizer_state_dict", "fp32_flat_groups"),
)
_SWAPPED = "8-bit states that DeepSpeed keeps on NVMe cannot be read or written from outside; use float32 states"


# A piece of a flat state -------------------------------------------------------------------------------------------


def read_piece(state: dict[str, Any], states: tuple[State, ...], key: str, start: int, numel: int) -> Tensor:
    """Dequantizes elements of a state of a flat param into a new float32 tensor."""
    if numel == 0:
        return torch.zeros(0, device=state[key].device)
    values = dequantized_states(_blocks(state, states, start, numel), states)[key]
    return values.narrow(0, start % QUANTIZATION_BLOCK, numel)


def write_piece(state: dict[str, Any], states: tuple[State, ...], key: str, start: int, values: Tensor) -> None:
    """Quantizes values into a state of a flat param, rounding to the nearest. The other elements of their
    quantization blocks keep their values, unless a scale has to grow."""
    if values.numel() == 0:
        return
    blocks = _blocks(state, states, start, values.numel())
    floats = dequantized_states(blocks, states)
    floats[key].narrow(0, start % QUANTIZATION_BLOCK, values.numel()).copy_(values)
    for name, tensor in quantized_states(floats, states).items():
        held = blocks[name]
        (held[:, : tensor.shape[1]] if name == SCALES else held).copy_(tensor)


def _blocks(state: dict[str, Any], states: tuple[State, ...], start: int, numel: int) -> dict[str, Tensor]:
    """Views of the quantization blocks that hold the elements."""
    first, last = start // QUANTIZATION_BLOCK, -(-(start + numel) // QUANTIZATION_BLOCK)
    elements = slice(first * QUANTIZATION_BLOCK, last * QUANTIZATION_BLOCK)
    views = {name: state[name][elements] for name in names_of(states) if name in state}
    return views | {SCALES: state[SCALES][first:last]}


def _is_quantized(state: Any, states: tuple[State, ...], key: str | None) -> bool:
    return key in names_of(states) and isinstance(state, dict) and is_quantized(state, states)


# DeepSpeed's helpers -----------------------------------------------------------------------------------------------

_installed = False


def install(states: tuple[State, ...]) -> None:
    """Wraps DeepSpeed's helpers, once. Warns if this DeepSpeed is not what the wrappers were written for."""
    global _installed
    if _installed:
        return
    _installed = True
    wraps: list[Callable[[], None]] = [
        functools.partial(_wrap_fragments, states),
        functools.partial(_wrap_partitions, states),
        _wrap_offloading,
        functools.partial(_wrap_loading, states),
        _refuse_elastic_checkpoints,
    ]
    for wrap in wraps:
        try:
            wrap()
        except (ImportError, AttributeError) as error:
            warnings.warn(
                f"adamops cannot teach this DeepSpeed to read 8-bit states ({error}): do not read or set them by "
                "deepspeed.utils.safe_get_full_optimizer_state() and the like, nor load universal checkpoints. Float "
                "states are not concerned",
                stacklevel=2,
            )


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _wrap_fragments(states: tuple[State, ...]) -> None:
    """ZeRO-1 and 2: each model param knows its fragment of a flat param, and of the flat param's states."""
    from deepspeed.utils import mixed_precision_linkage
    from deepspeed.utils.tensor_fragment import tensor_fragment

    def link(original: Callable[..., None]) -> Callable[..., None]:
        def set_optim_state_fragment(self: Any, flat_hp_partition: Tensor, optim_fragment: Any) -> None:
            original(self, flat_hp_partition, optim_fragment)
            self._adamops_state = optim_fragment

        return set_optim_state_fragment

    def read(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_optim_state_fragment(self: Any, key: str) -> Tensor:
            held, state = original(self, key), getattr(self, "_adamops_state", None)
            # While DeepSpeed loads a checkpoint, float32 fragments stand in for those of the state.
            if state is None or held.is_floating_point() or not _is_quantized(state, states, key):
                return held
            address = self.hp_fragment_address
            return read_piece(state, states, key, address.start, address.numel)

        return get_optim_state_fragment

    def write(original: Callable[..., None]) -> Callable[..., None]:
        def set_full_hp_param(self: Any, value: Tensor, optim_state_key: str | None = None) -> None:
            state: Any = getattr(self._hp_mapping, "_adamops_state", None)
            if not _is_quantized(state, states, optim_state_key):
                original(self, value, optim_state_key)
                return
            source, target = self._hp_mapping.lp_fragment_address, self._hp_mapping.hp_fragment_address
            values = value.flatten().narrow(0, source.start, source.numel)
            write_piece(state, states, str(optim_state_key), target.start, values)

        return set_full_hp_param

    _wrap(tensor_fragment, "set_optim_state_fragment", link)
    _wrap(tensor_fragment, "get_optim_state_fragment", read)
    _wrap(mixed_precision_linkage, "set_full_hp_param", write)


def _wrap_partitions(states: tuple[State, ...]) -> None:
    """ZeRO-3: the optimizer looks up a param's position in the flat param of its subgroup."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    def quantized_state(self: Any, param: Tensor, key: str | None) -> tuple[Any, int, int] | None:
        if not param.requires_grad or key not in names_of(states):
            return None
        group, start, numel = self.grad_position[self.get_param_id(param)]
        state = self.optimizer.state.get(self.fp32_partitioned_groups_flat[group])
        if not _is_quantized(state, states, key):
            return None
        if self._swappable_optimizer_subgroup(group):
            raise NotImplementedError(_SWAPPED)
        return state, start, numel

    def read(original: Callable[..., Any]) -> Callable[..., Any]:
        def _get_fp32_opt_state_partition(self: Any, param: Tensor, *arguments: Any, **named: Any) -> Any:
            # The key is the last argument; some versions of DeepSpeed have a bool before it.
            key: Any = named.get("optim_state_key", arguments[-1] if arguments else None)
            place = quantized_state(self, param, key)
            held, group = original(self, param, *arguments, **named)
            if place is None:
                return held, group
            self._adamops_lent = read_piece(place[0], states, key, *place[1:])
            return self._adamops_lent, group

        return _get_fp32_opt_state_partition

    def write(original: Callable[..., None]) -> Callable[..., None]:
        def set_hp_param(self: Any, value: Tensor, param: Tensor, optim_state_key: str | None = None) -> None:
            original(self, value, param, optim_state_key)  # if quantized, into the tensor that read() lends
            place = quantized_state(self, param, optim_state_key)
            if place is not None:
                write_piece(place[0], states, str(optim_state_key), place[1], self._adamops_lent)

        return set_hp_param

    _wrap(Stage3, "_get_fp32_opt_state_partition", read)
    _wrap(Stage3, "set_full_hp_param", write)
    _wrap(Stage3, "set_local_hp_param", write)


def _wrap_offloading() -> None:
    """ZeRO-3 offloads states only for DeepSpeed's own FusedAdam, although it uses nothing of it but `state`."""
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    def offload(original: Callable[..., None]) -> Callable[..., None]:
        def offload_states(self: Any, *arguments: Any, **named: Any) -> None:
            optimizer = self.optimizer
            if not isinstance(optimizer, RuleOptimizer):
                original(self, *arguments, **named)
                return
            _drop_cast_buffers(optimizer.state)
            self.optimizer = stand_in = FusedAdam.__new__(FusedAdam)
            stand_in.state = optimizer.state
            try:
                original(self, *arguments, **named)
            finally:
                self.optimizer = optimizer

        return offload_states

    if hasattr(Stage3, "offload_states"):  # in DeepSpeed newer than 0.15
        _wrap(Stage3, "offload_states", offload)


def _drop_cast_buffers(states: dict[Any, Any]) -> None:
    """Drops the buffers that DeepSpeed keeps in states for the next offload, if loading has cast them to float32."""
    suffix = "_offload_buffer"
    for state in states.values():
        for key in [key for key in state if isinstance(key, str) and key.endswith(suffix)]:
            if state[key].dtype != state[key.removesuffix(suffix)].dtype:
                del state[key]


# Checkpoints -------------------------------------------------------------------------------------------------------


def _wrap_loading(states: tuple[State, ...]) -> None:
    """Converts the float32 states that DeepSpeed loads from a universal checkpoint to the optimizer's own form."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    def load(original: Callable[..., None]) -> Callable[..., None]:
        def load_hp_checkpoint_state_from_checkpoint_dir(self: Any, lp_groups_name: str, *rest: Any) -> None:
            _refuse_missing_states(self)
            original(self, lp_groups_name, *rest)
            if isinstance(self.optimizer, RuleOptimizer):
                _adopt_states(self.optimizer)
                groups = zip(getattr(self, lp_groups_name), self.optimizer.param_groups, strict=False)
                for params, group in groups:
                    lazy_init_hp_params_optimizer_state(params, group["params"][0], self.optimizer.state)

        return load_hp_checkpoint_state_from_checkpoint_dir

    def load_stage3(original: Callable[..., None]) -> Callable[..., None]:
        def load_hp_checkpoint_state_from_checkpoint_dir_stage3(self: Any, *arguments: Any) -> None:
            _refuse_missing_states(self)
            original(self, *arguments)
            if isinstance(self.optimizer, RuleOptimizer):
                self._set_fp32_optimizer_param_groups()
                _adopt_states(self.optimizer)
                self._clear_fp32_optimizer_param_groups()

        return load_hp_checkpoint_state_from_checkpoint_dir_stage3

    _wrap(ZeROOptimizer, "load_hp_checkpoint_state_from_checkpoint_dir", load)
    _wrap(Stage3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", load_stage3)


def _refuse_missing_states(zero: Any) -> None:
    """Raises NotImplementedError if ZeRO's optimizer is ours and has tensors that universal checkpoints lack."""
    optimizer = zero.optimizer
    if not isinstance(optimizer, RuleOptimizer):
        return
    steps_16_bit = getattr(zero, "master_weights_and_grads_dtype", torch.float32) != torch.float32
    missing = {
        "max_exp_avg_sq": ("amsgrad=True", any(group.get("amsgrad") for group in optimizer.param_groups)),
        "remainders": ("master_weight_bits", steps_16_bit and optimizer._precision.master),
    }
    for tensors, (setting, is_used) in missing.items():
        if is_used:
            raise NotImplementedError(
                f"DeepSpeed's universal checkpoints do not hold {tensors}, so they cannot be loaded with {setting}; "
                "load an ordinary checkpoint"
            )


def _adopt_states(optimizer: RuleOptimizer) -> None:
    """Converts states that were set from outside to the form that the optimizer's load_state_dict() produces."""
    for state in optimizer.state.values():
        if not is_quantized(state, optimizer.rule.states):
            state.pop(SCALES, None)  # the quantized states that they belonged to are gone
    optimizer.load_state_dict(optimizer.state_dict())


def _refuse_elastic_checkpoints() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def check(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(self.optimizer, RuleOptimizer):
                raise NotImplementedError(_ELASTIC)
            return original(self, *arguments, **named)

        return checked

    _wrap(DeepSpeedZeroOptimizer, "_get_base_optimizer_state", check)
    _wrap(DeepSpeedZeroOptimizer, "_restore_base_optimizer_state", check)


def dequantized(loaded: Any, states: tuple[State, ...]) -> Any:
    """The contents of one of DeepSpeed's ZeRO state files, with 8-bit states and split masters in float32."""
    optimizer = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
    if not isinstance(optimizer, dict):
        return loaded
    for name, masters in _NAMES_IN_FILES:
        base, params = optimizer.get(name), optimizer.get(masters)
        if isinstance(base, dict) and isinstance(base.get("state"), dict):
            base["state"] = {key: without_quantized(entry, states) for key, entry in base["state"].items()}
            if isinstance(params, list):
                optimizer[masters] = [_joined(param, base["state"].get(i)) for i, param in enumerate(params)]
    return loaded


def _joined(param: Tensor, state: Any) -> Tensor:
    """The float32 master of a flat 16-bit param without padding; of any other, the param itself."""
    if not isinstance(state, dict) or REMAINDER not in state:
        return param
    return join(param.detach(), state[REMAINDER][: param.numel()])


@contextmanager
def dequantizing_loads(states: tuple[State, ...]) -> Iterator[None]:
    """Makes torch.load() apply dequantized(), for DeepSpeed's ds_to_universal, which loads files in many places."""
    load = torch.load

    @functools.wraps(load)
    def load_dequantized(*arguments: Any, **named: Any) -> Any:
        return dequantized(load(*arguments, **named), states)

    torch.load = load_dequantized
    try:
        yield
    finally:
        torch.load = load

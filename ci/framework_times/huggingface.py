"""Step times as in the Trainer of transformers: Accelerate's clipping, then the step of Accelerate's wrapper.

The params have the sizes of real models; their grads are random.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from adamops import DeepSpeedCPUAdam
from adamops.bench import OPTIMIZERS, OURS, Unavailable, new_params, time_in_rounds

MAX_NORM = 1.0  # the Trainer's default
IMPLEMENTATIONS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    OURS: lambda params: OPTIMIZERS[OURS](params, torch.float32),
    "torch.optim.AdamW": torch.optim.AdamW,
    "torch.optim.AdamW(fused=True), the Trainer's default": lambda params: torch.optim.AdamW(params, fused=True),
    "DeepSpeed": lambda params: OPTIMIZERS["DeepSpeed"](params, torch.float32),
}


def gpt2(layers: int, width: int) -> PreTrainedModel:
    """A GPT-2 on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=8192, bos_token_id=0, eos_token_id=0, n_embd=width, n_layer=layers, n_head=8)
        )


def lora() -> torch.nn.Module:
    """LoRA of rank 8 on all linear layers of GPT-2 medium."""
    config = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(gpt2(layers=24, width=1024), config)


def trained_sizes(model: torch.nn.Module) -> list[int]:
    """The sizes of the trainable params."""
    return [param.numel() for param in model.parameters() if param.requires_grad]


def median_times(numels: list[int], clip: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step by implementation. With `clip`, also with clipping by adamops' own optimizer."""
    accelerator = Accelerator(cpu=True)
    calls: dict[str, Callable[[], object]] = {}

    def add(name: str, params: list[torch.nn.Parameter], optimizer: Optimizer, in_step: bool = False) -> None:
        def step() -> None:
            if in_step:
                optimizer.optimizer.clip_grad_norm_(MAX_NORM)
            elif clip:
                accelerator.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        calls[name] = step

    for name, new_optimizer in IMPLEMENTATIONS.items():
        params = new_params(numels, torch.float32)
        try:
            add(name, params, accelerator.prepare_optimizer(new_optimizer(params)))
        except Unavailable as reason:
            print(f"{name} {reason}")
    if clip:
        params = new_params(numels, torch.float32)
        ours = accelerator.prepare_optimizer(DeepSpeedCPUAdam(params))
        add(f"{OURS}, optimizer.optimizer.clip_grad_norm_()", params, ours, in_step=True)
    return {name: statistics.median(times) for name, times in time_in_rounds(calls, rounds).items()}


def measure() -> dict[str, dict[str, float]]:
    """Median milliseconds by case and implementation."""
    cases = {
        "LoRA, rank 8, GPT-2 medium": (trained_sizes(lora()), 30),
        "GPT-2, 6 layers, width 256": (trained_sizes(gpt2(layers=6, width=256)), 15),
    }
    return {
        f"{case} ({len(sizes)} tensors, {sum(sizes) / 1e6:.1f} M){', clipped' if clip else ''}": median_times(
            sizes, clip, rounds
        )
        for case, (sizes, rounds) in cases.items()
        for clip in (False, True)
    }

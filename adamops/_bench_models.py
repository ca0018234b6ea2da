"""The shapes of the params of real models, for the benchmark: as torch.nn and Hugging Face make them.

Each follows the published sizes of its model. Must not know what is timed.
"""

from __future__ import annotations

from collections.abc import Callable


def gpt2() -> list[int]:
    """GPT-2 of 124 M: 12 blocks of width 768, tied embeddings."""
    width = 768
    norm = [width, width]
    block = [*norm, width * 3 * width, 3 * width, width * width, width]
    block += [*norm, width * 4 * width, 4 * width, 4 * width * width, width]
    return [50257 * width, 1024 * width, *block * 12, *norm]


def llama() -> list[int]:
    """A Llama-like model of 0.5 B, with the sizes of Qwen2.5-0.5B: 24 blocks of width 896, tied embeddings."""
    width, keys, hidden = 896, 128, 4864
    attention = [width * width, width, keys * width, keys, keys * width, keys, width * width]
    block = [*attention, hidden * width, hidden * width, width * hidden, width, width]
    return [151936 * width, *block * 24, width]


def resnet50() -> list[int]:
    """ResNet-50 of 25.6 M: convolutions of 4 stages, each with a batch norm, and a linear layer."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[int]:
        return [outputs * inputs * kernel * kernel, outputs, outputs]

    sizes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            sizes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            sizes += convolution(inputs, 4 * width, 1) if i == 0 else []
            inputs = 4 * width
    return [*sizes, 1000 * inputs, 1000]


def lora() -> list[int]:
    """LoRA of rank 16 on all linear layers of Llama 3 8B: 32 blocks of width 4096, 42 M params."""
    width, keys, hidden, rank = 4096, 1024, 14336, 16
    layers = [(width, width), (width, keys), (width, keys), (width, width)]
    layers += [(width, hidden), (width, hidden), (hidden, width)]
    return [rank * side for inputs, outputs in layers for side in (inputs, outputs)] * 32


def mlp() -> list[int]:
    """Three linear layers, as in examples: 784, 512, 512 and 10 wide."""
    return [512 * 784, 512, 512 * 512, 512, 10 * 512, 10]


MODELS: dict[str, Callable[[], list[int]]] = {
    "gpt2": gpt2,
    "llama-0.5b": llama,
    "resnet50": resnet50,
    "lora-8b": lora,
    "mlp": mlp,
}


def described(name: str) -> str:
    """What a model is, for a title: its name, the number of its tensors and of its params."""
    sizes = MODELS[name]()
    return f"{name}: {len(sizes)} tensors, {sum(sizes) / 1e6:.3g} M, fp32"

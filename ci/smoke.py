"""Smoke-tests an installed wheel with the torch that is installed, in half a minute; prints a row for docs/wheels.md.

    python ci/smoke.py [CPU]

Checks that both optimizers train params on the CPU to the recorded bits, also with clipping, quantized states and split
master weights, and after saving and loading; that every SIMD target of this CPU gives the recorded bits; that the
report finds both ops prebuilt; and that the process has a single OpenMP runtime. CPU is what the row calls an emulated
CPU. Needs adamops and torch, and no tools on PATH.
"""

import hashlib
import importlib.metadata
import io
import itertools
import platform
import random
import re
import sys
from pathlib import Path

import torch

import adamops
from adamops import DeepSpeedCPUAdam, FusedAdam, op_builder, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import kernel_check  # noqa: E402

SHAPES = ((1,), (31,), (64, 33), (20_001,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = {"state_dtype": "8bit", "master_weight_bits": 24}
# Digests of the params after training; see kernel_check.DIGEST for when they may change.
TRAINED = "83a35ab9e6988a00cec23cc3de50599ccab7d9cc844d755fc25e6dfd7414436f"
TRAINED_LOW_PRECISION = "ef6a0ac6ccde9bae913d7fc6af3f9134558c4c4fb1a658d41c8627e16a2ee2e4"


def drawn(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values that are the same in every release of Python and torch."""
    count = torch.Size(shape).numel()
    return torch.tensor([rng.randrange(-(2**23), 2**23) for _ in range(count)]).div(2.0**20).reshape(shape)


class Training:
    """Params of all dtypes with an optimizer, and grads that depend only on the step, clipped in low precision."""

    def __init__(self, make, low_precision):
        rng = random.Random(1)
        self.params = [torch.nn.Parameter(drawn(rng, shape).to(dtype)) for shape in SHAPES for dtype in DTYPES]
        self.low_precision = low_precision
        self.optimizer = make(self.params, lr=1e-2, weight_decay=0.1, **(LOW_PRECISION if low_precision else {}))

    def run(self, steps: range) -> None:
        for step in steps:
            rng = random.Random(100 + step)
            for param in self.params:
                param.grad = drawn(rng, tuple(param.shape)).to(param.dtype)
            if self.low_precision:
                self.optimizer.clip_grad_norm_(1.0)
            self.optimizer.step()

    def digest(self) -> str:
        contents = b"".join(bytes(param.detach().untyped_storage()) for param in self.params)
        return hashlib.sha256(contents).hexdigest()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"params": self.params, "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        saved = torch.load(file, weights_only=True)
        with torch.no_grad():
            for param, value in zip(self.params, saved["params"], strict=True):
                param.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])


def check(what: str, found: object, expected: object) -> None:
    if found != expected:
        sys.exit(f"{what}: {found}, expected {expected}")


def main() -> None:
    op = op_builder.get("cpu_adam").load()
    targets = op.supported_targets()
    modes = itertools.product((DeepSpeedCPUAdam, FusedAdam), (False, True), (1, 3), targets)
    for make, low_precision, threads, target in modes:
        torch.set_num_threads(threads)
        op.use_target(target)
        training, resumed = Training(make, low_precision), Training(make, low_precision)
        training.run(range(2))
        resumed.load(training.saved())
        training.run(range(2, 4))
        resumed.run(range(2, 4))
        words = f"{make.__name__}{' in low precision' * low_precision} on {threads} threads with {target}"
        expected = TRAINED_LOW_PRECISION if low_precision else TRAINED
        check(f"params trained by {words}", training.digest(), expected)
        check(f"params saved, loaded and trained by {words}", resumed.digest(), expected)
    for target in targets:
        op.use_target(target)
        check(f"bits of the target {target}", kernel_check.digest(op), kernel_check.DIGEST)
    op.use_target(targets[0])

    ops = {entry["name"]: entry for entry in report.collect()["ops"]}
    for name in ("cpu_adam", "fused_adam"):
        check(f"prebuilt {name} in the report", ops[name]["prebuilt"], True)
    check("cpu_adam in use", ops["cpu_adam"]["in_use"], "prebuilt extension")
    maps = Path("/proc/self/maps").read_text()
    runtimes = sorted(set(re.findall(r"\S*lib(?:g|i)?omp\S*", maps)))
    check("OpenMP runtimes in the process", runtimes, [str(Path(op.openmp_runtime()).resolve())])

    tag = next(
        line.split()[1]
        for line in (importlib.metadata.distribution("adamops").read_text("WHEEL") or "").splitlines()
        if line.startswith("Tag:")
    )
    name = f"adamops {adamops.__version__} {tag}"
    cpu = sys.argv[1] if len(sys.argv) > 1 else report.cpu_name()
    print(f"| {name} | {platform.python_version()} | {torch.__version__} | {cpu} | {targets[0]} | training, kernels |")


if __name__ == "__main__":
    main()

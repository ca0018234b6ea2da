"""FusedAdam on a GPU: the CPU op's bits, graphs, AMP, streams. For machines that have one; ci/gpu.sh runs it there.

Needs nothing but torch and pytest. Elsewhere the same questions are put to the emulated op (test_cuda_backend.py
and test_cuda_kernel.py).
"""

import contextlib
import copy
import itertools
import subprocess
import warnings

import cuda_emulation
import pytest
import torch
from adamops.op_builder.cuda_architectures import coverage, visible_gpus
from adamops.op_builder.nvcc import Nvcc

from adamops import FusedAdam, op_builder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 255, 256, 4095, 4096, 4097, 100_003)
GPU = torch.device("cuda", 0)


def values(size, dtype):
    """Random values over many decades; zeros, subnormals, infinities and NaN among them."""
    x = torch.randn(size, dtype=torch.float64) * 10.0 ** (torch.rand(size) * 12 - 9)
    special = torch.tensor([0.0, -0.0, 1e-40, -2e-44, 6e-8, -1e-7, 65504.0, torch.inf, torch.nan])
    return torch.where(torch.rand(size) < 0.02, special[torch.randint(len(special), (size,))].double(), x).to(dtype)


class Twins:
    """The same params on the GPU, `offset` elements into their memory, and on the CPU, with an optimizer each."""

    def __init__(self, sizes, dtypes=DTYPES, offset=0, device=GPU, capturable=False, **settings):
        held = [values(size + offset, dtype) for size, dtype in itertools.product(sizes, dtypes)]
        self.here = [torch.nn.Parameter(x[offset:].clone()) for x in held]
        self.there = [torch.nn.Parameter(x.to(device)[offset:]) for x in held]
        self.cpu = FusedAdam(self.here, **settings)
        self.gpu = FusedAdam(self.there, capturable=capturable, **settings)
        self.device = device

    def set_grads(self, missing=()):
        for i, (a, b) in enumerate(zip(self.here, self.there, strict=True)):
            grad = None if i in missing else values(a.numel(), a.dtype)
            a.grad, b.grad = grad, None if grad is None else grad.to(self.device, copy=True)

    def step(self):
        self.cpu.step()
        self.gpu.step()

    def assert_same_bits(self):
        assert self.gpu._backends[self.device].name == "fused_adam"
        for i, (a, b) in enumerate(zip(self.here, self.there, strict=True)):
            ours, theirs = {"param": b, **self.gpu.state.get(b, {})}, {"param": a, **self.cpu.state.get(a, {})}
            assert ours.keys() == theirs.keys()
            assert int(ours.pop("step", 0)) == int(theirs.pop("step", 0)), i
            for key in ours:
                assert_same_bits(ours[key], theirs[key], f"{key} of tensor {i}: {tuple(a.shape)}, {a.dtype}")


def assert_same_bits(ours, theirs, what):
    ours, theirs = ours.detach().cpu(), theirs.detach()
    assert torch.equal(ours.isnan(), theirs.isnan()), what
    if ours.is_floating_point():
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[ours.itemsize]
        ours, theirs = ours[~ours.isnan()].view(bits), theirs[~theirs.isnan()].view(bits)
    assert torch.equal(ours, theirs), what


@contextlib.contextmanager
def no_synchronisation():
    """Torch raises if anything waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_op_is_native_and_covers_the_gpus():
    module = op_builder.get("fused_adam").load()
    assert module.status()["problem"] == ""
    for i in range(torch.cuda.device_count()):
        assert module.problem(i) == ""
    record = op_builder.get("fused_adam").build_record()
    if record and "architectures" in record:
        assert all(coverage(record["architectures"], gpu).runs for gpu in visible_gpus())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = Twins([5])
        twins.set_grads()
        twins.step()
    twins.assert_same_bits()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
def test_bits(offset, adam_w_mode, amsgrad, master_weights, capturable):
    settings = {"adam_w_mode": adam_w_mode, "amsgrad": amsgrad, "master_weights": master_weights}
    twins = Twins(SIZES, offset=offset, capturable=capturable, weight_decay=0.1, **settings)
    for missing in ((), (2, 3), ()):
        twins.set_grads(missing)
        twins.step()
    twins.assert_same_bits()


@pytest.mark.parametrize("master_weights", [True, False])
def test_fp32_grads_of_16_bit_params(master_weights):
    twins = Twins(SIZES, DTYPES[1:], master_weights=master_weights)
    for _ in range(2):
        twins.set_grads()
        for param in [*twins.here, *twins.there]:
            param.grad.data = param.grad.float() * 1.001
        twins.step()
    twins.assert_same_bits()


@pytest.mark.parametrize("count", [1, 370, 372, 5000])
@pytest.mark.parametrize("capturable", [True, False])
def test_many_tensors(count, capturable):
    """Over several launches, with step counts of their own."""
    twins = Twins(torch.randint(0, 40, (count,)).tolist(), [torch.bfloat16], capturable=capturable)
    for step in range(3):
        twins.set_grads(set(range(step, count, 3)) if step else ())
        twins.step()
    twins.assert_same_bits()


LESS_PRECISION = [
    {"state_dtype": "8bit"},
    {"state_dtype": "8bit", "amsgrad": True, "adam_w_mode": False},
    {"state_dtype": "8bit", "master_weight_bits": 24, "stochastic_rounding": True},
    {"state_dtype": torch.bfloat16, "master_weight_bits": 32},
    {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    {"state_dtype": torch.bfloat16, "amsgrad": True},
]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("settings", LESS_PRECISION, ids=str)
@pytest.mark.parametrize("capturable", [True, False])
def test_bits_of_less_precision(offset, settings, capturable):
    """Grads are also zeroed, and params copied in 16 bits."""
    twins = Twins(SIZES, offset=offset, capturable=capturable, weight_decay=0.1, **settings)
    if "stochastic_rounding" in settings:
        twins.gpu.param_groups[0]["stochastic_rounding_seed"] = twins.cpu.param_groups[0]["stochastic_rounding_seed"]
    copies = [[torch.empty_like(p, dtype=torch.bfloat16) for p in params] for params in (twins.here, twins.there)]
    for _ in range(3):
        twins.set_grads()
        twins.cpu.step(zero_grads=True, lowp_out=copies[0])
        twins.gpu.step(zero_grads=True, lowp_out=copies[1])
        twins.assert_same_bits()
        for a, b in zip(*copies, strict=True):
            assert_same_bits(b, a, "copy")
        assert not any(param.grad.any() for param in twins.there)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("capturable", [True, False])
def test_clipping(norm_type, capturable):
    """The norm has the CPU op's bits, and neither it nor the step waits for the GPU."""
    twins = Twins([100, 40_000, 300_001], capturable=capturable)
    for _ in range(3):
        for a, b in zip(twins.here, twins.there, strict=True):
            a.grad = (torch.randn(a.shape) * 0.01).to(a.dtype)
            b.grad = a.grad.to(GPU, copy=True)
        expected = twins.cpu.clip_grad_norm_(0.1, norm_type)
        with no_synchronisation():
            norm = twins.gpu.clip_grad_norm_(0.1, norm_type)
        assert_same_bits(norm, expected, "norm")
        twins.step()
    twins.assert_same_bits()


def test_strided_params():
    twins = Twins([60], DTYPES)
    for params in (twins.here, twins.there):
        for param in params:
            param.data = param.data.view(3, 4, 5).permute(2, 0, 1)
    for _ in range(2):
        for a, b in zip(twins.here, twins.there, strict=True):
            a.grad = torch.randn(a.shape).to(a.dtype)
            b.grad = a.grad.to(GPU, copy=True)
        twins.step()
    twins.assert_same_bits()


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("master_weights", [True, False])
def test_amp(capturable, master_weights):
    """GradScaler unscales and skips on the device, without waiting."""
    twins = Twins([100, 5000], capturable=capturable, master_weights=master_weights)
    for scale, overflow in ((1024.0, 0.0), (3.7, 0.0), (2.0, 1.0), (0.3, 0.0), (8.0, 1.0)):
        twins.set_grads()
        for optimizer, device in ((twins.cpu, "cpu"), (twins.gpu, GPU)):
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor([overflow], device=device)
        twins.cpu.step()
        with no_synchronisation():
            twins.gpu.step()
        twins.assert_same_bits()


def test_grad_scaler_trains():
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.GELU(), torch.nn.Linear(50, 1)).to(GPU)
    optimizer, scaler = FusedAdam(model.parameters(), lr=1e-2), torch.amp.GradScaler("cuda", init_scale=2.0**30)
    x = torch.randn(64, 20, device=GPU)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = (model(x) - x[:, :1]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**30, "no step was skipped"
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
def test_graph_capture_and_replay(master_weights, tensor_lr):
    twins = Twins([3, 5000, 70_001], capturable=True, master_weights=master_weights, weight_decay=0.1)
    lr = torch.tensor(1e-3, device=GPU)
    if tensor_lr:
        twins.gpu.param_groups[0]["lr"] = lr
        twins.cpu.param_groups[0]["lr"] = lr.item()  # float32's, not 1e-3
    twins.set_grads()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        twins.gpu.step()
    torch.cuda.current_stream().wait_stream(stream)
    twins.cpu.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twins.gpu.step()
    static = [param.grad for param in twins.there]
    for step in range(4):
        if tensor_lr:
            lr.mul_(0.9)
            twins.cpu.param_groups[0]["lr"] = lr.item()
        twins.set_grads()
        for buffer, param in zip(static, twins.there, strict=True):
            buffer.copy_(param.grad)
            param.grad = buffer
        graph.replay()
        twins.cpu.step()
        torch.cuda.synchronize()
        twins.assert_same_bits()
        assert int(twins.gpu.state[twins.there[0]]["step"]) == step + 2


def test_capture_without_capturable_is_refused():
    twins = Twins([30], [torch.float32])
    twins.set_grads()
    twins.step()
    before = twins.there[0].detach().clone()
    with (
        pytest.raises(RuntimeError, match="cannot be captured .*capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        twins.gpu.step()
    torch.cuda.synchronize()
    assert torch.equal(twins.there[0], before)


@pytest.mark.parametrize("capturable", [True, False])
def test_steps_do_not_wait_for_the_gpu(capturable):
    twins = Twins([100, 5000], capturable=capturable)
    twins.set_grads()
    twins.step()
    twins.set_grads()
    with no_synchronisation():
        twins.gpu.step()
    twins.cpu.step()
    twins.assert_same_bits()


def test_the_current_stream_is_used():
    twins = Twins([1_000_000], [torch.float32], capturable=True)
    twins.set_grads()
    twins.step()
    late = values(1_000_000, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # long enough that a step on another stream would read the old grad
        twins.there[0].grad.copy_(late.pin_memory(), non_blocking=True)
        twins.gpu.step()
    stream.synchronize()
    twins.here[0].grad = late
    twins.cpu.step()
    twins.assert_same_bits()


def test_params_on_the_gpu_and_in_host_memory_in_one_group():
    twins = Twins([100, 5000])
    mixed_here = [torch.nn.Parameter(param.detach().clone()) for param in twins.here]
    mixed_there = [torch.nn.Parameter(param.detach().clone()) for param in twins.there]
    mixed = FusedAdam([param for pair in zip(mixed_here, mixed_there, strict=True) for param in pair])
    for _ in range(2):
        twins.set_grads()
        for param, source in zip([*mixed_here, *mixed_there], [*twins.here, *twins.there], strict=True):
            param.grad = source.grad.clone()
        twins.step()
        mixed.step()
    for param, expected in zip([*mixed_here, *mixed_there], [*twins.here, *twins.here], strict=True):
        assert_same_bits(param, expected, "mixed")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_several_gpus_in_one_optimizer():
    params = [torch.nn.Parameter(torch.ones(5000, device=f"cuda:{i}")) for i in (1, 0, 1)]
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    FusedAdam(params).step()
    assert all(torch.equal(param.cpu(), params[0].cpu()) and param.ne(1).all() for param in params)


@pytest.mark.parametrize("capturable", [True, False])
def test_checkpoints_between_gpu_and_host(capturable):
    twins = Twins([100, 5000], capturable=capturable, master_weights=True)
    for _ in range(2):
        twins.set_grads()
        twins.step()
        saved = copy.deepcopy(twins.gpu.state_dict()), copy.deepcopy(twins.cpu.state_dict())
        twins.cpu.load_state_dict(saved[0])
        twins.gpu.load_state_dict(saved[1])
        twins.assert_same_bits()


def test_checkpoints_of_torch():
    twins = Twins([100, 5000], [torch.float32])
    reference = torch.optim.AdamW(twins.there, weight_decay=0, fused=True)
    twins.set_grads()
    reference.step()
    for a, b in zip(twins.here, twins.there, strict=True):
        a.data.copy_(b)
    for optimizer in (twins.gpu, twins.cpu):
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    twins.set_grads()
    twins.step()
    twins.assert_same_bits()


def test_roots_and_quotients_are_rounded_right(tmp_path):
    """Of all floats, and of some 10^11 pairs, against the compiler's own."""
    if Nvcc.find() is None:
        pytest.skip("no nvcc")
    target = f"-gencode=arch=compute_75,code=sm_{visible_gpus()[0]}"  # by way of the PTX that the op is made from
    program = tmp_path / "check"
    subprocess.run(cuda_emulation.rounding_check(program, target), check=True)
    checked = subprocess.run([program], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "0\n")


def test_more_than_2_to_the_31_elements():
    elements = 2**31 + 77
    free, _ = torch.cuda.mem_get_info(0)
    if free < elements * 12 * 1.05:
        pytest.skip(f"needs {elements * 12 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    param = torch.nn.Parameter(torch.ones(elements, dtype=torch.bfloat16, device=GPU))
    param.grad = torch.ones_like(param)
    FusedAdam([param], lr=0.5).step()
    assert param.eq(0.5).all()

"""FusedAdam on the CUDA op, which is emulated: its bits, its step counts on the device, AMP, and what it refuses.

Host memory stands in for the device's; what test_optimizer.py and test_errors.py ask of every optimizer is asked there.
"""

import copy
import io

import pytest
import torch
from adamops.op_builder.fused_adam import FusedAdamBuilder
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import HOST, EmulatedFusedAdam

from adamops import FusedAdam, op_builder
from adamops.ops.adam.adam import ADAMW
from adamops.optim.backends import loading

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("cuda_op")


def new_params(shapes, dtypes=DTYPES[:1], seed=None):
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for s in shapes for d in dtypes]
    return params, [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_grads(ours, theirs, missing=()):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = None if i in missing else torch.randn(a.shape).to(a.dtype)
        a.grad, b.grad = grad, None if grad is None else grad.clone()


def assert_same(ours, theirs):
    """Equal params, states and step counts, whatever the counts are kept in."""
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
        one, other = ours.state.get(a, {}), theirs.state.get(b, {})
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]) if key != "step" else int(one[key]) == int(other[key])


def step_types(optimizer):
    return {type(state["step"]) for state in optimizer.state.values()}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_have_the_bits_of_the_cpu_op(cuda_op, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5), "shapes")
    hyper = {
        "lr": data.draw(st.floats(0, 1), "lr"),
        "betas": data.draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)), "betas"),
        "weight_decay": data.draw(st.sampled_from([0, 0.1]), "weight_decay"),
        "adam_w_mode": data.draw(st.booleans(), "adam_w_mode"),
        "bias_correction": data.draw(st.booleans(), "bias_correction"),
    }
    hyper |= {key: data.draw(st.booleans(), key) for key in ("amsgrad", "maximize", "master_weights")}
    capturable = data.draw(st.booleans(), "capturable")
    ours, theirs = new_params(shapes, DTYPES)
    a, b = EmulatedFusedAdam(ours, capturable=capturable, **hyper), FusedAdam(theirs, **hyper)
    for step in range(4):
        missing = data.draw(st.sets(st.integers(0, len(ours) - 1)), "missing") if step in (0, 2) else ()
        set_grads(ours, theirs, missing)
        a.step()
        b.step()
    assert_same(a, b)
    assert step_types(a) == {torch.Tensor if capturable else int}


def test_step_counts_of_capturable_steps_are_scalars_on_the_device():
    ours, theirs = new_params([(3,), (4, 5)])
    a, b = EmulatedFusedAdam(ours, capturable=True), torch.optim.AdamW(theirs, weight_decay=0)
    for _ in range(3):
        set_grads(ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        step = a.state[p]["step"]
        assert (step.shape, step.dtype, step.item()) == ((), torch.float32, 3)
        assert b.state[q]["step"].shape == step.shape
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_learning_rate_on_the_device_is_read_there(capturable, dtype):
    ours, theirs = new_params([(30,), ()])
    lr = torch.tensor(0.0123, dtype=dtype)
    a, b = EmulatedFusedAdam(ours, lr=lr, capturable=capturable, weight_decay=0.1), FusedAdam(theirs, weight_decay=0.1)
    for _ in range(3):
        set_grads(ours, theirs)
        b.param_groups[0]["lr"] = float(lr)
        a.step()
        b.step()
        lr.mul_(0.7)
    assert_same(a, b)
    assert step_types(a) == {torch.Tensor}, "the host did not ask for the learning rate"


@pytest.mark.parametrize("capturable", [True, False])
def test_checkpoints_go_to_the_cpu_op_and_back(capturable):
    ours, theirs = new_params([(30,), (7, 2)], DTYPES)
    settings_ = {"amsgrad": True, "master_weights": True}
    a, b = EmulatedFusedAdam(ours, capturable=capturable, **settings_), FusedAdam(theirs, **settings_)
    for _ in range(3):
        for _ in range(2):
            set_grads(ours, theirs)
            a.step()
            b.step()
        saved = [io.BytesIO(), io.BytesIO()]
        for optimizer, file in zip((a, b), saved, strict=True):
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
        b.load_state_dict(torch.load(saved[0], weights_only=True))
        a.load_state_dict(torch.load(saved[1], weights_only=True))
        assert step_types(b) == {int}
        assert step_types(a) == {torch.Tensor if a.param_groups[0]["capturable"] else int}
        a.param_groups[0]["capturable"] = capturable
    assert_same(a, b)


def test_capturable_checkpoints_are_ready_to_be_captured():
    ours, theirs = new_params([(30,), (7, 2)])
    a = EmulatedFusedAdam(ours, capturable=True)
    set_grads(ours, theirs)
    a.step()
    b = EmulatedFusedAdam(theirs, capturable=True)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert step_types(b) == {torch.Tensor}
    b._backends[HOST].capturing = True
    b.step()


def scaled_step(optimizer, scale, overflow):
    """A step as torch.amp.GradScaler has it done."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor([float(overflow)])
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("plain_steps_first", [0, 2])
def test_steps_are_unscaled_and_skipped_on_the_device(capturable, plain_steps_first):
    ours, theirs = new_params([(30,), (7, 2), (5000,)], DTYPES)
    a = EmulatedFusedAdam(ours, capturable=capturable, master_weights=True)
    b = FusedAdam(theirs, master_weights=True)
    for _ in range(plain_steps_first):
        set_grads(ours, theirs)
        a.step()
        b.step()
    for scale, overflow in ((3.7, False), (1024.0, True), (0.3, False), (2.0, True), (2.0, False)):
        set_grads(ours, theirs)
        scaled_step(a, scale, overflow)
        scaled_step(b, scale, overflow)
        assert_same(a, b)
    assert step_types(a) == {torch.Tensor}
    set_grads(ours, theirs)
    a.step()
    b.step()
    assert_same(a, b)


def test_the_first_step_may_be_skipped():
    ours, theirs = new_params([(30,)])
    a, b = EmulatedFusedAdam(ours), FusedAdam(theirs)
    set_grads(ours, theirs)
    scaled_step(a, 8.0, True)
    assert torch.equal(ours[0], theirs[0])
    assert a.state[ours[0]]["step"] == 0
    scaled_step(a, 8.0, False)
    scaled_step(b, 8.0, False)
    assert_same(a, b)


def test_what_a_graph_would_replay_wrongly_is_refused_while_capturing():
    ours, _ = new_params([(30,)])
    optimizer = EmulatedFusedAdam(ours)
    set_grads(ours, ours)
    before = ours[0].detach().clone()
    backend = optimizer._backends[HOST]
    backend.capturing = True
    refused = pytest.raises(RuntimeError, match="cannot be captured.*it would make its states anew at each replay")
    with refused:
        optimizer.step()
    backend.capturing = False
    assert torch.equal(ours[0], before) and not optimizer.state
    optimizer.step()
    before = ours[0].detach().clone()
    backend.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured .*construct the optimizer with capturable=True"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="cannot be captured .*it would set the step count anew at each replay"):
        optimizer.step()
    assert torch.equal(ours[0], before) and optimizer.state[ours[0]]["step"] == 1
    backend.capturing = False
    optimizer.step()
    backend.capturing = True
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 3


def test_errors_of_the_device_come_through(monkeypatch):
    ours, _ = new_params([(30,)])
    optimizer = EmulatedFusedAdam(ours)
    set_grads(ours, ours)
    monkeypatch.setenv("EMULATED_CUDA_ERROR", "1")
    with pytest.raises(
        RuntimeError, match=r"fused_adam: launch 1 of 1 \(1 tensors from tensor 0 on, device 0\): CUDA error"
    ):
        optimizer.step()
    assert not optimizer.state
    monkeypatch.delenv("EMULATED_CUDA_ERROR")
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 1


def test_params_of_several_devices_in_one_group():
    """Meta stands in for a device that nothing was compiled for: pure PyTorch updates its params, in name only."""
    here, there = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.empty(4, device="meta"))
    twin = torch.nn.Parameter(here.detach().clone())
    optimizer, alone = FusedAdam([there, here]), FusedAdam([twin])
    there.grad = torch.empty(4, device="meta")
    set_grads([here], [twin])
    with pytest.warns(
        RuntimeWarning, match="falls back to pure PyTorch, .*No op is compiled for params on meta"
    ) as seen:
        for _ in range(3):
            optimizer.step()
            alone.step()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert torch.equal(here, twin)
    assert optimizer.state[there]["step"] == optimizer.state[here]["step"] == 3
    assert optimizer.state[there]["exp_avg"].device.type == "meta"


class Module:
    """Stands in for a build of the op."""

    def __init__(self, problem):
        self.problem = lambda device: problem


def builder_with(prebuilt, built):
    """A builder whose prebuilt extension and whose build are these modules, or fail with these errors."""

    def get(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    builder = FusedAdamBuilder()
    builder.load_prebuilt, builder.jit_load = lambda: get(prebuilt), lambda: get(built)
    return builder


def test_a_build_that_lacks_the_gpus_architecture_is_made_up_for():
    good, bad = Module(""), Module("device 0: CUDA error: no kernel image")
    assert builder_with(good, bad).load_for_device(0) is good
    assert builder_with(bad, good).load_for_device(0) is good
    assert builder_with(ImportError("none came"), good).load_for_device(0) is good
    builder = builder_with(bad, RuntimeError("no nvcc found"))
    for _ in range(2):
        with pytest.raises(
            op_builder.OpUnavailableError, match="(?s)no kernel image.*build at run time: no nvcc found"
        ):
            builder.load_for_device(0)
    with pytest.raises(op_builder.OpUnavailableError, match="(?s)none came.*no compiler"):
        builder_with(ImportError("none came"), RuntimeError("no compiler")).load_for_device(1)


TOO_OLD = (
    "the NVIDIA driver supports CUDA 12.8, and this build needs 13.0; "
    "install a newer driver, or build adamops with an older CUDA toolkit"
)


@pytest.mark.parametrize(
    ("driver", "problem"),
    [("13000", ""), ("0", "no NVIDIA driver found"), ("12080", TOO_OLD)],
    ids=["good", "no", "old"],
)
def test_the_driver_is_named_where_it_is_too_old(cuda_op, monkeypatch, driver, problem):
    monkeypatch.setenv("EMULATED_CUDA_DRIVER", driver)
    assert cuda_op.status() == {
        "runtime_version": 13000,
        "driver_version": int(driver),
        "devices": 0 if problem else 2,
        "problem": problem,
    }


def test_the_emulated_op_knows_its_problems(cuda_op, monkeypatch):
    assert cuda_op.problem(1) == ""
    assert cuda_op.problem(7).startswith("choosing device 7: CUDA error")
    monkeypatch.setenv("EMULATED_CUDA_NO_CODE", "1")
    assert cuda_op.problem(1).startswith("device 1: CUDA error")


def test_params_on_a_cuda_device_get_the_op_or_torch_calls_with_one_warning(cuda_op, monkeypatch):
    device, real = torch.device("cuda", 1), op_builder.get
    monkeypatch.setattr(loading.op_builder, "get", lambda name: builder_with(cuda_op, RuntimeError("not needed")))
    backend = loading.load_backend(ADAMW, device)
    assert (backend.name, backend.device) == ("fused_adam", device)
    here = new_params([(3,)])[0]
    set_grads(here, here)
    states = {p: {"step": 0, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)} for p in here}
    hyper = EmulatedFusedAdam(here)._step_settings({**FusedAdam(here).param_groups[0]}, "group")
    assert backend.prepare_group("group", hyper, here, states) is None, "these tensors are not on its device"

    failing = builder_with(Module("device 1: CUDA error: no kernel image"), RuntimeError("no nvcc found"))
    monkeypatch.setattr(loading.op_builder, "get", lambda name: failing if name == "fused_adam" else real(name))
    with pytest.warns(RuntimeWarning, match="(?s)falls back to pure PyTorch.*no kernel image.*no nvcc found") as seen:
        assert loading.load_backend(ADAMW, device).name == "torch_adam"
    assert len(seen) == 1
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(RuntimeWarning, match="No op is compiled for params on AMD GPUs"):
        assert loading.load_backend(ADAMW, device).name == "torch_adam"


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -float("inf"), -3.0, 2.0**63])
def test_a_count_on_the_device_that_is_none_does_not_hang_the_device(count):
    """Nobody looks at it, as that would wait for the device; the kernel that computes the scalars has to end."""
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = EmulatedFusedAdam([param], capturable=True)
    param.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[param]["step"].fill_(count)
    optimizer.step()
    assert not optimizer.state[param]["step"].equal(torch.tensor(1.0))

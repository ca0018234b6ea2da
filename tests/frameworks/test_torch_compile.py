"""torch.compile beside the optimizers: of a model, of a whole training step, and of step() itself."""

import contextlib
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from twins import assert_equal, assert_trained_alike, twin_models

import adamops
from adamops import DeepSpeedCPUAdam, FusedAdam

pytestmark = pytest.mark.frameworks

CLASSES = [DeepSpeedCPUAdam, FusedAdam]
LR = 1e-2


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled is left from other tests, so that none counts as theirs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def new_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def loss_of(model, x):
    return model(x).square().mean()


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    return loss.detach()


@contextlib.contextmanager
def no_warnings_of_ours():
    """Raises for warnings, but for those that are about torch itself, whatever the optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (".*online softmax.*", ".*TensorFloat32.*", ".*is deprecated.*", ".*not a leaf Tensor.*"):
            warnings.filterwarnings("ignore", message=known)
        yield


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_compiled_step_is_the_step(cls, scheduled):
    """torch.compile(optimizer.step): one break of the graph, no warning, no look inside, the same bits."""
    plain, compiled = twin_models(new_model)
    a, b = cls(plain.parameters(), lr=LR), cls(compiled.parameters(), lr=LR)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (a, b)] if scheduled else []
    step = torch.compile(b.step)
    with no_warnings_of_ours():
        for _ in range(4):
            x = torch.randn(4, 8)
            for model, optimizer in ((plain, a), (compiled, b)):
                optimizer.zero_grad()
                loss_of(model, x).backward()
            a.step()
            step()
            for scheduler in schedulers:
                scheduler.step()
    assert_equal(plain.parameters(), compiled.parameters())
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) <= 2  # at the scheduler's wrapper of step(), if any, and at ours
    assert counters["frames"]["total"] <= 2
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_a_compiled_step_takes_a_closure(cls):
    plain, compiled = twin_models(new_model)
    a, b = cls(plain.parameters(), lr=LR), cls(compiled.parameters(), lr=LR)
    step, x = torch.compile(b.step, backend="eager"), torch.randn(4, 8)

    def closure_of(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        assert a.step(closure_of(plain, a)).item() == step(closure_of(compiled, b)).item()
    assert_equal(plain.parameters(), compiled.parameters())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step(cls, backend):
    """Backends without code generation have the bits of the model as it is."""
    plain, compiled = twin_models(new_model)
    a, b = cls(plain.parameters(), lr=LR), cls(compiled.parameters(), lr=LR)
    step = torch.compile(train_step, backend=backend)
    with no_warnings_of_ours():
        for _ in range(5):
            x = torch.randn(4, 8)
            assert train_step(plain, a, x).item() == step(compiled, b, x).item()
    assert_equal(plain.parameters(), compiled.parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the model, and what is made of its loss


def test_steps_do_not_compile_again_and_again():
    """Counts of steps, learning rates and grads change; nothing is compiled anew for that."""
    model = new_model()
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = torch.compile(train_step, backend="eager")
    for _ in range(2):
        step(model, optimizer, torch.randn(4, 8))
        scheduler.step()
    frames = torch._dynamo.utils.counters["frames"]["total"]
    for i in range(10):
        optimizer.param_groups[0]["weight_decay"] = 0.01 * i
        step(model, optimizer, torch.randn(4, 8))
        scheduler.step()
    assert torch._dynamo.utils.counters["frames"]["total"] == frames


@pytest.mark.parametrize("cls", CLASSES)
def test_other_methods_in_a_compiled_training_step(cls):
    plain, compiled = twin_models(new_model)
    a, b = cls(plain.parameters(), lr=LR), cls(compiled.parameters(), lr=LR)

    def train(model, optimizer, x):
        loss_of(model, x).backward()
        norm = optimizer.clip_grad_norm_(0.1)
        optimizer.step(zero_grads=True)
        return norm

    step = torch.compile(train, backend="eager")
    with no_warnings_of_ours():
        for _ in range(3):
            x = torch.randn(4, 8)
            assert torch.equal(train(plain, a, x), step(compiled, b, x))
    assert_equal(plain.parameters(), compiled.parameters())
    state = torch.compile(lambda: b.state_dict(), backend="eager")()
    assert all(torch.equal(state["state"][i]["exp_avg"], a.state[p]["exp_avg"]) for i, p in enumerate(a.state))


def test_hooks_of_the_step_are_not_compiled():
    model, seen = new_model(), []
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LR)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    step = torch.compile(train_step, backend="eager")
    for _ in range(2):
        step(model, optimizer, torch.randn(4, 8))
    assert seen == [False] * 4


@pytest.mark.parametrize("cls", CLASSES)
def test_a_full_graph_is_an_error_that_says_why(cls):
    model = new_model()
    optimizer = cls(model.parameters())
    loss_of(model, torch.randn(4, 8)).backward()
    optimizer.zero_grad(set_to_none=False)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="optimizers of adamops call an op that is compiled already"
    ):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert_equal(model.parameters(), before)
    assert not optimizer.state


def test_a_subclass_with_a_step_of_its_own():
    class Counting(DeepSpeedCPUAdam):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    plain, compiled = twin_models(new_model)
    a, b = DeepSpeedCPUAdam(plain.parameters(), lr=LR), Counting(compiled.parameters(), lr=LR)
    step = torch.compile(train_step, backend="eager")
    for _ in range(3):
        x = torch.randn(4, 8)
        train_step(plain, a, x)
        step(compiled, b, x)
    assert b.steps == 3
    assert_equal(plain.parameters(), compiled.parameters())


def test_steps_inside_the_backward_pass_of_a_compiled_model():
    plain, compiled = twin_models(new_model)
    a, b = DeepSpeedCPUAdam(plain.parameters(), lr=LR), DeepSpeedCPUAdam(compiled.parameters(), lr=LR)
    adamops.step_in_backward(plain, a)
    adamops.step_in_backward(compiled, b)
    forward = torch.compile(compiled, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(4, 8)
        loss_of(plain, x).backward()
        loss_of(forward, x).backward()
    assert_equal(plain.parameters(), compiled.parameters())
    assert all(param.grad is None for param in compiled.parameters())


@pytest.mark.parametrize("cls", CLASSES)
def test_optimizers_made_from_a_compiled_model(cls):
    """The compiled model has the params of the model, under longer names."""
    plain, compiled = twin_models(new_model)
    forward = torch.compile(compiled, backend="aot_eager")
    a, b = cls(plain.named_parameters(), lr=LR), cls(forward.named_parameters(), lr=LR)
    for _ in range(4):
        x = torch.randn(4, 8)
        train_step(plain, a, x)
        train_step(forward, b, x)
    assert_equal(plain.parameters(), compiled.parameters())
    b.load_state_dict(a.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("what", ["model", "training step"])
def test_with_generated_code(cls, what):
    """The default backend generates code for the model, which rounds otherwise; g++ takes some seconds for it."""
    plain, compiled = twin_models(new_model)
    a, b = cls(plain.parameters(), lr=LR), cls(compiled.parameters(), lr=LR)
    if what == "model":
        forward, step = torch.compile(compiled), train_step
    else:
        forward, step = compiled, torch.compile(train_step)
    for _ in range(10):
        x = torch.randn(4, 8)
        train_step(plain, a, x)
        step(forward, b, x)
    assert_trained_alike(plain, compiled, LR)


@pytest.mark.slow
def test_a_process_that_compiles_before_it_steps():
    """The order of imports does not matter, and neither does which method comes first."""
    code = """
        import sys, warnings
        warnings.simplefilter("error")
        import torch
        from adamops import DeepSpeedCPUAdam
        assert "torch._dynamo" not in sys.modules
        torch.set_num_threads(1)
        model = torch.nn.Linear(3, 1)
        optimizer = DeepSpeedCPUAdam(model.parameters())
        assert "torch._dynamo" not in sys.modules

        def step(x):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        warnings.filterwarnings("default", module="torch")
        compiled = torch.compile(step, backend="eager")
        for _ in range(3):
            compiled(torch.ones(2, 3))
        assert optimizer.state[model.weight]["step"] == 3
        frames = torch._dynamo.utils.counters["frames"]["total"]
        print("frames", frames)
        assert frames < 12, frames
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

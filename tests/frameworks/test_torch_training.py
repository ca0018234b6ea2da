"""What torch offers around a training loop, with our optimizers in it and torch's beside them."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from twins import assert_equal, assert_trained_alike, same_grads, twin_models, twin_params

from adamops import DeepSpeedCPUAdam, FusedAdam

pytestmark = pytest.mark.frameworks

LR, STEPS = 1e-2, 10
CLASSES = [DeepSpeedCPUAdam, FusedAdam]


def new_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def train_twins(Adam, make, step=None, steps=STEPS, **kwargs):  # noqa: N803
    """A model trained by ours and by torch.optim.AdamW, with the same inputs; both models and our optimizer."""
    ours, theirs = twin_models(make)
    kwargs = {"lr": LR, "weight_decay": 0.05, **kwargs}
    a, b = Adam(ours.parameters(), **kwargs), torch.optim.AdamW(theirs.parameters(), **kwargs)
    for i in range(steps):
        x = torch.randn(16, 6)
        for model, optimizer in ((ours, a), (theirs, b)):
            (step or plain_step)(model, optimizer, x, i)
    return ours, theirs, a


def plain_step(model, optimizer, x, _):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# Averages of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["mean", "moving"])
def test_averaged_models_and_their_schedule(Adam, average):
    """Weight averaging from the middle on, with its schedule, and statistics of the batch norm put right at the end."""

    def make():
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    data = [torch.randn(16, 6) for _ in range(STEPS)]
    averaged = []
    for cls, model in zip((Adam, torch.optim.AdamW), twin_models(make), strict=True):
        optimizer = cls(model.parameters(), lr=LR, weight_decay=0.05)
        mean, schedule = AveragedModel(model, **average), SWALR(optimizer, swa_lr=LR / 4, anneal_epochs=3)
        for i, x in enumerate(data):
            plain_step(model, optimizer, x, i)
            if i >= STEPS // 2:
                mean.update_parameters(model)
                schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 4)
        update_bn(data, mean)
        averaged.append(mean)
    assert_trained_alike(*averaged, LR)
    torch.testing.assert_close(averaged[0](data[0]), averaged[1](data[0]), rtol=1e-2, atol=1e-3)


# Params that are not simply there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm", "own"])
def test_parametrized_weights(Adam, kind):
    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).transpose(-1, -2)

    def make():
        model = new_model()
        if kind == "own":
            parametrize.register_parametrization(model[2], "weight", Symmetric())
        else:
            getattr(parametrizations, kind)(model[2])
        return model

    ours, theirs, optimizer = train_twins(Adam, make)
    assert_trained_alike(ours, theirs, LR)
    assert len(optimizer.state) == len(list(ours.parameters()))
    torch.testing.assert_close(ours[2].weight, theirs[2].weight, rtol=1e-3, atol=LR * 1e-2)
    if kind == "own":
        assert torch.equal(ours[2].weight, ours[2].weight.t())
    if kind == "orthogonal":
        torch.testing.assert_close(ours[2].weight @ ours[2].weight.t(), torch.eye(8), rtol=0, atol=1e-4)


def test_a_parametrization_that_comes_later_needs_its_params_in_the_optimizer(Adam):
    """As with torch: the weight that the optimizer has is not a param of the model any more, and gets no grads."""
    model = new_model()
    optimizer = Adam(model.parameters(), lr=LR)
    plain_step(model, optimizer, torch.randn(16, 6), 0)
    parametrizations.weight_norm(model[2])
    new = [param for param in model.parameters() if param not in optimizer.state]
    optimizer.add_param_group({"params": new})
    before = [param.detach().clone() for param in new]
    plain_step(model, optimizer, torch.randn(16, 6), 1)
    assert all(not torch.equal(param, value) for param, value in zip(new, before, strict=True))


class Tied(nn.Module):
    """A tiny language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def test_tied_weights_are_one_param(Adam):
    ours, theirs = twin_models(Tied)
    a, b = (
        Adam(ours.parameters(), lr=LR, weight_decay=0.05),
        torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.05),
    )
    for _ in range(STEPS):
        tokens = torch.randint(20, (4, 12))
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
            loss.backward()
            optimizer.step()
    assert ours.head.weight is ours.embedding.weight
    assert len(a.state) == 3
    assert_trained_alike(ours, theirs, LR)


def test_tied_weights_given_twice_are_an_error_at_the_step(Adam):
    """torch only warns of that, and goes the step twice."""
    model = Tied()
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        optimizer = Adam([model.embedding.weight, model.head.weight])
    model(torch.randint(20, (2, 5))).sum().backward()
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match="param 0 and param group 0, param 1 share memory"):
        optimizer.step()
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_layers_frozen_and_unfrozen_in_training(Adam, set_to_none):
    """A grad of None leaves a param out; a grad of zeros, left in a frozen layer, still moves it, as with torch."""

    def step(model, optimizer, x, i):
        model[2].requires_grad_(i % 4 < 2)
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().mean().backward()
        optimizer.step()

    ours, theirs, optimizer = train_twins(Adam, new_model, step)
    assert_trained_alike(ours, theirs, LR)
    counts = {name: int(optimizer.state[param]["step"]) for name, param in ours.named_parameters()}
    assert counts["0.weight"] == STEPS
    assert counts["2.weight"] == (6 if set_to_none else STEPS)


def test_layers_that_begin_frozen_join_later(Adam):
    def step(model, optimizer, x, i):
        model[0].requires_grad_(i >= 4)
        plain_step(model, optimizer, x, i)

    ours, theirs, optimizer = train_twins(Adam, new_model, step)
    assert_trained_alike(ours, theirs, LR)
    assert int(optimizer.state[ours[0].weight]["step"]) == STEPS - 4


def test_a_sparse_embedding_is_a_clear_error_before_anything_is_written(Adam):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    optimizer = Adam(model.parameters())
    model(torch.tensor([1, 3])).sum().backward()
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"sparse grads are not supported: use torch.optim.SparseAdam, or an Embedding"):
        optimizer.step()
    assert_equal(model.parameters(), before.parameters())
    assert not optimizer.state


def test_lazy_layers_get_their_shapes_after_the_optimizer_is_made(Adam):
    """Until then their params have neither shape nor values."""
    ours, theirs = twin_models(lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)))
    a, b = Adam(ours.parameters(), lr=LR), torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0)
    a.step()
    a.zero_grad()
    assert not a.state
    ours(torch.randn(3, 5)), theirs(torch.randn(3, 5))
    theirs.load_state_dict(ours.state_dict())
    for _ in range(STEPS):
        x = torch.randn(3, 5)
        plain_step(ours, a, x, 0)
        plain_step(theirs, b, x, 0)
    assert len(a.state) == 4
    assert_trained_alike(ours, theirs, LR)


# Other ways to the grads -------------------------------------------------------------------------------------------


def test_functional_call_and_grad(Adam):
    """Grads from torch.func, put where the optimizer looks for them."""

    def step(model, optimizer, x, _):
        params = {name: param.detach() for name, param in model.named_parameters()}

        def loss(values):
            return torch.func.functional_call(model, values, (x,)).square().mean()

        grads = torch.func.grad(loss)(params)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        optimizer.step()

    ours, theirs, _ = train_twins(Adam, new_model, step)
    assert_trained_alike(ours, theirs, LR)


def test_per_sample_grads_by_vmap(Adam):
    """Their mean over samples is a tensor of its own layout; it is taken however it lies in memory."""

    def step(model, optimizer, x, _):
        params = {name: param.detach() for name, param in model.named_parameters()}

        def loss(values, sample):
            return torch.func.functional_call(model, values, (sample[None],)).square().mean()

        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
        for name, param in model.named_parameters():
            param.grad = grads[name].mean(0)
        optimizer.step()

    ours, theirs, _ = train_twins(Adam, new_model, step)
    assert_trained_alike(ours, theirs, LR)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(Adam, use_reentrant):
    def make():
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.rest = nn.Linear(6, 8), new_model()[2:]

            def forward(self, x):
                return checkpoint(self.rest, self.first(x), use_reentrant=use_reentrant)

        return Checkpointed()

    ours, theirs, _ = train_twins(Adam, make)
    assert_trained_alike(ours, theirs, LR)


def test_gradient_accumulation(Adam):
    def step(model, optimizer, x, _):
        optimizer.zero_grad()
        for part in x.chunk(4):
            (model(part).square().mean() / 4).backward()
        optimizer.step()

    ours, theirs, _ = train_twins(Adam, new_model, step)
    assert_trained_alike(ours, theirs, LR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_autocast_with_a_grad_scaler(Adam, dtype, scaled, clipped):
    """The grads are float32 as the params are; what was computed in 16 bits is the same for both optimizers."""
    scalers = {}

    def step(model, optimizer, x, _):
        scaler = scalers.setdefault(id(model), torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            output = model(x)
            loss = output.float().square().mean()
        assert output.dtype == dtype
        scaler.scale(loss).backward()
        if clipped:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    ours, theirs, _ = train_twins(Adam, new_model, step, steps=5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # A rounding of 16 bits that falls otherwise changes grads by some thousandths; where they are near zero, Adam
        # makes steps of full size of that.
        assert (a - b).abs().mean() < LR * 5 * 0.05


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_tensor_hooks_and_anomaly_mode(cls):
    ours, plain = twin_models(new_model)
    a, b = cls(ours.parameters(), lr=LR), cls(plain.parameters(), lr=LR)
    for i in range(3):
        x = torch.randn(16, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anomaly mode warns of itself
            with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly():
                plain_step(ours, a, x, i)
        plain_step(plain, b, x, i)
    assert_equal(ours.parameters(), plain.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_step_under_any_mode_of_autograd(Adam, mode):
    """In inference mode torch makes states of a kind that may not be written outside of it; ours may."""
    ours, plain = twin_params([(3, 4), (5,)])
    a, b = Adam(ours, lr=LR), Adam(plain, lr=LR)
    for i in range(4):
        same_grads(ours, plain)
        if i == 3:
            a.step()
        else:
            with mode():
                a.step()
        b.step()
    assert_equal(ours, plain)


# Loading data ------------------------------------------------------------------------------------------------------


def double(batch):
    """What a worker does to a batch: enough to wake torch's threads there."""
    return torch.stack([x for (x,) in batch]) * 2


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_fork_in_the_middle_of_training(cpu_adam, persistent):
    """New workers are forked each epoch from a process whose optimizer has stepped; training is as without workers."""
    data = TensorDataset(torch.randn(24, 6))
    ours, plain = twin_models(new_model)
    a, b = DeepSpeedCPUAdam(ours.parameters(), lr=LR), DeepSpeedCPUAdam(plain.parameters(), lr=LR)
    with_workers = DataLoader(
        data, 8, num_workers=2, collate_fn=double, multiprocessing_context="fork", persistent_workers=persistent
    )
    without = DataLoader(data, 8, collate_fn=double)
    for _ in range(2):
        for x, y in zip(with_workers, without, strict=True):
            assert torch.equal(x, y)
            plain_step(ours, a, x, 0)
            plain_step(plain, b, y, 0)
    assert_equal(ours.parameters(), plain.parameters())
    assert a.state[ours[0].weight]["step"] == 6


def test_params_in_shared_memory_are_updated_where_they_are(Adam):
    """A model shared with other processes, as in asynchronous training: they see the update."""
    model = new_model().share_memory()
    addresses = [param.data_ptr() for param in model.parameters()]
    plain = copy.deepcopy(model)
    optimizers = [Adam(each.parameters(), lr=LR) for each in (model, plain)]
    x = torch.randn(16, 6)
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        plain_step(each, optimizer, x, 0)
    assert all(param.is_shared() for param in model.parameters())
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert_equal(model.parameters(), plain.parameters())

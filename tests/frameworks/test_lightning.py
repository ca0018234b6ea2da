"""Both optimizers under Lightning: automatic and manual optimization, clipping, precisions, checkpoints, DDP."""

import logging

import pytest
import torch

L = pytest.importorskip("lightning")

from frameworks.processes import run_on_ranks  # noqa: E402
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from adamops import DeepSpeedCPUAdam, FusedAdam  # noqa: E402

pytestmark = pytest.mark.frameworks

LR = 5e-3
CLASSES = [DeepSpeedCPUAdam, FusedAdam]
KINDS = {
    "float32": (DeepSpeedCPUAdam, {}),
    "8-bit states": (DeepSpeedCPUAdam, {"state_dtype": "8bit"}),
    "24-bit masters": (DeepSpeedCPUAdam, {"master_weight_bits": 24}),
    "8-bit states, 24-bit masters": (DeepSpeedCPUAdam, {"state_dtype": "8bit", "master_weight_bits": 24}),
    "rounding at random": (DeepSpeedCPUAdam, {"stochastic_rounding": True}),
}


def new_optimizer(kind, params):
    """By a class, or a class and its settings."""
    cls, settings = kind if isinstance(kind, tuple) else (kind, {})
    return cls(params, lr=LR, weight_decay=0.01, **settings)


class Module(L.LightningModule):
    """Learns to predict the next of 8 numbers; keeps the losses."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        torch.manual_seed(5)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Tanh(), torch.nn.Linear(512, 8))
        self.losses = []

    def loss_of(self, batch):
        loss = torch.nn.functional.mse_loss(self.layers(batch), batch.roll(1, dims=1))
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, index):
        return self.loss_of(batch)

    def configure_optimizers(self):
        optimizer = new_optimizer(self.kind, self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * LR, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def assert_same_params(ours, theirs):
    """Bit for bit."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


class Manual(Module):
    """Does it all by hand, through the optimizer that Lightning gives."""

    automatic_optimization = False

    def __init__(self, kind, max_norm=None, step=None):
        super().__init__(kind)
        self.max_norm, self.step = max_norm, step or (lambda optimizer: optimizer.step())
        self.norms = []

    def training_step(self, batch, index):
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch))
        if self.max_norm and hasattr(optimizer, "clip_grad_norm_"):
            self.norms.append(optimizer.clip_grad_norm_(self.max_norm).item())
        elif self.max_norm:
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.parameters(), self.max_norm).item())
        self.step(optimizer)
        schedule.step()


class ClipsInStep(Module):
    """As the page says: the step clips, and Lightning does not write the grads."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        optimizer.clip_grad_norm_(gradient_clip_val)


def batches(count=6):
    """For two rounds of a training."""
    data = torch.randn(4 * count, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fitted(module, folder, *, ckpt_path=None, **arguments):
    """The Trainer after training."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"enable_checkpointing": False, "max_steps": 12, "max_epochs": -1, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(default_root_dir=folder, **quiet, **defaults | arguments)
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


def every_round(folder):
    """Keeps a checkpoint after each round.

    Lightning resumes one within a round, or saved at its end instead of after its last step, with other data.
    """
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=len(batches()))
    return {"enable_checkpointing": True, "callbacks": [checkpoint]}


@pytest.fixture(autouse=True)
def one_thread():
    """As the models are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("kind", CLASSES)
def test_trains_as_torch_does(tmp_path, kind, algorithm, accumulated):
    how = {"accumulate_grad_batches": accumulated}
    if algorithm:
        how |= {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    ours, theirs = Module(kind), Module(torch.optim.AdamW)
    rates = [fitted(module, tmp_path, **how).optimizers[0].param_groups[0]["lr"] for module in (ours, theirs)]
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.losses[-1] < ours.losses[0]
    assert rates[0] == rates[1] > LR / 10  # the schedule moves it


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("max_norm", [None, 0.02])
@pytest.mark.parametrize("automatic", [True, False])
def test_trains_in_other_precisions(tmp_path, precision, max_norm, automatic):
    """In manual optimization the step runs where Lightning has set autocast, or the default dtype, for the model."""
    masters = {"master_weight_bits": 32} if precision == "bf16-true" else {}
    kinds = [(DeepSpeedCPUAdam, masters), torch.optim.AdamW]
    modules = [Module(kind) if automatic else Manual(kind, max_norm) for kind in kinds]
    for module in modules:
        fitted(module, tmp_path, precision=precision, **({"gradient_clip_val": max_norm} if automatic else {}))
    ours, theirs = modules
    assert ours.losses == pytest.approx(theirs.losses, rel=5e-2 if "bf16" in precision else 1e-4)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_trains_a_bf16_model_with_less_memory(tmp_path, settings):
    ours, theirs = Module(settings), Module(torch.optim.AdamW)
    fitted(ours, tmp_path, precision="bf16-true")
    fitted(theirs, tmp_path)
    assert next(ours.parameters()).dtype == torch.bfloat16
    assert ours.losses == pytest.approx(theirs.losses, rel=5e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_resumes_as_if_unbroken(tmp_path, settings, precision):
    unbroken, resumed = Module(settings), Module(settings)
    how = {"precision": precision, "gradient_clip_val": 0.02}
    whole = fitted(unbroken, tmp_path, **how, **every_round(tmp_path))
    again = fitted(resumed, tmp_path, **how, ckpt_path=tmp_path / "step=6.ckpt")
    assert resumed.losses == unbroken.losses[6:]
    assert_same_params(resumed, unbroken)
    assert again.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("kinds", [(torch.optim.AdamW, FusedAdam), (FusedAdam, torch.optim.AdamW)], ids=["from", "to"])
def test_goes_on_from_a_checkpoint_of_torch_and_back(tmp_path, kinds):
    unbroken, before, after = Module(torch.optim.AdamW), *map(Module, kinds)
    fitted(unbroken, tmp_path)
    fitted(before, tmp_path, **every_round(tmp_path))
    fitted(after, tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    assert before.losses[:6] + after.losses == pytest.approx(unbroken.losses, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("clipping", [Module, ClipsInStep])
@pytest.mark.parametrize("kind", CLASSES)
def test_clips_in_every_precision(tmp_path, kind, clipping, precision):
    """With 16-mixed too, which Lightning leaves to GPUs unless it is given as a plugin."""
    how = {"precision": precision}
    if precision == "16-mixed":
        how = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))}
    ours, theirs = clipping(kind), Module(torch.optim.AdamW)
    for module in (ours, theirs):
        fitted(module, tmp_path, gradient_clip_val=0.02, **how)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4 if precision == "32-true" else 5e-2)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_gradient_scaler_skips_a_step_after_an_overflow(tmp_path, automatic):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 grads overflow, until it is smaller
    ours = Module(FusedAdam) if automatic else Manual(FusedAdam)
    trainer = fitted(ours, tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert {state["step"] for state in trainer.optimizers[0].state.values()} < {*range(1, 12)}
    assert all(param.isfinite().all() for param in ours.parameters())


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kind", CLASSES)
def test_clips_through_the_wrapper_in_manual_optimization(tmp_path, kind, max_norm):
    ours, theirs = Manual(kind, max_norm), Manual(torch.optim.AdamW, max_norm)
    for module in (ours, theirs):
        fitted(module, tmp_path)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "step",
    [lambda optimizer: optimizer.step(zero_grads=True), lambda optimizer: optimizer.step_async().wait()],
    ids=["zero_grads", "step_async"],
)
def test_steps_otherwise_through_the_wrapper_in_manual_optimization(tmp_path, kind, step):
    ours, theirs = Manual(kind, 0.05, step), Manual(kind, 0.05)
    for module in (ours, theirs):
        fitted(module, tmp_path)
    assert ours.losses == theirs.losses
    assert_same_params(ours, theirs)


def test_zero_grad_of_the_wrapper_forgets_the_clipping(tmp_path):
    def change_of_mind(optimizer):
        grads = [param.grad.clone() for param in optimizer.param_groups[0]["params"]]
        optimizer.zero_grad()
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = grad
        optimizer.step()

    ours, theirs = Manual(DeepSpeedCPUAdam, 1e-9, change_of_mind), Manual(DeepSpeedCPUAdam)
    for module in (ours, theirs):
        fitted(module, tmp_path)
    assert_same_params(ours, theirs)


@pytest.mark.parametrize("clips_itself", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", CLASSES)
def test_trains_under_fabric(tmp_path, kind, precision, clips_itself):
    losses = []
    for kind_of_run in (kind, torch.optim.AdamW):
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
        module = Module(kind_of_run)
        model, optimizer = fabric.setup(module, new_optimizer(kind_of_run, module.parameters()))
        model.mark_forward_method("loss_of")
        for batch in batches():
            optimizer.zero_grad()
            fabric.backward(model.loss_of(batch))
            if clips_itself and kind_of_run is kind:
                optimizer.clip_grad_norm_(0.05)
            else:
                fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()
        losses.append(module.losses)
        fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
        fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "32-true" else 5e-2)


def train_by_ddp(rank, world_size, folder, kind):
    """The losses of a rank and its params after training."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    module = Module(kind)
    fitted(module, folder, strategy="ddp", devices=world_size, max_steps=6, gradient_clip_val=0.02)
    return module.losses, [param.detach() for param in module.parameters()]


def test_trains_by_ddp(tmp_path):
    ours = run_on_ranks(train_by_ddp, 2, str(tmp_path), DeepSpeedCPUAdam)
    theirs = run_on_ranks(train_by_ddp, 2, str(tmp_path), torch.optim.AdamW)
    for (our_losses, _), (their_losses, _) in zip(ours, theirs, strict=True):
        assert our_losses == pytest.approx(their_losses, rel=1e-4)
    assert ours[0][0] != ours[1][0], "each rank has its own part of the data"
    for a, b in zip(ours[0][1], ours[1][1], strict=True):
        assert torch.equal(a, b)


class Thaws(BaseFinetuning):
    """Trains the last layer, and the first from the second round on, in a param group of its own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layers[0], optimizer, lr=1e-4)


class Partly(Module):
    """With an optimizer of the params that are trained at first."""

    def configure_optimizers(self):
        return new_optimizer(self.kind, [param for param in self.parameters() if param.requires_grad])


@pytest.mark.parametrize("kind", CLASSES)
def test_thaws_layers_in_training(tmp_path, kind):
    ours, theirs = Partly(kind), Partly(torch.optim.AdamW)
    trainers = [fitted(module, tmp_path, callbacks=[Thaws()]) for module in (ours, theirs)]
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert [group["lr"] for group in trainers[0].optimizers[0].param_groups] == [LR, 1e-4]
    steps = [state["step"] for state in trainers[0].optimizers[0].state.values()]
    assert sorted(steps) == [6, 6, 12, 12]


class Adversaries(Module):
    """Two optimizers take turns, each with the other's params frozen."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [new_optimizer(self.kind, self.layers[i].parameters()) for i in (0, 2)]

    def training_step(self, batch, index):
        for sign, optimizer in zip((1, -1), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.step(lambda sign=sign, optimizer=optimizer: self.gradients(sign, optimizer, batch))
            self.untoggle_optimizer(optimizer)

    def gradients(self, sign, optimizer, batch):
        optimizer.zero_grad()
        loss = self.loss_of(batch)
        self.manual_backward(sign * loss)
        return loss


@pytest.mark.parametrize("kind", CLASSES)
def test_two_optimizers_take_turns_by_closures(tmp_path, kind):
    ours, theirs = Adversaries(kind), Adversaries(torch.optim.AdamW)
    for module in (ours, theirs):
        fitted(module, tmp_path, max_steps=24)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)

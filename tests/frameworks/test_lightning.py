"""Both optimizers under Lightning: automatic and manual optimization, clipping, precisions, checkpoints, DDP."""

import pytest
import torch

L = pytest.importorskip("lightning")

from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from adamops import DeepSpeedCPUAdam, FusedAdam  # noqa: E402

pytestmark = pytest.mark.frameworks

LR = 5e-3
CLASSES = [DeepSpeedCPUAdam, FusedAdam]


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
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
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


def batches(count=12):
    data = torch.randn(4 * count, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fitted(module, folder, *, ckpt_path=None, **arguments):
    """The module after training; the last state is saved as last.ckpt if there are to be checkpoints."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"enable_checkpointing": False, "max_steps": 12, "max_epochs": -1, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(default_root_dir=folder, **quiet, **defaults | arguments)
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kind", CLASSES)
def test_clips_through_the_wrapper_in_manual_optimization(tmp_path, kind, max_norm):
    ours, theirs = Manual(kind, max_norm), Manual(torch.optim.AdamW, max_norm)
    for module in (ours, theirs):
        fitted(module, tmp_path)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)

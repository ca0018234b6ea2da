"""Both optimizers under Accelerate: its wrapper, accumulation, clipping, saved states, DDP and FSDP."""

import functools
import os

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from frameworks.processes import run_on_ranks  # noqa: E402
from frameworks.small_models import MODELS, assert_same_weights, copies, text_windows, weights  # noqa: E402

from adamops import DeepSpeedCPUAdam, FusedAdam  # noqa: E402

pytestmark = [pytest.mark.frameworks]

SETTINGS = {"lr": 2e-3, "weight_decay": 0.01}
OURS = functools.partial(DeepSpeedCPUAdam, **SETTINGS)
OUR_FUSED = functools.partial(FusedAdam, **SETTINGS)
TORCHS = functools.partial(torch.optim.AdamW, **SETTINGS)


@pytest.fixture(autouse=True)
def fresh_state():
    """One thread, as the models are small, and nothing left of another Accelerator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    forget_accelerators()
    torch.set_num_threads(threads)


def forget_accelerators():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def clip_as_accelerate(accelerator, model, optimizer, max_norm):
    return accelerator.clip_grad_norm_(model.parameters(), max_norm)


def clip_in_step(accelerator, model, optimizer, max_norm):
    return optimizer.optimizer.clip_grad_norm_(max_norm)


class Training:
    """A training under an Accelerator, with a schedule."""

    def __init__(self, model, new_optimizer, clip=None, **arguments):
        forget_accelerators()
        self.accelerator = accelerate.Accelerator(cpu=True, **arguments)
        optimizer = new_optimizer(model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        loader = torch.utils.data.DataLoader(text_windows(32), batch_size=4)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model.train(), optimizer, loader, schedule
        )
        self.clip = clip
        self.losses, self.norms = [], []

    def run(self, batches=slice(None)):
        for batch in list(self.loader)[batches]:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.norms.append(float(self.clip(self.accelerator, self.model, self.optimizer, 0.5)))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self


@pytest.fixture
def model():
    return MODELS["GPT-2"](dropout=0.0)


@pytest.mark.parametrize("clip", [None, clip_as_accelerate, clip_in_step])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("new_optimizer", [OURS, OUR_FUSED], ids=["DeepSpeedCPUAdam", "FusedAdam"])
def test_trains_as_torch_does(model, new_optimizer, accumulated, clip):
    models = copies(model, 2)
    how = {"gradient_accumulation_steps": accumulated}
    ours = Training(models[0], new_optimizer, clip, **how).run()
    theirs = Training(models[1], TORCHS, clip and clip_as_accelerate, **how).run()
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-2)
    assert {state["step"] for state in ours.optimizer.state.values()} == {8 // accumulated}
    assert ours.losses[-1] < ours.losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trains_in_mixed_precision(model, precision):
    models = copies(model, 2)
    runs = [
        Training(model, optimizer, clip_as_accelerate, mixed_precision=precision).run()
        for model, optimizer in zip(models, [OURS, TORCHS], strict=True)
    ]
    assert next(models[0].parameters()).dtype == torch.float32
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "8bit"}, {"state_dtype": "8bit", "master_weight_bits": 24}, {"stochastic_rounding": True}],
    ids=str,
)
def test_goes_on_from_a_saved_state(model, tmp_path, settings):
    models = copies(model.to(torch.bfloat16 if settings else torch.float32), 2)
    optimizer = functools.partial(OURS, **settings)
    unbroken = Training(models[0], optimizer, clip_as_accelerate).run(slice(4))
    unbroken.accelerator.save_state(str(tmp_path))
    unbroken.run(slice(4, 8))
    resumed = Training(models[1], optimizer, clip_as_accelerate)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(slice(4, 8))
    assert resumed.losses == unbroken.losses[4:]
    assert_same_weights(weights(models[1]), weights(models[0]))


def test_the_wrapper_takes_no_more_than_torchs_arguments(model):
    """What the page says: what adamops adds is reached through optimizer.optimizer."""
    run = Training(model, OURS).run(slice(1))
    with pytest.raises(TypeError, match="zero_grads"):
        run.optimizer.step(zero_grads=True)
    with pytest.raises(AttributeError, match="clip_grad_norm_"):
        run.optimizer.clip_grad_norm_(1.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    run.optimizer.optimizer.step(zero_grads=True)
    assert not any(param.grad.any() for param in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["adamops", "torch, fused"])
def test_a_step_after_an_overflow_is_skipped(settings):
    """As for torch's fused AdamW, which the step leaves out by itself too, the wrapper does not know of it."""
    accelerate.Accelerator(cpu=True)
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], **settings) if settings else OURS([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # on a CPU Accelerate has none
    wrapper = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    before = param.detach().clone()
    scaler.scale((param * torch.inf).sum()).backward()
    wrapper.step()
    assert torch.equal(param, before) and scaler.get_scale() == 2.0
    assert not wrapper.step_was_skipped
    wrapper.zero_grad()
    scaler.scale(param.sum()).backward()
    wrapper.step()
    assert not torch.equal(param, before)


def with_plugin(plugin):
    """What an Accelerator is given for it."""
    if plugin == "DDP":
        return {}
    fsdp = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    return {"fsdp_plugin": fsdp}


def train_on_a_rank(rank, world_size, plugin, folder):
    """Trainings by torch's optimizer, by ours, and by ours from a saved state on."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for; the processes are connected already
    models = copies(MODELS["Llama"](), 4)
    theirs = Training(models[0], TORCHS, clip_as_accelerate, **with_plugin(plugin)).run()
    ours = Training(models[1], OURS, clip_as_accelerate, **with_plugin(plugin)).run(slice(2))
    ours.accelerator.save_state(folder)
    ours.run(slice(2, 4))
    resumed = Training(models[2], OURS, clip_as_accelerate, **with_plugin(plugin))
    resumed.accelerator.load_state(folder)
    resumed.run(slice(2, 4))
    in_step = Training(models[3], OURS, clip_in_step, **with_plugin(plugin)).run()
    return [
        (run.losses, run.norms, {name: whole(tensor) for name, tensor in weights(run.model).items()})
        for run in (theirs, ours, resumed, in_step)
    ]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["DDP", "FSDP2"])
def test_trains_on_two_processes(plugin, tmp_path):
    on_ranks = run_on_ranks(train_on_a_rank, 2, plugin, str(tmp_path))
    for theirs, ours, resumed, in_step in on_ranks:
        for run in (ours, in_step):
            assert run[0] == pytest.approx(theirs[0], rel=1e-3)
            assert run[1] == pytest.approx(theirs[1], rel=1e-2)
        assert resumed[:2] == tuple(part[2:] for part in ours[:2])
        assert_same_weights(resumed[2], ours[2])
    (_, first, *_), (_, second, *_) = on_ranks
    assert first[0] != second[0], "each rank has its own part of the data"
    assert_same_weights(first[2], second[2])

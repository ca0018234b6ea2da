"""Both optimizers under the Trainer of transformers, and on the many small tensors of PEFT."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from frameworks.small_models import MODELS, assert_same_weights, copies, text_windows, weights  # noqa: E402

from adamops import DeepSpeedCPUAdam, FusedAdam  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.usefixtures("one_thread")]

SETTINGS = {"lr": 2e-3, "weight_decay": 0.01}
LESS_MEMORY = {
    "8-bit states": {"state_dtype": "8bit"},
    "24-bit masters": {"master_weight_bits": 24},
    "8-bit states, 24-bit masters": {"state_dtype": "8bit", "master_weight_bits": 24},
    "rounding at random": {"stochastic_rounding": True},
}


@pytest.fixture
def one_thread():
    """As the models are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def trained(tmp_path, seed):
    """Trains a model, and gives back its Trainer. The optimizer is None, an optimizer, or a class with settings."""

    def train(model, optimizer=None, *, resume=None, **arguments):
        is_class = isinstance(optimizer, tuple)
        how = {"optimizer_cls_and_kwargs": optimizer} if is_class else {"optimizers": (optimizer, None)}
        defaults = {
            "output_dir": str(tmp_path / "unused"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "learning_rate": SETTINGS["lr"],
            "weight_decay": SETTINGS["weight_decay"],
        }
        arguments = transformers.TrainingArguments(
            use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True, seed=seed, **defaults | arguments
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=text_windows(64), **how)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def logged(trainer, what):
    return [entry[what] for entry in trainer.state.log_history if what in entry]


@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, FusedAdam])
@pytest.mark.parametrize("as_class", [False, True])
def test_trains_as_torch_does(model, trained, cls, as_class):
    ours, theirs = copies(model, 2)
    schedule = {"max_steps": 12, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    if as_class:  # it gets the Trainer's groups: no decay for biases and norms
        runs = [trained(ours, (cls, SETTINGS), **schedule), trained(theirs, **schedule)]
    else:
        runs = [
            trained(ours, cls(ours.parameters(), **SETTINGS), **schedule),
            trained(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS), **schedule),
        ]
    assert isinstance(runs[0].optimizer.optimizer, cls)
    assert isinstance(runs[1].optimizer.optimizer, torch.optim.AdamW)
    ours, theirs = ({what: logged(run, what) for what in ("loss", "grad_norm", "learning_rate")} for run in runs)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    assert ours["learning_rate"] == theirs["learning_rate"]
    assert ours["loss"][-1] < ours["loss"][0]


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_accumulates_and_clips(model, trained, accumulated, max_norm):
    ours, theirs = copies(model, 2)
    how = {"max_steps": 4, "gradient_accumulation_steps": accumulated, "max_grad_norm": max_norm}
    runs = [trained(ours, (DeepSpeedCPUAdam, SETTINGS), **how), trained(theirs, **how)]
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-3)
    steps = {state["step"] for state in runs[0].optimizer.state.values()}
    assert steps == {4}


@pytest.mark.parametrize("settings", LESS_MEMORY.values(), ids=LESS_MEMORY.keys())
@pytest.mark.parametrize("kind", MODELS)
def test_trains_a_bf16_model_with_less_memory(trained, kind, settings):
    model = MODELS[kind](width=64).to(torch.bfloat16)
    ours, theirs = copies(model, 2)
    runs = [trained(ours, (DeepSpeedCPUAdam, SETTINGS | settings), max_steps=12), trained(theirs.float(), max_steps=12)]
    assert next(ours.parameters()).dtype == torch.bfloat16
    is_quantized = {state["exp_avg"].dtype == torch.int8 for state in runs[0].optimizer.state.values()}
    assert is_quantized == ({True, False} if "state_dtype" in settings else {False})  # norms and biases are too small
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=2e-2)


def test_trains_in_bf16_autocast(model, trained):
    ours, theirs = copies(model, 2)
    runs = [trained(ours, (DeepSpeedCPUAdam, SETTINGS), bf16=True), trained(theirs, bf16=True)]
    assert next(ours.parameters()).dtype == torch.float32
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-2)


@pytest.mark.parametrize("settings", [{}, *LESS_MEMORY.values()], ids=["float32 states", *LESS_MEMORY])
def test_resumes_as_if_unbroken(model, trained, tmp_path, settings):
    """With dropout, a schedule and clipping, to the last bit; an 8-bit state needs 4096 elements."""
    dtype = torch.bfloat16 if settings else torch.float32
    unbroken, broken, resumed = copies(model.to(dtype), 3)
    how = {"lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    optimizer = (DeepSpeedCPUAdam, SETTINGS | settings)
    whole = trained(unbroken, optimizer, **how)
    folder = tmp_path / "checkpoints"
    trained(broken, optimizer, **how, output_dir=str(folder), save_strategy="steps", save_steps=3)
    again = trained(resumed, optimizer, **how, output_dir=str(folder), resume=str(folder / "checkpoint-3"))
    assert logged(again, "loss") == logged(whole, "loss")  # the first three are read from the checkpoint
    assert_same_weights(weights(resumed), weights(unbroken))
    state_of = {
        trainer: [entry for _, entry in sorted(trainer.optimizer.state_dict()["state"].items())]
        for trainer in (again, whole)
    }
    for ours, theirs in zip(*state_of.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)


@pytest.mark.parametrize("there_and_back", [False, True])
def test_goes_on_from_a_checkpoint_of_torch_and_back(trained, tmp_path, there_and_back):
    """A user changes the line in the middle of a training."""
    unbroken, first, then = copies(MODELS["Llama"](), 3)
    how = {"lr_scheduler_type": "cosine", "max_steps": 8}
    whole = trained(unbroken, **how)
    ours, torchs = (DeepSpeedCPUAdam, SETTINGS), None
    before, after = (ours, torchs) if there_and_back else (torchs, ours)
    folder = tmp_path / "checkpoints"
    trained(first, before, **how, output_dir=str(folder), save_strategy="steps", save_steps=4)
    again = trained(then, after, **how, output_dir=str(folder), resume=str(folder / "checkpoint-4"))
    assert logged(again, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert {int(state["step"]) for state in again.optimizer.state.values()} == {8}
    for name, weight in weights(then).items():
        torch.testing.assert_close(weight, unbroken.get_parameter(name), rtol=1e-3, atol=1e-5)


def lora(layers, rank=4):
    """A GPT-2 with LoRA on all its linear layers, which are 4 a layer, with 2 tensors each."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(MODELS["GPT-2"](layers=layers, width=16, dropout=0.0), config)


def test_trains_the_many_small_tensors_of_lora(trained):
    ours, theirs = copies(lora(layers=24), 2)
    base = {name: weight for name, weight in weights(ours).items() if "lora" not in name}
    how = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    runs = [trained(ours, (DeepSpeedCPUAdam, SETTINGS | {"lr": 1e-2}), **how), trained(theirs, **how)]
    adapters = [name for name, param in ours.named_parameters() if param.requires_grad]
    assert len(adapters) == 192 == len(runs[0].optimizer.state)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-3)
    assert_same_weights({name: weights(ours)[name] for name in base}, base)
    assert all(weights(ours)[name].any() for name in adapters)  # lora_B begins as zeros


def test_resumes_lora(trained, tmp_path):
    unbroken, broken, resumed = copies(lora(layers=3), 3)
    optimizer = (DeepSpeedCPUAdam, SETTINGS)
    folder = tmp_path / "checkpoints"
    whole = trained(unbroken, optimizer)
    trained(broken, optimizer, output_dir=str(folder), save_strategy="steps", save_steps=3)
    again = trained(resumed, optimizer, output_dir=str(folder), resume=str(folder / "checkpoint-3"))
    assert logged(again, "loss") == logged(whole, "loss")
    assert_same_weights(weights(resumed), weights(unbroken))


def test_a_bad_setting_is_told_before_training(trained, model):
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        trained(model, (DeepSpeedCPUAdam, {"lr": -1}))
    with pytest.raises(TypeError, match="fused"):  # a setting of torch's, in Trainer's optim_args perhaps
        trained(model, (DeepSpeedCPUAdam, {"fused": True}))

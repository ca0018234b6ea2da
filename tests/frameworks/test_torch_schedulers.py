"""Every scheduler of torch.optim.lr_scheduler drives the optimizers as it drives torch.optim.AdamW."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from twins import assert_close, assert_equal, same_grads, twin_params

pytestmark = pytest.mark.frameworks

SHAPES = [(3, 5), (7,), ()]
STEPS, LR = 24, 1e-2


def sequential(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 15)], [5])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    )


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 5, 0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 11], 0.3),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.2, 6),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 20, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10, 1e-4),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, LR, 5),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS + 1),
}


def new_optimizer(cls, params, tensor_lr):
    return cls(params, lr=torch.tensor(LR) if tensor_lr else LR, weight_decay=0.1)


def advance(scheduler, step):
    """One step of the scheduler; the metric that ReduceLROnPlateau looks at falls for a while only."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(max(10.0 - step, 5.0))
    else:
        scheduler.step()


def test_no_scheduler_of_torch_is_left_out():
    """What torch may have besides later, and what it did not have in earlier versions, is not an error here."""
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_follows_torch_under_a_schedule(Adam, name, tensor_lr):
    ours, theirs = twin_params(SHAPES)
    pairs = []
    for cls, params in ((Adam, ours), (torch.optim.AdamW, theirs)):
        optimizer = new_optimizer(cls, params, tensor_lr)
        pairs.append((optimizer, SCHEDULERS[name](optimizer)))
    seen = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of `lr_scheduler.step")
        for step in range(STEPS):
            same_grads(ours, theirs)
            for optimizer, scheduler in pairs:
                optimizer.step()
                advance(scheduler, step)
            (our_group,), (their_group,) = (optimizer.param_groups for optimizer, _ in pairs)
            assert float(our_group["lr"]) == float(their_group["lr"])
            assert our_group["betas"] == their_group["betas"]
            seen.add((float(our_group["lr"]), our_group["betas"]))
    assert len(seen) > 1  # the schedule did something
    if name in ("CyclicLR", "OneCycleLR"):
        assert len({betas for _, betas in seen}) > 1
    assert_close(ours, theirs, STEPS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_goes_on_in_the_middle_of_a_schedule(Adam, name):
    ours, resumed = twin_params(SHAPES)
    optimizer = new_optimizer(Adam, ours, False)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(9):
        same_grads(ours)
        optimizer.step()
        advance(scheduler, step)
    with torch.no_grad():
        for param, value in zip(resumed, ours, strict=True):
            param.copy_(value)
    other = new_optimizer(Adam, resumed, False)
    other_scheduler = SCHEDULERS[name](other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which shares the tensors, as torch's does
    other_scheduler.load_state_dict(scheduler.state_dict())
    for step in range(9, 16):
        same_grads(ours, resumed)
        for each, schedule in ((optimizer, scheduler), (other, other_scheduler)):
            each.step()
            advance(schedule, step)
    assert_equal(ours, resumed)


def test_a_schedule_by_group(Adam):
    ours, theirs = twin_params(SHAPES)
    pairs = []
    for cls, params in ((Adam, ours), (torch.optim.AdamW, theirs)):
        optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 1e-3}], lr=LR, weight_decay=0.0)
        pairs.append((optimizer, lr_scheduler.LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 1.0 / (1 + e)])))
    for _ in range(STEPS):
        same_grads(ours, theirs)
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    assert [g["lr"] for g in pairs[0][0].param_groups] == [g["lr"] for g in pairs[1][0].param_groups]
    assert_close(ours, theirs, STEPS)


def test_a_scheduler_before_the_first_step_warns_as_with_torch(Adam):
    (params, _) = twin_params(SHAPES)
    optimizer = new_optimizer(Adam, params, False)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        scheduler.step()


def test_betas_out_of_range_by_a_schedule_are_an_error_before_anything_is_written(Adam):
    (params, _) = twin_params(SHAPES)
    optimizer = new_optimizer(Adam, params, False)
    lr_scheduler.CyclicLR(optimizer, 1e-3, LR, 5, base_momentum=1.0, max_momentum=1.0)
    same_grads(params)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 1.0 in param group 0"):
        optimizer.step()
    assert_equal(params, before)

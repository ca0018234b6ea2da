"""Wrappers of an optimizer's class without its attributes, as Lightning makes them: methods work through them."""

import copy

import pytest
import torch


class Wrapper:
    """Reads from the optimizer what it does not have itself."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None, **arguments):
        return self._optimizer.step(closure, **arguments)


def twin_optimizers(new_optimizer):
    """Two, the first by a wrapper, over equal params with equal grads."""
    values, grads = torch.randn(2, 40, 120)
    params = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    for param in params:
        param.grad = grads.clone()
    first, second = (new_optimizer([param], lr=0.1) for param in params)
    return params, [Wrapper(first), second]


@pytest.mark.parametrize(
    "act",
    [
        lambda optimizer: optimizer.clip_grad_norm_(0.1),
        lambda optimizer: optimizer.zero_grad(set_to_none=False),
        lambda optimizer: optimizer.step(zero_grads=True),
        lambda optimizer: optimizer.step_async().wait(),
        lambda optimizer: optimizer.step_async(),
        lambda optimizer: optimizer.load_fp32_params(optimizer.fp32_params()),
    ],
    ids=["clip_grad_norm_", "zero_grad", "zero_grads", "step_async", "step_async without wait", "fp32_params"],
)
def test_methods_work_through_a_wrapper(Adam, act):
    params, optimizers = twin_optimizers(Adam)
    for optimizer in optimizers:
        optimizer.clip_grad_norm_(50.0)
        act(optimizer)
        optimizer.step()
        assert optimizer.state_dict()["state"][0]["step"] >= 1
    assert torch.equal(*params)
    assert torch.equal(params[0].grad, params[1].grad)


def test_clipping_through_a_wrapper_counts_for_the_grads_that_were_clipped(Adam):
    params, optimizers = twin_optimizers(Adam)
    optimizers[0].clip_grad_norm_(0.1)
    params[1].grad *= 0.1 / params[1].grad.norm()
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    grad = torch.randn_like(params[0])
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(*params)


def test_loading_into_a_wrapper_leaves_it_tied_to_the_optimizer(Adam):
    """The states go to the wrapper alone, as with torch's classes; what methods set still reaches the optimizer."""
    params, optimizers = twin_optimizers(Adam)
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for optimizer in optimizers:
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    assert torch.equal(*params)


def test_wrappers_can_be_copied(Adam):
    (param, _), (wrapper, _) = twin_optimizers(Adam)
    wrapper.step()
    copied = copy.deepcopy(wrapper)
    assert copied.state_dict()["state"][0]["step"] == wrapper.state_dict()["state"][0]["step"] == 1
    assert copied.param_groups[0]["params"][0] is not param

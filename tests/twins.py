"""Two of everything: params or models that start alike, one for our optimizer and one for torch's."""

import copy

import torch


def twin_params(shapes, dtype=torch.float32):
    """Two lists of the same new params."""
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    return tuple([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))


def twin_models(make):
    """Two of the same new model."""
    model = make()
    return model, copy.deepcopy(model)


def same_grads(*lists):
    """Gives params at the same place of each list the same random grad."""
    for row in zip(*lists, strict=True):
        grad = torch.randn_like(row[0])
        for param in row:
            param.grad = grad.clone()


def assert_equal(ours, theirs):
    """The same bits; NaN equals nothing."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def assert_close(ours, theirs, steps, lr=1e-2):
    """The rules of both round differently, some ulps a step, where the grads are the same."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=steps * 2.0**-23, atol=steps * lr * 2.0**-20)


def assert_trained_alike(ours, theirs, lr=1e-2):
    """Two models went the same way, where the grads follow from params that were rounded differently."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=lr * 1e-2)

"""Sums of grads in float32, by the op and by torch: the same bits on every target and for every split."""

import pytest
import torch

from adamops import DeepSpeedCPUAdam, op_builder
from adamops.optim.layout import add_in_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def op_backend():
    return DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(1))])._backends[torch.device("cpu")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 100_003])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", op_builder.get("cpu_adam").load().supported_targets())
def test_bits_of_sums(cpu_adam, target, dtype, numel, threads, seed):
    cpu_adam.use_target(target)
    grads = [(torch.randn(numel) * 10.0 ** torch.empty(numel).uniform_(-8, 8)).to(dtype) for _ in range(3)]
    grads[1][::7] = -0.0
    grads[2][::11] = float("inf")
    memory = torch.full((numel + 2,), 7.0)
    total, backend = memory[1:-1], op_backend()
    expected = grads[0].float()
    backend.add_grad(total, grads[0], True, threads)
    assert torch.equal(total.view(torch.int32), expected.view(torch.int32))
    for grad in grads[1:]:
        backend.add_grad(total, grad, False, threads)
        expected = expected + grad.float()
    assert torch.equal(total.view(torch.int32), expected.view(torch.int32))
    assert memory[0] == memory[-1] == 7.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_torch(dtype, seed):
    grads = [torch.randn(300, 500).t().to(dtype) for _ in range(2)]
    total = torch.empty_like(grads[0], dtype=torch.float32)
    add_in_pieces(total, grads[0], True)
    add_in_pieces(total, grads[1], False)
    assert torch.equal(total, grads[0].float() + grads[1].float())
    by_op = torch.empty_like(total)
    op_backend().add_grad(by_op, grads[0], True, None)
    op_backend().add_grad(by_op, grads[1], False, None)
    assert torch.equal(by_op, total)


def test_what_the_op_refuses():
    backend = op_backend()
    with pytest.raises(ValueError, match="unknown dtype code 99"):
        backend.module.add_grad(0, 0, 0, 99, True, 1)
    with pytest.raises(ValueError, match="unknown dtype code"):
        backend.add_grad(torch.ones(2), torch.ones(2, dtype=torch.int8), True, 1)

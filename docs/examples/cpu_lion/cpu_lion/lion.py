"""Lion (arXiv 2302.06675, Algorithm 2) as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adamops import op_builder

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/formats/dtype.h of adamops


class Lion(torch.optim.Optimizer):
    """Lion for dense, contiguous params on the CPU, of float32, bfloat16 or float16.

    Grads and the state ``exp_avg`` (m) have the dtype of their param.

    Parameters
    ----------
    params
        Params to optimise, or dicts of param groups.
    lr
        Learning rate; a third to a tenth of AdamW's.
    betas
        Decay rates: beta1 of the update, beta2 of the average that is kept; each in [0, 1).
    weight_decay
        Decoupled, as in AdamW; three to ten times AdamW's.

    Raises
    ------
    ValueError
        For a hyper-parameter out of its range, or, before any param is changed, a param or grad that it cannot update.
    adamops.op_builder.OpUnavailableError
        If the op is neither prebuilt nor can be built here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr and weight_decay must be at least 0, are {lr} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), are {betas}")
        self._op = op_builder.get("cpu_lion").load()
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every param that has a grad; returns the loss of `closure`, which is called first if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for _, params in groups:
            for param in params:
                self._check(param)
        for group, params in groups:
            self._update(group, params)
        return loss

    def _check(self, param: Tensor) -> None:
        described = f"a param of shape {tuple(param.shape)}, {param.dtype}, on {param.device}"
        if param.dtype not in _DTYPE_CODES or param.device.type != "cpu" or not param.is_contiguous():
            raise ValueError(f"Lion takes contiguous float32, bfloat16 or float16 on the CPU, not {described}")
        tensors = {"grad": param.grad}
        if self.state[param]:
            tensors["exp_avg"] = self.state[param]["exp_avg"]
        for name, tensor in tensors.items():
            fits = tensor.layout == torch.strided and tensor.is_contiguous() and tensor.device == param.device
            if not fits or tensor.shape != param.shape or tensor.dtype != param.dtype:
                raise ValueError(f"the {name} of {described} is not like it: {tuple(tensor.shape)}, {tensor.dtype}")

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
        columns = (params, [p.grad for p in params], [self.state[p]["exp_avg"] for p in params])
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        self._op.lion_step(
            *([tensor.data_ptr() for tensor in column] for column in columns),
            numels=[param.numel() for param in params],
            dtypes=[_DTYPE_CODES[param.dtype] for param in params],
            scalars=(beta1, 1 - beta1, beta2, 1 - beta2, -lr, 1 - lr * group["weight_decay"]),
            threads=torch.get_num_threads(),
        )

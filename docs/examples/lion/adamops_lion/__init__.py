"""Lion as torch.optim has its optimizers: `from adamops_lion.lion import Lion`."""

"""Optimizers with small rules, as another package would write them: Lion, SignSGD without states, and Adagrad with one
unsigned state. Each has a reference, written from its paper or taken from torch, which knows nothing of adamops.
"""

import torch

from adamops.optim.optimizer import RuleOptimizer
from adamops.optim.rule import DecayRates, Rate, Rule, State


class LionRule(Rule):
    """arXiv 2302.06675, Algorithm 2."""

    described = "a Lion optimizer"
    states = (State("exp_avg"),)
    settings = (Rate("lr", "learning rate"), DecayRates("betas", (0.9, 0.99)), Rate("weight_decay"))

    def update(self, k, param, grad, states):
        lr, beta1, beta2, weight_decay = k
        direction = torch.sign(beta1 * states["exp_avg"] + (1 - beta1) * grad)
        states["exp_avg"] = beta2 * states["exp_avg"] + (1 - beta2) * grad
        return param * (1 - lr * weight_decay) - lr * direction


class SignSGDRule(Rule):
    """arXiv 1802.04434, Algorithm 1, with weight decay. It keeps nothing but the step count."""

    described = "a SignSGD optimizer"
    settings = (Rate("lr", "learning rate"), Rate("weight_decay"))

    def update(self, k, param, grad, states):
        lr, weight_decay = k
        return param * (1 - lr * weight_decay) - lr * torch.sign(grad)


class AdagradRule(Rule):
    """torch.optim.Adagrad, whose one state is a sum of squares."""

    described = "an Adagrad optimizer"
    states = (State("sum", signed=False),)
    settings = (Rate("lr", "learning rate"), Rate("lr_decay"), Rate("weight_decay"), Rate("eps", "epsilon value"))

    def scalars(self, hyper, step):
        lr, lr_decay, weight_decay, eps = hyper
        return lr / (1 + (step - 1) * lr_decay), weight_decay, eps

    def update(self, k, param, grad, states):
        step_size, weight_decay, eps = k
        grad = grad + weight_decay * param
        states["sum"] = states["sum"] + grad * grad
        return param - step_size * grad / (states["sum"].sqrt() + eps)


class Lion(RuleOptimizer):
    rule = LionRule()

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, **options):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)


class SignSGD(RuleOptimizer):
    rule = SignSGDRule()

    def __init__(self, params, lr=1e-2, weight_decay=0.0, **options):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)


class Adagrad(RuleOptimizer):
    rule = AdagradRule()

    def __init__(self, params, lr=1e-2, lr_decay=0.0, weight_decay=0.0, eps=1e-10, **options):
        super().__init__(params, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, **options)


class ReferenceLion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                m = self.state[param].setdefault("m", torch.zeros_like(param))
                update = m.lerp(param.grad, 1 - group["betas"][0]).sign_()
                m.lerp_(param.grad, 1 - group["betas"][1])
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


class ReferenceSignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(param.grad.sign(), alpha=-group["lr"])


# By optimizer.
REFERENCES = {Lion: ReferenceLion, SignSGD: ReferenceSignSGD, Adagrad: torch.optim.Adagrad}

"""torch.optim.Adagrad, whose one state is a sum of squares."""

from adamops.optim.optimizer import RuleOptimizer
from adamops.optim.rule import Rate, Rule, State


class AdagradRule(Rule):
    described = "an Adagrad optimizer"
    states = (State("sum", signed=False),)
    settings = (Rate("lr", "learning rate"), Rate("lr_decay"), Rate("weight_decay"), Rate("eps", "epsilon value"))
    ops = {"cpu": "cpu_adagrad", "cuda": "fused_adagrad"}

    def scalars(self, hyper, step):
        lr, lr_decay, weight_decay, eps = hyper
        return lr / (1 + (step - 1) * lr_decay), weight_decay, eps

    def update(self, k, param, grad, states):
        step_size, weight_decay, eps = k
        grad = grad + weight_decay * param
        states["sum"] = states["sum"] + grad * grad
        return param - step_size * grad / (states["sum"].sqrt() + eps)


class Adagrad(RuleOptimizer):
    rule = AdagradRule()

    def __init__(self, params, lr=1e-2, lr_decay=0.0, weight_decay=0.0, eps=1e-10, **options):
        super().__init__(params, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, **options)

"""SignSGD (arXiv 1802.04434, Algorithm 1). It keeps nothing but the step count."""

from adamops.optim.optimizer import RuleOptimizer
from adamops.optim.rule import Rate, Rule, sign


class SignSGDRule(Rule):
    described = "a SignSGD optimizer"
    settings = (Rate("lr", "learning rate"), Rate("weight_decay"))
    ops = {"cpu": "cpu_sign_sgd", "cuda": "fused_sign_sgd"}

    def update(self, k, param, grad, states):
        lr, weight_decay = k
        return param * (1 - lr * weight_decay) - lr * sign(grad)


class SignSGD(RuleOptimizer):
    rule = SignSGDRule()

    def __init__(self, params, lr=1e-2, weight_decay=0.0, **options):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)

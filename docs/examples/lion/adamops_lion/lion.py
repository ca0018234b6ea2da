"""Lion (arXiv 2302.06675, Algorithm 2): its states, settings and update; everything else is adamops'."""

from adamops.optim.optimizer import RuleOptimizer
from adamops.optim.rule import DecayRates, Rate, Rule, State, sign


class LionRule(Rule):
    described = "a Lion optimizer"
    states = (State("exp_avg"),)
    settings = (Rate("lr", "learning rate"), DecayRates("betas", (0.9, 0.99)), Rate("weight_decay"))
    ops = {"cpu": "cpu_lion", "cuda": "fused_lion"}

    def update(self, k, param, grad, states):  # where no op is compiled
        lr, beta1, beta2, weight_decay = k
        direction = sign(beta1 * states["exp_avg"] + (1 - beta1) * grad)
        states["exp_avg"] = beta2 * states["exp_avg"] + (1 - beta2) * grad
        return param * (1 - lr * weight_decay) - lr * direction


class Lion(RuleOptimizer):
    """Lion. The options are those of adamops' optimizers: state_dtype, master_weight_bits, maximize and so on."""

    rule = LionRule()

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)

"""The builders of both rules' ops, which adamops finds by the entry points in pyproject.toml."""

from pathlib import Path

from adamops.op_builder import CPURuleBuilder, CUDARuleBuilder


class _InThisFolder:
    def source_root(self) -> Path:
        return Path(__file__).resolve().parent


class CPUSignSGDBuilder(_InThisFolder, CPURuleBuilder):
    NAME, MODULE = "cpu_sign_sgd", "small_rules._cpu_sign_sgd"
    RULE, RULE_HEADER = "SignSGD", "sign_sgd.h"


class FusedSignSGDBuilder(_InThisFolder, CUDARuleBuilder):
    NAME, MODULE = "fused_sign_sgd", "small_rules._fused_sign_sgd"
    RULE, RULE_HEADER = "SignSGD", "sign_sgd.h"


class CPUAdagradBuilder(_InThisFolder, CPURuleBuilder):
    NAME, MODULE = "cpu_adagrad", "small_rules._cpu_adagrad"
    RULE, RULE_HEADER = "Adagrad", "adagrad.h"


class FusedAdagradBuilder(_InThisFolder, CUDARuleBuilder):
    NAME, MODULE = "fused_adagrad", "small_rules._fused_adagrad"
    RULE, RULE_HEADER = "Adagrad", "adagrad.h"


BUILDERS = [CPUSignSGDBuilder(), FusedSignSGDBuilder(), CPUAdagradBuilder(), FusedAdagradBuilder()]

"""The builders of Lion's ops, which adamops finds by the entry points in pyproject.toml."""

from pathlib import Path

from adamops.op_builder import CPURuleBuilder, CUDARuleBuilder


class CPULionBuilder(CPURuleBuilder):
    NAME, MODULE = "cpu_lion", "adamops_lion._cpu_lion"
    RULE, RULE_HEADER = "Lion", "lion.h"

    def source_root(self) -> Path:
        return Path(__file__).resolve().parent


class FusedLionBuilder(CUDARuleBuilder):
    NAME, MODULE = "fused_lion", "adamops_lion._fused_lion"
    RULE, RULE_HEADER = "Lion", "lion.h"
    source_root = CPULionBuilder.source_root

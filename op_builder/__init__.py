"""What to compile, for which machine, and whether it can be; and how to load the result.

Imports neither torch nor adamops, so that setup.py can use it before anything is installed. docs/building.md has the
layers, each of which imports only those below it.
"""

from .cpu import CPUOpBuilder
from .cpu_adam import CPUAdamBuilder
from .cuda import CUDAOpBuilder
from .fused_adam import FusedAdamBuilder
from .loading import OpBuilder
from .registry import (
    RegisteredOp,
    builtin_builders,
    builtin_ops,
    get,
    load_plugin,
    name_is_taken,
    origin_of,
    plugins,
    registered_ops,
)
from .rules import CPURuleBuilder, CUDARuleBuilder
from .spec import BuildError, Compatibility, CompileUnit, Op, OpUnavailableError
from .torch_adam import TorchAdamBuilder

__all__ = [
    "BuildError",
    "CPUAdamBuilder",
    "CPUOpBuilder",
    "CPURuleBuilder",
    "CUDAOpBuilder",
    "CUDARuleBuilder",
    "Compatibility",
    "CompileUnit",
    "FusedAdamBuilder",
    "Op",
    "OpBuilder",
    "OpUnavailableError",
    "RegisteredOp",
    "TorchAdamBuilder",
    "builtin_builders",
    "builtin_ops",
    "get",
    "load_plugin",
    "name_is_taken",
    "origin_of",
    "plugins",
    "registered_ops",
]

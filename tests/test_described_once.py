"""What stands in Python and in C++ is the same in both: numbers of dtypes and masters, sizes, the order of scalars."""

import re
import shutil

import pytest
import torch
from adamops.op_builder import BuildError, CPUAdamBuilder
from adamops.op_builder.compiler import Compiler
from adamops.op_builder.spec import SHARED_SOURCES

from adamops import op_builder
from adamops.ops.adam.adam import AdamRule, AdamScalars, adam_settings
from adamops.optim.backends.cpu import NativeBackend, StepCall
from adamops.optim.batch import MOST_STEPS
from adamops.optim.pieces import PIECE
from adamops.optim.rule import required
from adamops.optim.state.precision import DTYPES, Master
from adamops.optim.state.quantization import QUANTIZATION_BLOCK

CSRC = SHARED_SOURCES


@pytest.fixture(params=["cpu_adam", "fused_adam"])
def module(request):
    """The CPU op, and the CUDA op that runs on the host."""
    return op_builder.get("cpu_adam").load() if request.param == "cpu_adam" else request.getfixturevalue("cuda_op")


def test_enums_and_sizes(module):
    assert {master.name: master.value for master in Master} == module.MASTERS
    assert [str(dtype) for dtype in DTYPES] == [f"torch.{name}" for name in list(module.DTYPES)[: len(DTYPES)]]
    assert list(module.DTYPES.values()) == list(range(len(module.DTYPES)))
    assert module.QUANTIZATION_BLOCK == QUANTIZATION_BLOCK and module.MOST_STEPS == MOST_STEPS
    assert PIECE % QUANTIZATION_BLOCK == 0


@pytest.mark.smoke
def test_each_dtype_has_the_number_of_the_op():
    backend = NativeBackend(op_builder.get("cpu_adam").load())
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        assert backend._codes([torch.zeros(1, dtype=dtype)]) == [backend.module.DTYPES[name]]
    assert backend._codes([torch.zeros(1, dtype=torch.int8)]) == [backend.module.DTYPES["quantized"]]


def fields_of(struct):
    """The names of the fields of a struct in rules/adam.h, in order."""
    body = re.search(rf"struct {struct} {{(.*?)\n  }};", (CSRC / "rules" / "adam.h").read_text(), re.DOTALL).group(1)
    declarations = re.findall(r"^\s*(?:Number|double) ([\w, ]+);", body, re.MULTILINE)
    return [name for names in declarations for name in re.split(r",\s*", names)]


@pytest.mark.smoke
def test_scalars_are_in_the_order_of_the_struct():
    assert [*AdamScalars._fields] == fields_of("Scalars")
    # The engine's grad_scale comes first.
    assert 1 + len(AdamScalars._fields) == op_builder.get("cpu_adam").load().SCALAR_COUNT


def test_hyper_parameters_are_in_the_order_of_the_struct(module):
    values = {
        "lr": 1.0, "beta1": 0.2, "beta2": 0.3, "eps": 4.0, "weight_decay": 5.0,
        "bias_correction": False, "adamw_mode": True,
    }  # fmt: skip
    assert list(module.HYPER) == fields_of("Hyper") == list(AdamRule.hyper_names) == list(values)
    assert adam_settings(**values).numbers() == tuple(values.values())


def test_states_are_those_of_the_rule(module):
    states = AdamRule.states
    assert [(state.name, state.signed, state.rounding) for state in states] == list(module.STATES)
    assert len(required(states)) == module.LEAST_STATES


def test_a_step_is_passed_in_the_order_of_the_op():
    assert StepCall._fields == op_builder.get("cpu_adam").load().STEP_FIELDS


def test_a_grain_that_splits_quantization_blocks_does_not_compile(tmp_path):
    """With 64, two threads would share a scale, and quantized states would depend on the threads."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    header = tmp_path / "csrc" / "runtime" / "parallel.h"
    text = header.read_text()
    assert "kGrain = 256" in text
    header.write_text(text.replace("kGrain = 256", "kGrain = 64"))

    class Builder(CPUAdamBuilder):
        def source_roots(self):
            return [tmp_path / "csrc"]

    builder = Builder()
    flags = next(unit.flags for unit in builder.compile_units() if unit.source == "python/cpu_module.cpp")
    includes = [
        f"-I{path}" for path in [*builder.include_paths(), *map(str, [op_builder.python_extension.python_headers()])]
    ]
    source = str(builder.locate("python/cpu_module.cpp"))
    with pytest.raises(BuildError, match="quantized states would depend on the threads"):
        Compiler.find().run([*Compiler.COMMON_FLAGS, *builder.cxx_args(), "-fsyntax-only", *flags, *includes, source])

"""Private names of torch stand in one file, and without any of them training gives the same bits or a clear error."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch_without_names import NAMES

import adamops
from adamops import _torch_compat

PACKAGE = Path(adamops.__file__).parent
# Attributes of torch's objects, whatever expression they are read from.
ATTRIBUTES = {"_cdata", "_is_zerotensor", "_local_tensor", "_opt_called", "_spec", "_version", "_dispatch_keys"}
HOOKS = ("_optimizer_", "_global_optimizer_")
# Without these, step_in_backward() is refused.
REFUSED = {"autograd.Variable._execution_engine", "_C._current_graph_task_id"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name, what training gives without it; by "", with all names."""
    command = [sys.executable, str(Path(__file__).with_name("torch_without_names.py"))]
    where = tmp_path_factory.mktemp("without")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=600, check=True)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_without_a_name_training_gives_the_same_bits(results, name):
    steps, in_backward = results[""].split()
    got, got_in_backward = results[name].split(" ", 1)
    assert got == steps, results[name]
    if name in REFUSED:
        assert got_in_backward.startswith("step_in_backward() needs torch._C._current_graph_task_id")
        assert got_in_backward.endswith(f"torch {torch.__version__} lacks one of them; use optimizer.step()")
    else:
        assert got_in_backward == in_backward


def test_this_torch_has_every_name():
    """A fallback that is taken unnoticed would only make steps slower."""
    missing = [name for name, value in vars(_torch_compat).items() if value is None and not name.startswith("__")]
    if _torch_compat.dlpack_exchange_table() is None:
        missing.append("__dlpack_c_exchange_api__")
    assert not missing or torch.__version__.startswith(("2.4", "2.5", "2.6", "2.7", "2.8", "2.9"))
    assert _torch_compat.COUNTS_WRITES and _torch_compat.NODE_CODES and _torch_compat.fsdp_marks_are_known()


def test_steps_that_nobody_watches_are_not_taken_for_watched(tmp_path):
    """In a process of its own: other tests may leave hooks or a profiler."""
    code = """
import torch, adamops
optimizer = adamops.FusedAdam([torch.nn.Parameter(torch.zeros(1))])
print(adamops._torch_compat.is_watched(optimizer))
optimizer.register_step_post_hook(print)
print(adamops._torch_compat.is_watched(optimizer))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\nTrue\n", done.stderr


def private_names(tree):
    """The private names of torch that a module's code uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            if chain[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in chain):
                yield ".".join(chain)
            elif node.attr in ATTRIBUTES or node.attr.startswith(HOOKS):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if name.startswith("_"))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if name in ATTRIBUTES or name.startswith((*HOOKS, "_fsdp", "_is_flat")):
                yield name


def test_nothing_else_uses_private_names():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch_compat.py" and (names := list(private_names(ast.parse(path.read_text()))))
    }
    assert found == {}
    assert list(private_names(ast.parse("x = torch._C.y\nz._version\nfrom torch._utils import a\ngetattr(p, '_spec')")))


def test_without_its_hooks_attributes_a_state_dict_is_the_same(monkeypatch):
    param = torch.nn.Parameter(torch.randn(300))
    optimizer = adamops.FusedAdam([param], state_dtype="8bit")
    param.grad = torch.randn(300)
    optimizer.step()
    expected = optimizer.state_dict()
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved))
    monkeypatch.setattr(_torch_compat, "_STATE_DICT_HOOKS", ("_renamed",))
    assert str(optimizer.state_dict()) == str(expected)
    assert len(seen) == 1


def test_without_its_hooks_attributes_a_step_runs_the_hooks(monkeypatch):
    monkeypatch.setattr(_torch_compat, "_global_pre_hooks", None)
    param = torch.nn.Parameter(torch.randn(3))
    param.grad = torch.randn(3)
    optimizer = adamops.FusedAdam([param])
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    assert called == ["after"]


def test_an_import_that_fails_keeps_its_cause(monkeypatch):
    def fail(name):
        raise AttributeError("module 'torch' has no attribute 'name_of_another_release'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match="adamops.ops.adam cannot be imported: module 'torch' has no") as caught:
        exec("from adamops import FusedAdam")
    assert isinstance(caught.value.__cause__, AttributeError)

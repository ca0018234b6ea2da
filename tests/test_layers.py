"""What may import what: the contracts at the end of pyproject.toml, and no circles anywhere."""

import graphlib
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


@pytest.mark.smoke
def test_no_layer_imports_one_above_it():
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_engine_names_no_rule():
    """Neither its states nor its settings; what adamops.optim needs of them, it asks a Rule for."""
    of_adam = re.compile(r"exp_avg|amsgrad|beta|\bAdam|adamw|adam_w")
    files = sorted((ROOT / "adamops" / "optim").rglob("*.py"))
    lines = [(file, line) for file in files for line in file.read_text().splitlines()]
    assert len(files) > 40 and not [(file.name, line) for file, line in lines if of_adam.search(line)]


def circle(graph):
    """The names of modules that import each other in a circle, functions' imports included; None if there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def imports_of(package, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) - {module} for module in graph.modules}


@pytest.mark.parametrize("package", ["adamops", "op_builder"])
def test_no_modules_import_each_other(package, monkeypatch):
    graph = imports_of(package, monkeypatch)
    assert len(graph) > 15
    assert circle(graph) is None


def test_the_drawing_is_that_of_the_code():
    command = [sys.executable, "ci/draw_imports.py"]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    graphs, *_ = drawn.split("## Lines")
    page = (ROOT / "docs" / "dev" / "imports.md").read_text()
    assert page.split("## Lines")[0] == graphs, "python ci/draw_imports.py > docs/dev/imports.md"


@pytest.mark.smoke
def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


# What the files of each room of csrc may include: files of these rooms, and these files of csrc itself.
MAY_INCLUDE = {
    "rules": {"rules", "host_device.h"},
    "formats": {"formats", "host_device.h"},
    "runtime": {"runtime"},
    "simd": {"formats", "runtime"},
    "cpu": {"cpu", "formats", "rules", "grad_norm.h", "state_format.h", "tensor.h"},
    "cuda": {"cuda", "formats", "rules", "grad_norm.h", "state_format.h", "tensor.h"},
    "python": {"python", "cpu", "cuda", "formats", "rules", "runtime", "grad_norm.h", "tensor.h"},
    "grad_norm.h": {"host_device.h"},
    "host_device.h": set(),
    "state_format.h": {"formats", "rules"},
    "tensor.h": {"formats", "rules"},
}


def test_rooms_of_csrc_include_only_what_they_may_know():
    files = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES]
    assert {path.parts[0] for path in files} == MAY_INCLUDE.keys()
    for path in files:
        included = re.findall(r'^#include "([^"]+)"', (ROOT / "csrc" / path).read_text(), re.MULTILINE)
        rooms = {name.partition("/")[0] for name in included}
        assert rooms <= MAY_INCLUDE[path.parts[0]], f"{path} includes {rooms - MAY_INCLUDE[path.parts[0]]}"


def test_no_torch_header_is_included_in_csrc():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in SOURCES:
            assert not re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text()), path

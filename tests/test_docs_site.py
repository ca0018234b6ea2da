"""The site that Sphinx makes of docs/: it builds without a warning, and its API reference has every public name."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import adamops
import adamops.functional
import adamops.ops.adam

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Links and names that lead nowhere, bad markup and pages outside the navigation are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "doctrees"]
    done = subprocess.run([*command, DOCS, folder / "html"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def documented(site):
    """The names of the API reference, with their kinds."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    return {
        name: kind
        for kind, names in getattr(inventory, "data", inventory).items()
        if kind.startswith("py:")
        for name in names
    }


@pytest.mark.parametrize("module", [adamops, adamops.functional, adamops.offload], ids=lambda module: module.__name__)
def test_the_api_reference_has_every_public_name(documented, module):
    public = {f"{module.__name__}.{name}" for name in module.__all__ if not name.startswith("__")}
    if module is adamops.offload:
        public -= {"adamops.offload.OffloadedAdam"}  # adamops has it
    assert not public - documented.keys()


def test_what_the_api_reference_names_can_be_imported(documented):
    for name, kind in documented.items():
        parts = name.split(".")
        if kind in ("py:attribute", "py:module"):
            parts.pop()  # only objects have it
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ImportError:
                continue
            for part in parts[count:]:
                found = getattr(found, part)
            break


def test_docstrings_describe_the_arguments_that_there_are(documented):
    """Text after a section of a docstring would be taken for an argument, and an argument that has gone would stay."""
    checked = 0
    for name, kind in documented.items():
        module, _, attribute = name.rpartition(".")
        if kind not in ("py:class", "py:function") or attribute in ("CPUAdam", "offload"):
            continue
        found = getattr(importlib.import_module(module), attribute)
        doc = inspect.getdoc(found) or ""
        section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", doc, re.DOTALL | re.MULTILINE)
        if section is None:
            continue
        described = {word for line in re.findall(r"^\S.*$", section[1], re.MULTILINE) for word in line.split(", ")}
        assert described == set(inspect.signature(found).parameters), name
        checked += 1
    assert checked > 8


def test_search_works_offline(site):
    index = (site / "searchindex.js").read_text()
    assert "troubleshooting" in index and "adamw" in index
    for page in site.glob("**/*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"

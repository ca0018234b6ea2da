"""Where this adamops lies, which other one it hides, and which frameworks are there; for the report.

Must work without torch, and imports nothing of what it looks for.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

FRAMEWORKS = ("deepspeed", "transformers", "accelerate", "lightning", "torchao")


def installation() -> dict[str, Any]:
    """The facts, as JSON types: `path` of the package, `hides` the path of an installed one, `hint` what to do then."""
    path = Path(__file__).resolve().parent
    hidden = _hidden(path)
    is_checkout = (path.parent / "setup.py").is_file() and (path.parent / "csrc").is_dir()
    hint = None
    if hidden is not None:
        kind = "the checkout" if is_checkout else "the copy"
        hint = (
            f"Python imports {kind} in {path.parent}, which hides the adamops installed in {hidden.parent}: start "
            "Python in another folder, or call adamops-report"
        )
    return {"path": str(path), "hides": str(hidden) if hidden else None, "hint": hint}


def frameworks() -> dict[str, str]:
    """The versions of those frameworks that are installed."""
    found = {}
    for name in FRAMEWORKS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hidden(path: Path) -> Path | None:
    """The package of an installation that comes after this one on Python's path."""
    for distribution in importlib.metadata.distributions(name="adamops"):
        package = Path(str(distribution.locate_file("adamops"))).resolve()
        if package != path and (package / "__init__.py").is_file():
            return package
    return None

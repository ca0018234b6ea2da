"""What an extension module for this Python needs: its file name, its headers, and the record of its build beside it.

Must not know of ops or compilers.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from typing import Any


def extension_suffix() -> str:
    """The file-name suffix of extensions for this Python."""
    # Not sysconfig's EXT_SUFFIX: it is None for a moment while another thread queries sysconfig for the first time.
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def python_headers() -> Path:
    """The folder of Python.h."""
    import sysconfig  # not at the top: it takes a millisecond, and most processes compile nothing

    return Path(sysconfig.get_paths()["include"])


def pybind11_headers() -> Path | None:
    """The folder of pybind11's headers: from its own package, else the copy bundled with torch; None without either."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(location) / "include"
            if (folder / "pybind11" / "pybind11.h").is_file():
                return folder
    return None


def record_path(extension: Path) -> Path:
    """The path of an extension's record: next to the extension, with the same name for every Python."""
    return extension.with_name(extension.name.split(".")[0] + ".build.json")


def write_record(extension: Path, record: dict[str, Any]) -> None:
    path = record_path(extension)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_record(extension: Path) -> dict[str, Any] | None:
    """The record written when the extension was built or left out; None if it is missing or damaged."""
    try:
        record = json.loads(record_path(extension).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None

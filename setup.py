"""Asks op_builder for the extensions, and finds the packages; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # isolated builds do not have the project's folder on sys.path

from op_builder import builtin_builders  # noqa: E402
from op_builder.build_ext import build_ext, extensions  # noqa: E402

PACKAGES = [*find_packages(include=["adamops", "adamops.*"]), "adamops.csrc", "adamops.op_builder"]

setup(packages=PACKAGES, ext_modules=extensions(builtin_builders()), cmdclass={"build_ext": build_ext})

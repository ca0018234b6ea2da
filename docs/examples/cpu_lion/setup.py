"""Builds the op ahead of time, where that is possible."""

import sys
from pathlib import Path

from adamops.op_builder.build_ext import build_ext, extensions
from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # isolated builds do not see the project's own folder

from cpu_lion.builder import CPULionBuilder  # noqa: E402

setup(ext_modules=extensions([CPULionBuilder()]), cmdclass={"build_ext": build_ext})

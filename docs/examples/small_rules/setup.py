"""Builds the ops ahead of time, where that is possible."""

import sys

from adamops.op_builder.build_ext import build_ext, extensions
from setuptools import setup

sys.path.insert(0, ".")  # isolated builds do not see the project's own folder
from small_rules.builders import BUILDERS  # noqa: E402

setup(ext_modules=extensions(BUILDERS), cmdclass={"build_ext": build_ext})

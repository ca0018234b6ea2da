"""Asks op_builder for the extensions, and finds the packages; everything else is in pyproject.toml."""

import re
import sys
from pathlib import Path

import setuptools

sys.path.insert(0, str(Path(__file__).resolve().parent))  # isolated builds do not have the project's folder on sys.path

from op_builder import builtin_builders  # noqa: E402
from op_builder.build_ext import build_ext, extensions  # noqa: E402

PACKAGES = [*setuptools.find_packages(include=["adamops", "adamops.*"]), "adamops.csrc", "adamops.op_builder"]


def readme_elsewhere(text: str, repository: str | None, version: str) -> str:
    """The README as an index shows it, where no file lies beside it: links lead to the repository, at this version.

    While the repository has no address, the words of a link stay and pictures are left out.
    """

    def link(found: re.Match) -> str:
        picture, words, target = found.groups()
        if re.match(r"https?:|#", target):
            return found[0]
        if repository is None:
            return "" if picture else words
        return f"{picture}[{words}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", link, text)


class Distribution(setuptools.Distribution):
    def parse_config_files(self, *args, **kwargs) -> None:
        super().parse_config_files(*args, **kwargs)
        data = self.metadata
        if data.long_description:
            repository = (data.project_urls or {}).get("Repository")
            data.long_description = readme_elsewhere(data.long_description, repository, data.version)


setuptools.setup(
    packages=PACKAGES,
    ext_modules=extensions(builtin_builders()),
    cmdclass={"build_ext": build_ext},
    distclass=Distribution,
)

"""Object files that are kept between builds in a checkout, so that only what has changed is compiled again.

Must not know of ops, nor how compilers are run. Dates decide nothing: a kept object is used again if its command, the
contents of every file that it was compiled from, and the object itself are what they were.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path


class KeptObjects:
    """A folder of object files, each beside a record of what it was compiled from.

    The record holds the digest of its object. So a half-written file, from a build that was killed or from another
    build at the same time, is never taken for an object.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused: list[str] = []  # the names of objects that were not compiled again
        self._digests: dict[tuple[str, int, int], str] = {}

    def provide(self, output: Path, made_by: Sequence[str], compile_with: Callable[[list[str]], None]) -> None:
        """Puts an object at `output`: the kept one of that name if it is current, else one that is compiled now.

        `made_by` is all that decides what the compiler makes of its input files. `compile_with` compiles to `output`
        with additional flags, for which GCC, Clang and nvcc list the files that they read.
        """
        if self._copy_current(output, made_by):
            self.reused.append(output.name)
            return
        listing = output.with_suffix(".d")
        listing.touch()
        started = listing.stat().st_mtime_ns
        compile_with(["-MD", "-MF", str(listing), "-MT", "object"])
        self._keep(output, made_by, files_listed(listing.read_text()), started)

    def _copy_current(self, output: Path, made_by: Sequence[str]) -> bool:
        try:
            record = json.loads(self._record(output.name).read_text())
            kept = (self.folder / output.name).read_bytes()
            current = (
                record["made_by"] == list(made_by)
                and record["object"] == hashlib.sha256(kept).hexdigest()
                and all(self._digest(name) == digest for name, digest in record["inputs"].items())
            )
        except (OSError, ValueError, KeyError):
            return False
        if current:
            output.write_bytes(kept)
        return current

    def _keep(self, output: Path, made_by: Sequence[str], inputs: list[Path], started: int) -> None:
        """Keeps the object, unless an input changed while the compiler ran, which may have read the former one."""
        try:
            digests = {str(path): self._digest(str(path)) for path in inputs}
            changed = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, inputs)) >= started
        except OSError:  # one was removed, or the listing is not understood
            return
        if changed:
            return
        compiled = output.read_bytes()
        record = {"made_by": list(made_by), "object": hashlib.sha256(compiled).hexdigest(), "inputs": digests}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / output.name).write_bytes(compiled)
        self._record(output.name).write_text(json.dumps(record, indent=2))

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _digest(self, name: str) -> str:
        """Of a file's contents; most headers are inputs of many objects, and are read once."""
        status = Path(name).stat()
        version = name, status.st_mtime_ns, status.st_ctime_ns
        if version not in self._digests:
            self._digests[version] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        return self._digests[version]


def files_listed(listing: str) -> list[Path]:
    """The files in what a compiler wrote for -MD or -M: a rule for make, `target: file file`, with make's escapes."""
    _, _, files = listing.replace("\\\n", " ").partition(":")
    names = re.findall(r"(?:\\ |\S)+", files)
    return [Path(re.sub(r"\\([ #])", r"\1", name).replace("$$", "$")).absolute() for name in names]

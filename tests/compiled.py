"""What tests compile for themselves, kept between runs: in ADAMOPS_TEST_CACHE, by default the user's cache folder.

Entries are addressed by what they are made of. Not for tests whose subject is the build itself. Must not know what is
compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import filelock
from adamops.op_builder.compiler import Compiler
from adamops.op_builder.objects import files_listed

DIGEST = "digest"
DAYS_UNUSED, MOST_BYTES = 30, 2**30  # what is beyond is removed, the least recently used first


def cache_folder() -> Path:
    named = os.environ.get("ADAMOPS_TEST_CACHE", "").strip()
    if named:
        return Path(named).expanduser()
    import platformdirs  # not at the top: ci/gpu.sh names a folder, and needs no more packages than torch and pytest

    return Path(platformdirs.user_cache_dir("adamops-tests", appauthor=False))


def compiled(
    output: str, compiler: Compiler, flags: Sequence[str], includes: Iterable[Path], sources: Iterable[Path]
) -> Path:
    """The file of that name which the compiler makes of the sources. Raises BuildError with the compiler's words."""
    folders = [f"-I{path}" for path in includes]
    sources = list(map(str, sources))

    def inputs() -> Iterator[bytes]:
        with tempfile.TemporaryDirectory() as scratch:
            listing = Path(scratch) / "listing"
            for source in sources:
                compiler.run([*flags, *folders, source, "-M", "-MT", "object", "-MF", str(listing)])
                yield from (path.read_bytes() for path in files_listed(listing.read_text()))

    def make(folder: Path) -> None:
        compiler.run([*flags, *folders, *sources, "-o", str(folder / output)])

    command = "\0".join([compiler.version, *compiler.command, *flags]).encode()
    return made_once(output, [command, *inputs()], make) / output


def made_once(name: str, ingredients: Iterable[bytes], make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled for these ingredients, now or earlier, in this process or in another."""
    digests = b"".join(hashlib.sha256(ingredient).digest() for ingredient in ingredients)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    entry = cache / f"{name}-{hashlib.sha256(digests).hexdigest()[:16]}"
    with filelock.FileLock(cache / f"{name}.lock"):
        if not _is_whole(entry):
            shutil.rmtree(entry, ignore_errors=True)
            _make(entry, cache / f"unfinished-{name}", make)
            _remove_unused(cache)
        os.utime(entry)
    return entry


def _make(entry: Path, unfinished: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    try:
        make(unfinished)
        (unfinished / DIGEST).write_text(_digest_of(unfinished))
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_whole(entry: Path) -> bool:
    try:
        return (entry / DIGEST).read_text() == _digest_of(entry)
    except OSError:
        return False


def _digest_of(entry: Path) -> str:
    """Of the names and contents of all files but those that Python writes when it imports others."""
    digest = hashlib.sha256()
    for path in sorted(path for path in entry.rglob("*") if path.is_file() and path != entry / DIGEST):
        if path.parent.name != "__pycache__":
            digest.update(f"{path.relative_to(entry)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _remove_unused(cache: Path) -> None:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # another process removes or completes an entry at this moment
        for folder in sorted(filter(Path.is_dir, cache.iterdir()), key=_last_use, reverse=True):
            total += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if total > MOST_BYTES or time.time() - _last_use(folder) > DAYS_UNUSED * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def _last_use(folder: Path) -> float:
    return folder.stat().st_mtime

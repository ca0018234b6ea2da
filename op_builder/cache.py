"""Builds an op on the user's machine at its first use, and caches it.

Builds are addressed by content: the folder name holds a hash of everything that went into the build. Two processes
never build the same op at once, and a process that dies mid-build leaves nothing that another would load.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from types import ModuleType

from . import environment
from .compile import SCRATCH_PREFIX, compile_op
from .compiler import Compiler
from .python_extension import extension_suffix, pybind11_headers, read_record, write_record
from .spec import BuildError, OpSpec


def load(spec: OpSpec) -> ModuleType:
    """The op's module from the cache, built first if necessary. Raises BuildError or ImportError."""
    compatible = spec.compatibility()
    if not compatible:
        raise BuildError(compatible.reason)
    extension = cached_path(spec)
    _build_unless_there(spec, extension)
    # A unique name, because pybind11 returns the module that it has already created under a name.
    return _import_file(f"{extension.parent.name}.{spec.MODULE.rpartition('.')[2]}", extension)


def is_cached(spec: OpSpec) -> bool:
    """Whether load() would find an intact build of the op in the cache."""
    return _is_whole(cached_path(spec))


def cached_path(spec: OpSpec) -> Path:
    """The path in the cache of this op's build for this machine, whether or not it exists."""
    name = spec.MODULE.rpartition(".")[2]
    return environment.cache_dir() / f"{spec.NAME}-{_fingerprint(spec)}" / f"{name}{extension_suffix()}"


def _build_unless_there(spec: OpSpec, extension: Path) -> None:
    _make_private_folder(extension.parent.parent)
    _make_private_folder(extension.parent)
    if _is_whole(extension):
        return
    import filelock

    try:
        with filelock.FileLock(extension.parent / "lock"):
            if not _is_whole(extension):
                _build(spec, extension)
    except (OSError, BuildError) as error:
        if isinstance(error, BuildError) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise BuildError(
            f"the build cannot be written to {extension.parent}: {error}; set ADAMOPS_CACHE_DIR (or TMPDIR, where "
            "compilers keep files of their own)"
        ) from error


def _build(spec: OpSpec, extension: Path) -> None:
    """Builds the op under the caller's lock, and says so. The extension appears atomically, after its record."""
    started = time.monotonic()
    print(f"adamops: building {spec.NAME} for this machine, once ...", end=" ", file=sys.stderr, flush=True)
    for left_by_a_killed_build in extension.parent.glob("unfinished-*"):
        left_by_a_killed_build.unlink()
    for left_by_a_killed_build in extension.parent.glob(f"{SCRATCH_PREFIX}*/"):
        shutil.rmtree(left_by_a_killed_build, ignore_errors=True)
    unfinished = extension.with_name(f"unfinished-{os.getpid()}.so")
    try:
        # Next to the result, not in the system's temporary folder, where nobody would clean up after a killed build.
        record = compile_op(spec, unfinished, scratch_root=extension.parent)
        write_record(extension, {**record, "sha256": _digest(unfinished)})
        unfinished.replace(extension)
    except BaseException:
        print("failed", file=sys.stderr, flush=True)
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _fingerprint(spec: OpSpec) -> str:
    compiler = Compiler.find()
    units = spec.compile_units()
    ingredients = [
        spec.NAME,
        compiler.version if compiler else "",
        compiler.machine if compiler else "",
        extension_suffix(),
        _pybind11_version(),
        list(spec.toolchain()),
        [os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")],
        [*Compiler.COMMON_FLAGS, *Compiler.LINK_FLAGS, *spec.cxx_args(), *spec.extra_ldflags()],
        [(unit.object_name, unit.flags) for unit in units],
    ]
    digest = hashlib.sha256(json.dumps(ingredients).encode())
    for name in sorted({unit.source for unit in units} | set(spec.headers())):
        digest.update(name.encode())
        digest.update(spec.locate(name).read_bytes())
    return digest.hexdigest()[:16]


def _pybind11_version() -> list[str]:
    headers = pybind11_headers()
    common = (headers / "pybind11" / "detail" / "common.h").read_text() if headers else ""
    return re.findall(r"define PYBIND11_VERSION_(?:MAJOR|MINOR|PATCH|MICRO)\s+(\S+)", common)


def _make_private_folder(folder: Path) -> None:
    """Creates the folder. Raises BuildError if another user could put code there for this user to run."""
    try:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):  # not mkdir(parents=True), whose parents would get the umask's mode
            parent.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be used: {error}; set ADAMOPS_CACHE_DIR") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"the cache folder {folder} belongs to, or may be written by, other users, who could put code there; "
            "make it yours alone (chmod 700) or set ADAMOPS_CACHE_DIR"
        )


def _is_whole(extension: Path) -> bool:
    """Whether the file is what was built. Loading one that a full disk or a crash truncated may kill the process."""
    record = read_record(extension)
    try:
        return record is not None and record.get("sha256") == _digest(extension)
    except OSError:
        return False


def _digest(extension: Path) -> str:
    return hashlib.sha256(extension.read_bytes()).hexdigest()


def _import_file(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module

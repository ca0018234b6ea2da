"""The CUDA compiler: finds it, and asks what it knows. Must not know of ops."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Nvcc(NamedTuple):
    """A CUDA compiler, with what it reports about itself."""

    path: str
    version: str
    library_folders: tuple[str, ...]
    known: tuple[str, ...]  # architectures, such as "90"

    @classmethod
    def find(cls) -> Nvcc | None:
        """The nvcc in $CUDA_HOME if that is set, else the first on PATH or in NVIDIA's wheels; None if none runs."""
        import sysconfig  # not at the top: it takes a millisecond, and most processes compile nothing

        home = os.environ.get("CUDA_HOME", "").strip()
        wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
        candidates = (
            [Path(home) / "bin" / "nvcc"]
            if home
            else [Path(shutil.which("nvcc") or ""), *sorted(wheels.glob("*/bin/nvcc"), reverse=True)]
        )
        return next((found for path in candidates if path.is_file() and (found := cls._ask(str(path)))), None)

    @classmethod
    @functools.cache
    def _ask(cls, path: str) -> Nvcc | None:
        version = re.search(r"release ([\d.]+)", output_of(path, "--version"))
        # A dry run shows where the toolkit is, even if `path` is a wrapper script.
        folders = re.search(r"LIBRARIES=(.*)", output_of(path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "x.o"))
        known = re.findall(r"sm_(\d+)\b", output_of(path, "--list-gpu-code"))
        if not version or not known:
            return None
        found = re.findall(r'"-L([^"]+)"', folders.group(1)) if folders else []
        usual = Path(path).resolve().parent.parent
        found += [str(usual / "lib64"), str(usual / "lib")]
        return cls(path, version.group(1), tuple(dict.fromkeys(map(os.path.normpath, found))), tuple(known))

    def static_runtime(self) -> str | None:
        """The folder of the static CUDA runtime library; None if it is missing."""
        return next(
            (folder for folder in self.library_folders if (Path(folder) / "libcudart_static.a").is_file()), None
        )

    def missing(self) -> str:
        """What the toolkit lacks to build an extension; empty if nothing. Each of NVIDIA's wheels has only a part."""
        if self.static_runtime() is None:
            return "libcudart_static.a (install cuda-cudart-dev, or the wheel nvidia-cuda-runtime)"
        headers = [Path(folder).parent / "include" for folder in self.library_folders]
        half = next((path for folder in headers if (path := folder / "cuda_fp16.h").is_file()), None)
        if half is None:
            return "cuda_fp16.h (install cuda-cudart-dev, or the wheel nvidia-cuda-runtime)"
        includes_target = "<nv/target>" in half.read_text(errors="replace")
        found = any((folder / name).is_file() for folder in headers for name in ("nv/target", "cccl/nv/target"))
        if includes_target and not found:
            return "nv/target (install cuda-cccl, or the wheel nvidia-cuda-cccl)"
        return ""


def output_of(*command: str) -> str:
    """What a command prints, also as errors; nothing if it does not run, or takes longer than a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr

"""Checks release wheels as files, before anything is installed: python ci/check_wheel.py WHEEL ...

Checks name and tags, size, metadata, contents, and what the extensions require of the system. Needs binutils.
"""

import email.parser
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 5_000_000
NEWEST_GLIBC = (2, 28)  # that of the oldest system in wide use, RHEL 8
# The only libraries that an extension may need: no OpenMP runtime, no CUDA library, no libstdc++.
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
BEST_TARGETS = {"x86_64": "avx512", "aarch64": "neon"}
OPS = ("cpu_adam", "fused_adam")


class Failure(Exception):
    """A wheel failed a check; the message says which."""


def require(fact: object, message: str) -> None:
    if not fact:
        raise Failure(message)


def check_metadata(archive: zipfile.ZipFile, info: str) -> None:
    metadata = email.parser.Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    require(metadata["License-Expression"] == "MIT", f"the license is {metadata['License-Expression']}")
    require(f"{info}/licenses/LICENSE" in archive.namelist(), "LICENSE is not in the wheel")
    require(metadata["Requires-Python"] == ">=3.10", f"Requires-Python is {metadata['Requires-Python']}")
    require("Typing :: Typed" in metadata.get_all("Classifier", []), "there is no classifier for types")
    require("adamops/py.typed" in archive.namelist(), "there is no py.typed")
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    require("torch>=2.4" in needed, f"it needs {needed}")
    require(metadata.get_payload().startswith("# adamops"), "the description is not the README")


def check_contents(archive: zipfile.ZipFile) -> None:
    outside = [name for name in archive.namelist() if not re.match(r"adamops(-[^/]+\.dist-info)?/", name)]
    require(not outside, f"outside of the package: {outside}")
    bundled = [name for name in archive.namelist() if ".libs/" in name or ("omp" in name and ".so" in name)]
    require(not bundled, f"bundled libraries: {bundled}")
    for op in OPS:
        text = archive.read(f"adamops/_native/{op}.build.json").decode()
        record = json.loads(text)
        require(record["built"], f"{op} is not built: {record.get('reason')}")
        require(not re.search(r'[" =](/[a-z]+/)', text), f"the record of {op} holds a path:\n{text}")
        if op == "cpu_adam":
            best = BEST_TARGETS.get(record["machine"])
            require(record["targets"][0] == best and not record["targets_dropped"], f"SIMD targets: {record}")
        else:
            require(len(record["architectures"]) >= 7, f"CUDA architectures: {record['architectures']}")


def check_extension(name: str, contents: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(contents)
        file.flush()
        tables = subprocess.run(
            ["readelf", "--wide", "--dynamic", "--version-info", "--section-headers", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        symbols = subprocess.run(
            ["nm", "--dynamic", "--defined-only", file.name], check=True, capture_output=True, text=True
        ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tables)
    foreign = [library for library in needed if not SYSTEM_LIBRARIES.fullmatch(library)]
    require(not foreign, f"{name} needs {foreign}")
    newest = max(tuple(map(int, version.split("."))) for version in re.findall(r"Name: GLIBC_([\d.]+)", tables))
    require(newest <= NEWEST_GLIBC, f"{name} needs glibc {newest}")
    require(" .symtab" not in tables and ".debug_info" not in tables, f"{name} is not stripped")
    offered = [line.split()[-1] for line in symbols.splitlines()]
    expected = [f"PyInit_{Path(name).name.split('.')[0]}"]
    require(offered == expected, f"{name} offers {offered[:5]}, expected {expected}")


def check(path: Path) -> None:
    name, version, python, abi, platforms = path.name.removesuffix(".whl").split("-")
    require(name == "adamops" and python == abi, f"the file name is {path.name}")
    numbers = [tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)", platforms)]
    require(numbers and min(numbers) <= NEWEST_GLIBC, f"the platform tag is {platforms}")
    size = path.stat().st_size
    require(size <= MOST_BYTES, f"{size:,} bytes are more than {MOST_BYTES:,}")
    with zipfile.ZipFile(path) as archive:
        require(archive.testzip() is None, "the archive is damaged")
        check_metadata(archive, f"{name}-{version}.dist-info")
        check_contents(archive)
        extensions = [entry for entry in archive.namelist() if entry.endswith(".so")]
        require(len(extensions) == len(OPS), f"extensions: {extensions}")
        for entry in extensions:
            check_extension(entry, archive.read(entry))
    print(f"{path.name}: right; {size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        try:
            check(Path(argument))
        except Failure as failure:
            sys.exit(f"{argument}: {failure}")

"""Lays out the package in a folder as an installation would, with its ops built for this machine: `stage.py FOLDER`.

For machines without pip's build tools. Needs a C++ compiler, nvcc for the CUDA op, and pybind11's headers, of which
torch bundles a copy. Put the folder on PYTHONPATH to use it.
"""

import importlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(folder: Path) -> int:
    package = folder / "adamops"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.build.json")
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("adamops", package), ("op_builder", package / "op_builder"), ("csrc", package / "csrc")):
        shutil.copytree(ROOT / source, target, ignore=ignore)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the folder may have been on sys.path before it existed
    op_builder = importlib.import_module("adamops.op_builder")
    compile_op = importlib.import_module("adamops.op_builder.compile").compile_op
    write_record = importlib.import_module("adamops.op_builder.python_extension").write_record
    status = 0
    for name in ("cpu_adam", "fused_adam"):
        builder = op_builder.get(name)
        compatible = builder.compatibility()
        if not compatible:
            print(f"{name}: cannot be built: {compatible.reason}")
            status = 1
            continue
        output = builder.prebuilt_path()
        record = compile_op(builder, output)
        write_record(output, record)
        kinds = record.get("architectures") or record.get("targets")
        print(f"{name}: built for {' '.join(kinds)} ({output.stat().st_size / 1e6:.1f} MB)")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))

"""Makes fake distributions that offer op builders or backends, for tests."""

import os


def python_path(folder):
    """A PYTHONPATH with the folder before what is there already."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def offer(folder, name, code, target, distribution="fake-ops", group="adamops.op_builders"):
    """Writes a module and a distribution with an entry point; returns the environment that makes Python find them."""
    module = target.split(":")[0]
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    with (info / "entry_points.txt").open("a") as file:
        if not file.tell():
            file.write(f"[{group}]\n")
        file.write(f"{name} = {target}\n")
    return {**os.environ, "PYTHONPATH": python_path(folder)}


def offer_installation(folder):
    """Makes a folder look as if adamops 9 were installed in it."""
    (folder / "adamops").mkdir(parents=True)
    (folder / "adamops" / "__init__.py").touch()
    info = folder / "adamops-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adamops\nVersion: 9\n")


GOOD = """
from adamops.op_builder import Compatibility, OpBuilder

class Builder(OpBuilder):
    NAME = "good_op"
    MODULE = "json"
    def sources(self): return []
    def compatibility(self): return Compatibility(True, "always")
    def is_prebuilt(self): return True
    def load_prebuilt(self):
        import json
        return json
    def build_record(self): return None
"""

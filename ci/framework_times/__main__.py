"""Prints step times under each framework, with adamops and with what users have today: `python ci/framework_times`.

Every other module here has a function measure(), which times implementations in rounds in its own process, and returns
the median milliseconds of each by case. A framework that cannot be measured here, for example because it is not
installed, is listed with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__")
OURS = "adamops"


def main() -> None:
    """Measures every framework, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("frameworks", nargs="*", default=NAMES, help=f"which to measure: {', '.join(NAMES)}")
    args = parser.parse_args()
    sys.path[0] = str(FOLDER.parent)  # not this folder, whose modules have the frameworks' names
    table = Table("framework", "case", "implementation", "ms a step", "speed of adamops")
    for column in table.columns[3:]:
        column.justify = "right"
    for name in args.frameworks:
        try:
            measure = importlib.import_module(f"framework_times.{name}").measure
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                cases = pool.submit(measure).result()
        except Exception as error:  # a framework may be missing, lack a dependency, or crash
            table.add_row(name, f"not measured: {error}")
            continue
        for case, medians in cases.items():
            ours = next(milliseconds for implementation, milliseconds in medians.items() if OURS in implementation)
            for implementation, milliseconds in medians.items():
                ratio = "" if OURS in implementation else f"{milliseconds / ours:.2f} x"
                table.add_row(name, case, implementation, f"{milliseconds:.2f}", ratio)
            table.add_section()
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    main()

"""The scripts in docs/frameworks, as the tests run them."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"


def script_of(name: str) -> str:
    """The first Python block of docs/frameworks/<name>.md."""
    found = re.search(r"^```python\n(.*?)^```$", (PAGES / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"docs/frameworks/{name}.md has no block of Python"
    return found[1]

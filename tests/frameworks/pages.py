"""The scripts on the pages of docs/frameworks, for the tests that run them."""

from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"


def script_of(name: str) -> str:
    """The first block of Python on a page, which is a complete script."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    _, found, rest = page.partition("```python\n")
    script, end, _ = rest.partition("```")
    if not (found and end):
        raise ValueError(f"docs/frameworks/{name}.md has no block of Python")
    return script

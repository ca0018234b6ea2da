"""Pages of Markdown as a repository shows them: links lead somewhere, the first pages' code runs, messages are ours."""

import ast
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(page for page in DOCS.glob("**/*.md") if "build" not in page.parts)])


def prose(page):
    """A page without its blocks of code and what is between backticks."""
    text = re.sub(r"^(`{3,}).*?^\1`*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.add(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "``", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if ":" in link:
            parts = urllib.parse.urlsplit(link)
            assert parts.scheme == "https" and "." in parts.netloc, f"{link} is no address of another site"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{link} does not exist"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_index_links_what_its_navigation_has():
    text = (DOCS / "index.md").read_text()
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    navigated = {line for block in blocks for line in block.splitlines() if line and not line.startswith(":")}
    linked = {link.removesuffix(".md") for link in re.findall(r"\]\(([^)]+\.md)\)", text)}
    of_frameworks = {page for page in navigated if page.startswith("frameworks/")}
    assert navigated - of_frameworks == linked - of_frameworks and "frameworks/README" in linked


# Code ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index", "getting-started", "faq", "troubleshooting"])
def test_the_code_of_a_page_runs(name, tmp_path):
    """The blocks of a page, one after another, as one script."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    if not blocks:
        pytest.skip("the page has no blocks of Python")
    script = "import sys, torch\nsys.path[:0] = " + repr([p for p in sys.path if p]) + "\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script + "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# Messages -----------------------------------------------------------------------------------------------------------


def template(node):
    """The text of a message, with … for each part that is inserted; None if it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [template(node.left), template(node.right)]
        return None if sides == [None, None] else "".join(side or "…" for side in sides)
    return None


def texts():
    """All texts of the sources of Python and C++, in which messages are."""
    found = set()
    for path in [*ROOT.glob("adamops/**/*.py"), *ROOT.glob("op_builder/*.py")]:
        found |= {text for node in ast.walk(ast.parse(path.read_text())) if (text := template(node))}
    for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp")]:
        found |= set(re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text()))
    return {" ".join(text.split()) for text in found}


def quoted_messages():
    """The messages on the page: what is bold and in backticks."""
    page = (DOCS / "troubleshooting.md").read_text()
    return [" ".join(found.split()) for found in re.findall(r"\*\*`+ ?(.*?) ?`+\*\*", page, re.DOTALL)]


def is_in(message, text):
    """Whether a message, with … for what is inserted or left out, is a part of a text."""
    return re.search(".*?".join(re.escape(part) for part in message.split("…")), text) is not None


def test_messages_on_the_page_are_in_the_sources():
    sources, messages = texts(), quoted_messages()
    assert len(messages) > 100
    assert not [message for message in messages if len(re.findall(r"\w\w+", message)) < 3], "too short to find anything"
    gone = [message for message in messages if not any(is_in(message, text) for text in sources)]
    assert not gone, "messages that no source has; quote them with … for what is inserted"


# Errors between the parts of adamops, which users do not see, and of command lines.
NOT_FOR_USERS = ("__main__.py", "_op_facts.py", "bench.py", "pieces.py", "plugin_process.py")


def messages_raised():
    """Each message that a function raises or warns of, with its place; not those that are put together elsewhere."""
    for path in sorted([*ROOT.glob("adamops/**/*.py"), *ROOT.glob("op_builder/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            is_warning = isinstance(call, ast.Call) and ast.unparse(call.func) in ("warnings.warn", "_warn")
            if isinstance(call, ast.Call) and (isinstance(node, ast.Raise) or is_warning) and call.args:
                text = template(call.args[0])
                if text and re.search(r"\w \w", text.replace("…", "")) and path.name not in NOT_FOR_USERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", " ".join(text.split())


def test_messages_in_the_sources_are_on_the_page():
    messages = quoted_messages()
    missing = [f"{where}: {text}" for where, text in messages_raised() if not any(is_in(m, text) for m in messages)]
    assert not missing, "\n".join(missing)

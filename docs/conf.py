"""How Sphinx builds the docs into a site: `python -m sphinx -W --keep-going docs site`. Needs the extra `docs`.

tests/test_docs_site.py builds it too. The pages are plain Markdown for GitHub, and stay so: what Sphinx needs besides
is done here.
"""

import os
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which Sphinx needs there

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import adamops  # noqa: E402

project = "adamops"
author = "the adamops developers"
copyright = "2026, the adamops developers"
version = release = adamops.__version__
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
REPOSITORY = URLS.get("Repository", "").rstrip("/")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples/*/build", "_build"]
nitpicky = True  # a name in the API reference that leads nowhere is an error

# Markdown, as GitHub reads it
myst_heading_anchors = 3  # the anchors that links in the pages use
myst_links_external_new_tab = False

# The API reference
default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what arguments may be; signatures show the defaults
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = False  # arguments that are described together stay together
napoleon_use_rtype = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"adamops {release}"
html_static_path = ["_static"]
html_css_files = ["adamops.css"]
if REPOSITORY:  # "edit this page"
    html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_copy_source = False
html_show_sphinx = False

# Pages that include a file of the repository's root.
PAGE_OF = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security"}


def link_outside(app, doctree):
    """Links to files and folders that are no page: to the page that includes them, to the README inside, or to the
    repository. While that has no address, the words of the link stay.

    A link to what does not exist is left as it is, and so fails.
    """
    document = app.env.docname
    for node in list(doctree.findall(addnodes.pending_xref)) + list(doctree.findall(addnodes.download_reference)):
        if node.get("reftype") != "myst":
            continue
        path = node["reftarget"].partition("#")[0]
        if node.get("refdomain") == "doc":
            path = f"/{path}.md"
        target = Path(os.path.normpath(app.env.relfn2path(path, document)[1]))
        if not target.exists() or not target.is_relative_to(ROOT):
            continue
        page = PAGE_OF.get(str(target.relative_to(ROOT)))
        if target.is_dir() and app.env.path2doc(target / "README.md") in app.env.found_docs:
            page = app.env.path2doc(target / "README.md")
        if page is not None:
            node.replace_self(
                addnodes.pending_xref(
                    "",
                    *node.children,
                    refdomain="doc",
                    reftype="myst",
                    reftarget=page,
                    reftargetid=None,
                    refdoc=document,
                    refexplicit=True,
                )
            )
        elif app.env.path2doc(target) not in app.env.found_docs:
            address = f"{REPOSITORY}/blob/main/{target.relative_to(ROOT)}"
            words = node.children
            node.replace_self(nodes.reference("", "", *words, refuri=address) if REPOSITORY else words)


def keep_units(app, doctree):
    """`1.5 ×`, `0.4 %` and `7.1 M` stay on one line: tables have many of them in narrow columns."""
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.literal | nodes.literal_block):
            kept = re.sub(r"(?<=\d) (?=[×%]|M\b)", "\u00a0", text)
            if kept != text:
                text.parent.replace(text, nodes.Text(kept))


def setup(app):
    app.add_lexer("mermaid", TextLexer)  # GitHub draws these graphs; the site shows their text
    app.connect("doctree-read", link_outside)
    app.connect("doctree-read", keep_units)

"""What a project has besides code says one thing in all places: version, Pythons, addresses, licence, keywords."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import adamops

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs a git checkout")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = (ROOT / "CITATION.cff").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def cited(field):
    """A field of CITATION.cff."""
    return re.search(rf"^{field}: (.*)$", CITATION, re.MULTILINE)[1]


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "adamops.__version__"}
    assert cited("version") == adamops.__version__


def test_the_changelog_has_the_version_once_it_is_released():
    first, *released = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "Unreleased"
    assert not released or released[0].startswith(adamops.__version__)


def test_licence_and_keywords_are_the_same_everywhere():
    assert cited("license") == PROJECT["project"]["license"] == "MIT"
    assert cited("keywords") == f"[{', '.join(PROJECT['project']['keywords'])}]"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_pythons_declared_are_those_that_have_trained():
    """A row of the table in docs/wheels.md whose wheel has trained with a torch; one without is not declared."""
    rows = re.findall(
        r"^\| adamops .*x86_64 \| (3\.\d+)\S* \| (\S+) \|.*$", (ROOT / "docs/wheels.md").read_text(), re.MULTILINE
    )
    trained = {python for python, torch in rows if torch != "none"}
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    declared = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert set(declared) == trained and len(declared) == len(trained) > 3
    assert PROJECT["project"]["requires-python"] == f">={declared[0]}"


def test_the_cuda_declared_is_the_one_that_wheels_are_built_with():
    (declared,) = [name for name in PROJECT["project"]["classifiers"] if "NVIDIA CUDA" in name]
    (built,) = set(re.findall(r"NVIDIA's wheels of CUDA (\d+)\.", (ROOT / "ci" / "wheel.sh").read_text()))
    assert declared == f"Environment :: GPU :: NVIDIA CUDA :: {built}"


def test_every_address_of_the_project_is_a_declared_one():
    """Without [project.urls] there is none: an address that is made up would lead to somebody else."""
    urls = set(PROJECT["project"].get("urls", {}).values())
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *FORMS, ROOT / "CITATION.cff", ROOT / "docs" / "conf.py"]
    for page in pages:
        for found in re.findall(r"https?://[^\s)\"'<>`]*adamops[^\s)\"'<>`]*", page.read_text()):
            is_ours = found.startswith(("https://pypi.org/", *urls))
            assert is_ours, f"{page.relative_to(ROOT)} has {found}; [project.urls] has {sorted(urls)}"


def test_commands_of_the_installation_exist():
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_issues_come_with_the_report():
    assert [form.name for form in FORMS] == ["bug.yml", "feature.yml"]
    for form in FORMS:
        assert "python -m adamops.report" in form.read_text()


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-issue-forms", FORMS),
        ("github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_for_others_are_valid(schema, paths):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_source_distribution_has_the_files_of_the_project():
    words = (ROOT / "MANIFEST.in").read_text().split()
    for name in ("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"):
        assert name in words and (ROOT / name).is_file()


# The README on an index ---------------------------------------------------------------------------------------------


def description(folder, repository=None):
    """The long description of a build from a copy of the sources, which declares an address or has none."""
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "op_builder", folder / "op_builder", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "adamops").mkdir()
    shutil.copy(ROOT / "adamops" / "__init__.py", folder / "adamops" / "__init__.py")
    declared = re.sub(
        r"^\[project\.urls\].*?(?=^\[)", "", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    urls = f'[project.urls]\nRepository = "{repository}"\n\n' if repository else ""
    (folder / "pyproject.toml").write_text(declared.replace("[project.scripts]", f"{urls}[project.scripts]"))
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (metadata,) = folder.glob("*.dist-info/METADATA")
    return metadata.read_text().partition("\n\n")[2]


def as_shown(text):
    """The targets of links and pictures in what PyPI would show, without those of headings to themselves."""
    html = pytest.importorskip("readme_renderer.markdown").render(text)
    return re.findall(r'<a href="([^#"][^"]*)"', html), re.findall(r'<img[^>]* src="([^"]*)"', html)


def test_with_an_address_the_readmes_links_lead_to_the_repository(tmp_path):
    ours = "https://example.com/adamops"
    links, pictures = as_shown(description(tmp_path, f"{ours}/"))
    files = [link.removeprefix(f"{ours}/blob/v{adamops.__version__}/") for link in links]
    files += [picture.removeprefix(f"{ours}/raw/v{adamops.__version__}/") for picture in pictures]
    assert len(pictures) == 2 and len(files) > 20
    for file in files:
        assert (ROOT / file.partition("#")[0]).exists(), file


def test_without_an_address_no_link_of_the_readme_leads_nowhere(tmp_path):
    text = description(tmp_path)
    links, pictures = as_shown(text)
    assert not pictures and all(link.startswith("https:") for link in links), links
    readme = (ROOT / "README.md").read_text()
    words = re.sub(r"!\[[^]]*\]\([^)]*\)", "", readme)
    assert text.strip() == re.sub(r"\[([^]]*)\]\((?!https:)[^)]*\)", r"\1", words).strip()


def test_the_address_is_the_same_everywhere():
    urls = PROJECT["project"].get("urls")
    if urls is None:
        assert "repository-code" not in CITATION
    else:
        assert cited("repository-code").strip('"') == urls["Repository"]

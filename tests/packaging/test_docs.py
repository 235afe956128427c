"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fisher_lab.config import help, paths
from fisher_lab.config.validate import all_keys

ROOT = paths.root()
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "sweeps").glob("*.md")]
)


TESTS = ROOT / "tests"


def test_the_page_of_the_configuration_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == help.markdown(), "run python scripts/document_configuration.py"


def test_every_key_is_on_it():
    page = help.markdown()
    assert [key for key in all_keys() if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_overrides_in_examples_are_valid(page: Path):
    from fisher_lab import cli
    from fisher_lab.config import compose

    lines = re.findall(r"^(?:\$ )?python -m fisher_lab(.*)$", page.read_text(), re.MULTILINE)
    commands = [line.partition("#")[0].split() for line in lines]
    with cli.config_loader(cli._parse([])) as loader:
        for words in commands:
            overrides = [word.strip("'\"") for word in words if "=" in word and word[0] != "-"]
            compose.check(loader, overrides, multirun="-m" in words)
    assert all(isinstance(words, list) for words in commands)


def test_sections_of_the_mathematics_that_docstrings_cite_exist():
    page = (ROOT / "docs" / "math.md").read_text()
    sections = {int(number) for number in re.findall(r"^## (\d+)\. ", page, re.MULTILINE)}
    assert sections == set(range(1, 10))
    for file in (ROOT / "fisher_lab").rglob("*.py"):
        for cited in re.findall(r"math\.md``?,? section (\d+)", file.read_text()):
            assert int(cited) in sections, f"{file.name} cites section {cited}"


def modules_of_the_tree(page: str) -> set[str]:
    """The files that the tree in docs/architecture.md names, with their folders."""
    tree = page.partition("```\n")[2].partition("```")[0]
    folder, files = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            files.add(folder + name)
        else:
            folder = name
    return files


def test_every_module_is_named_in_the_architecture_and_nothing_else_is():
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = {
        file.relative_to(ROOT).as_posix()
        for top in ("fisher_lab", "hydra_plugins")
        for file in (ROOT / top).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules_of_the_tree(page) == modules


def test_every_path_in_the_architecture_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    paths_named = set(re.findall(r"`([\w/*]+(?:\.py|\.md|/))`", page))
    package = ROOT / "fisher_lab"
    bases = (ROOT, package, package / "curvature", package / "curvature" / "kfac")
    paths_named -= {p for p in paths_named if p.startswith("test_") and any(TESTS.rglob(p))}
    lost = [p for p in paths_named if not any(any(base.glob(p.rstrip("/"))) for base in bases)]
    assert lost == []
    assert len(paths_named) > 30

"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fisher_lab.config import help, paths
from fisher_lab.config.validate import all_keys
from fisher_lab.results import stats
from fisher_lab.results.hypotheses import TYPES, Hypothesis, parse
from fisher_lab.results.values import parse_value

ROOT = paths.root()
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "sweeps").glob("*.md")]
)
TESTS = ROOT / "tests"


def test_the_page_of_the_configuration_is_up_to_date_and_has_every_key():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == help.markdown(), "run python scripts/document_configuration.py"
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
    assert sections == set(range(1, 12))
    for file in (ROOT / "fisher_lab").rglob("*.py"):
        for cited in re.findall(r"math\.md``?,? section (\d+)", file.read_text()):
            assert int(cited) in sections, f"{file.name} cites section {cited}"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_module_is_named_in_the_architecture_and_nothing_else_is():
    modules = {
        file.relative_to(ROOT).as_posix()
        for top in ("fisher_lab", "hydra_plugins")
        for file in (ROOT / top).rglob("*.py")
        if file.name != "__init__.py"
    }
    tree = ARCHITECTURE.partition("```\n")[2].partition("```")[0]
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            named.add(folder + name)
        else:
            folder = name
    assert named == modules


def test_every_path_in_the_architecture_exists():
    paths_named = set(re.findall(r"`([\w/*]+(?:\.py|\.md|/))`", ARCHITECTURE))
    package = ROOT / "fisher_lab"
    bases = (ROOT, package, package / "curvature", package / "curvature" / "kfac")
    paths_named -= {p for p in paths_named if p.startswith("test_") and any(TESTS.rglob(p))}
    lost = [p for p in paths_named if not any(any(base.glob(p.rstrip("/"))) for base in bases)]
    assert lost == []
    assert len(paths_named) > 30


RESULTS = (ROOT / "docs" / "results.md").read_text()


def stated() -> dict[str, list[Hypothesis]]:
    """The claims of every sweep file that states some."""
    files = sorted((ROOT / "sweeps").glob("*.yaml"))
    claims = {file.stem: yaml.safe_load(file.read_text()).get("claims") or [] for file in files}
    return {name: list(map(parse, some)) for name, some in claims.items() if some}


def test_the_claims_of_the_page_are_claims():
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", RESULTS, re.DOTALL)]
    claims = [claim for block in blocks for claim in map(parse, block["claims"])]
    assert len(blocks) >= 7
    assert {c.type for c in claims} >= {"equivalent", "stable", "faster", "matches", "share"}
    assert all(claim.text.endswith(".") for claim in claims)


def test_every_type_is_described():
    assert [kind for kind in TYPES if f"`{kind}`" not in RESULTS] == []


def test_the_seeds_of_a_sweep_can_settle_what_is_to_fail():
    """A claim that could not hold even if every run of its cell failed is no claim."""
    settled = 0
    for name, claims in stated().items():
        sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
        for claim in (c for c in claims if c.type == "fails"):
            runs = len(str(sweep["params"]["seed"]).split(","))
            low, _ = stats.proportion_interval(runs, runs, claim.alpha)
            assert low > claim.get("share", 0.5), f"{name}: {runs} seeds"
            settled += 1
    assert settled


def test_ways_that_should_agree_are_compared_by_more_than_one_number():
    """Two natural gradients of one length may point anywhere."""
    wanted = {"ng/norm", "ng/decrement", "ng/cosine", "kfac/trace", "kfac/top_eigenvalue"}
    for name in ("large_head", "reduce"):
        matches = [claim for claim in stated()[name] if claim.type == "matches"]
        assert {claim.metric for claim in matches} == wanted
        assert len({claim.get("tolerance") for claim in matches}) == 1


def test_what_is_to_be_unstable_says_where():
    claims = [claim for some in stated().values() for claim in some]
    unstable = [claim for claim in claims if claim.type == "stable" and claim.get("not")]
    assert [parse_value(claim.get("at")) for claim in unstable] == [1e-5] * 4

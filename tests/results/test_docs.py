"""The claims that the documentation gives can be read, and its claims table names every type."""

from __future__ import annotations

import re

import yaml

from fisher_lab.config import paths
from fisher_lab.results import stats
from fisher_lab.results.hypotheses import TYPES, Hypothesis, parse
from fisher_lab.results.values import parse_value

PAGE = (paths.root() / "docs" / "results.md").read_text()


def stated() -> dict[str, list[Hypothesis]]:
    """The claims of every sweep file that states some."""
    files = sorted((paths.root() / "sweeps").glob("*.yaml"))
    claims = {file.stem: yaml.safe_load(file.read_text()).get("claims") or [] for file in files}
    return {name: list(map(parse, some)) for name, some in claims.items() if some}


def test_the_claims_of_the_page_are_claims():
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    claims = [claim for block in blocks for claim in map(parse, block["claims"])]
    assert len(blocks) >= 7
    assert {c.type for c in claims} >= {"equivalent", "stable", "faster", "matches", "share"}
    assert all(claim.text.endswith(".") for claim in claims)


def test_every_type_is_described():
    assert [kind for kind in TYPES if f"`{kind}`" not in PAGE] == []


def test_the_seeds_of_a_sweep_can_settle_what_is_to_fail():
    """A claim that could not hold even if every run of its cell failed is no claim."""
    settled = 0
    for name, claims in stated().items():
        sweep = yaml.safe_load((paths.root() / "sweeps" / f"{name}.yaml").read_text())
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

"""The claims that the documentation gives can be read, and its claims table names every type."""

from __future__ import annotations

import re

import yaml

from fisher_lab.config import paths
from fisher_lab.results import stats
from fisher_lab.results.hypotheses import TYPES, check
from fisher_lab.results.values import meaning

PAGE = (paths.root() / "docs" / "results.md").read_text()


def test_the_claims_of_the_page_are_claims():
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    claims = [claim for block in blocks for claim in check(block["claims"])]
    assert len(blocks) >= 7
    assert {claim.type for claim in claims} >= {
        "equivalent",
        "stable",
        "faster",
        "matches",
        "share",
    }
    assert all(claim.text.endswith(".") for claim in claims)


def test_every_type_is_described():
    assert [kind for kind in TYPES if f"`{kind}`" not in PAGE] == []


def test_the_seeds_of_a_sweep_can_settle_what_is_to_fail():
    """A claim that could not hold even if every run of its cell failed is no claim."""
    settled = 0
    for file in sorted((paths.root() / "sweeps").glob("*.yaml")):
        sweep = yaml.safe_load(file.read_text())
        for claim in check(sweep.get("claims") or []):
            if claim.type == "fails":
                runs = len(str(sweep["params"]["seed"]).split(","))
                low, _ = stats.proportion_interval(runs, runs, claim.alpha)
                assert low > claim.get("share", 0.5), f"{file.name}: {runs} seeds"
                settled += 1
    assert settled


def test_ways_that_should_agree_are_compared_by_more_than_one_number():
    """Two natural gradients of one length may point anywhere."""
    wanted = {"ng/norm", "ng/decrement", "ng/cosine", "kfac/trace", "kfac/top_eigenvalue"}
    for name in ("large_head", "reduce"):
        stated = check(
            yaml.safe_load((paths.root() / "sweeps" / f"{name}.yaml").read_text())["claims"]
        )
        matches = [claim for claim in stated if claim.type == "matches"]
        assert {claim.metric for claim in matches} == wanted
        assert len({claim.get("tolerance") for claim in matches}) == 1


def test_what_is_to_be_unstable_says_where():
    files = sorted((paths.root() / "sweeps").glob("*.yaml"))
    stated = [c for f in files for c in check(yaml.safe_load(f.read_text()).get("claims") or [])]
    unstable = [claim for claim in stated if claim.type == "stable" and claim.get("not")]
    assert [meaning(claim.get("at")) for claim in unstable] == [1e-5] * 4


def test_every_claim_of_a_sweep_file_is_a_claim():
    files = sorted((paths.root() / "sweeps").glob("*.yaml"))
    stated = {file.name: yaml.safe_load(file.read_text()).get("claims") or [] for file in files}
    assert files
    assert {name: len(check(claims)) for name, claims in stated.items()} == {
        name: len(claims) for name, claims in stated.items()
    }

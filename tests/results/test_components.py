"""Intervals for new checkpoints and seeds, against simulation and statsmodels."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from fisher_lab.results.claims import evaluate_one
from fisher_lab.results.components import components, equivalence
from fisher_lab.results.hypotheses import FAILS, HOLDS, OPEN, parse
from fisher_lab.results.values import ResultsError
from tests.results.run_directories import swept

RNG = 16


def crossed(x: np.ndarray) -> dict[tuple[float, float], float]:
    return {(float(c), float(s)): float(x[c, s]) for c, s in np.ndindex(*x.shape)}


def draw(
    rng: np.random.Generator, c: int, s: int, spread: tuple[float, float, float]
) -> np.ndarray:
    a, b, e = spread
    return a * rng.normal(size=(c, 1)) + b * rng.normal(size=(1, s)) + e * rng.normal(size=(c, s))


def test_the_mean_squares_are_those_of_an_analysis_of_variance():
    x = draw(np.random.default_rng(RNG), 4, 5, (1.0, 0.5, 0.3))
    rows = [{"c": c, "s": s, "d": x[c, s]} for c, s in np.ndindex(4, 5)]
    table = anova_lm(ols("d ~ C(c) + C(s)", pd.DataFrame(rows)).fit())
    squares = (table["sum_sq"] / table["df"]).to_numpy()
    found = components(crossed(x))
    between, seeds, rest = found.spread
    assert rest**2 == pytest.approx(squares[2])
    assert 5 * between**2 == pytest.approx(squares[0] - squares[2])
    assert 4 * seeds**2 == pytest.approx(squares[1] - squares[2])
    assert found.se**2 == pytest.approx((squares[0] + squares[1] - squares[2]) / 20)


SPREADS = [(1.0, 0.0, 0.0001), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (1.0, 0.3, 0.3)]


@pytest.mark.parametrize(("c", "s"), [(3, 3), (3, 10), (6, 4)])
@pytest.mark.parametrize("spread", SPREADS)
def test_the_interval_covers_the_mean_of_new_checkpoints(c, s, spread):
    """At 95 %; the t interval of all pairs, as if each were independent, does not."""
    rng, tries = np.random.default_rng([RNG, c, s]), 1500
    inside = naive = 0
    for _ in range(tries):
        x = draw(rng, c, s, spread)
        found = equivalence(components(crossed(x)), -1.0, 1.0, 0.025)
        inside += found.low <= 0 <= found.high
        naive += abs(scipy_stats.ttest_1samp(x.ravel(), 0.0).statistic) <= scipy_stats.t.isf(
            0.025, c * s - 1
        )
    assert inside / tries >= 0.935
    if spread == (1.0, 0.3, 0.3):
        assert naive / tries < 0.85


def test_checkpoints_with_seeds_of_their_own_are_tested_by_their_means():
    rng = np.random.default_rng(RNG)
    x = rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, 4))
    found = components({(float(c), 10.0 * c + s): x[c, s] for c, s in np.ndindex(5, 4)})
    known = scipy_stats.ttest_1samp(x.mean(1), 0.0)
    low, high = known.confidence_interval(0.9)
    e = equivalence(found, 0.0, math.inf, 0.05)
    assert (e.low, e.high) == pytest.approx((low, high))
    assert e.p_inside == pytest.approx(
        scipy_stats.ttest_1samp(x.mean(1), 0.0, alternative="greater").pvalue
    )
    assert (found.checkpoints, found.seeds, found.df) == (5, 4, 4)
    one_each = components({(float(c), float(c)): x[c, 0] for c in range(5)})
    assert one_each.se == pytest.approx(scipy_stats.sem(x[:, 0]))


def test_what_shows_no_spread_of_checkpoints_is_refused():
    with pytest.raises(ResultsError, match="1 checkpoint shows no spread"):
        components({(0.0, float(s)): s**0.5 for s in range(4)})
    with pytest.raises(ResultsError, match="some of their seeds"):
        components({(0.0, 0.0): 1.0, (0.0, 1.0): 2.0, (1.0, 1.0): 3.0, (1.0, 2.0): 4.0})


CLAIM = {"type": "equivalent", "metric": "m", "groups": {"kfac.policy": ["all", "auto"]}}
BOTH = {"over": ["seed", "model.train_seed"]}


def test_a_claim_over_checkpoints_counts_checkpoints(tmp_path):
    """Ten seeds of each of three checkpoints that disagree: sure of each, and not of new ones."""
    rng = np.random.default_rng(RNG)
    shift = {0: 0.1, 1: 0.3, 2: 0.2}
    noise = {key: 0.02 * rng.normal() for key in itertools.product(range(3), range(10))}

    def measure(policy: str, checkpoint: int, seed: int) -> dict[str, float]:
        moved = shift[checkpoint] + noise[checkpoint, seed]
        return {"m": math.pi + seed + moved * (policy == "auto")}

    axes = {"kfac.policy": ["all", "auto"], "model.train_seed": range(3), "seed": range(10)}
    frame = swept(tmp_path, axes, measure)
    each = evaluate_one({**CLAIM, "margin": 0.35}, frame)
    assert (each.verdict, len(each.findings)) == (HOLDS, 3)
    assert each.scope == "over new seeds (batches and sampling) of 3 checkpoints, each by itself"
    new = evaluate_one({**CLAIM, "margin": 0.35, **BOTH}, frame)
    assert (new.verdict, new.seeds) == (OPEN, 30)
    assert new.scope.endswith("and new checkpoints (model.train_seed)")
    assert "3 checkpoints with 10 seeds; spread 0.099 between checkpoints" in new.why
    assert "either" not in new.why  # more seeds of the same checkpoints are no answer
    assert evaluate_one({**CLAIM, "margin": 0.9, **BOTH}, frame).verdict == HOLDS
    assert evaluate_one({**CLAIM, "margin": 1e-3, **BOTH, "alpha": 0.1}, frame).verdict in (
        OPEN,
        FAILS,
    )
    one = evaluate_one({**CLAIM, "margin": 0.35, "where": {"model.train_seed": 0}}, frame)
    assert one.scope == "over new seeds (batches and sampling) of one checkpoint"
    bounded = evaluate_one({"type": "bounded", "metric": "m", "at_most": 99}, frame)
    assert bounded.scope == "these runs alone"


def test_a_share_over_checkpoints_is_refused():
    claim = {"type": "share", "metric": "m", "at_least": 0.5}
    with pytest.raises(ResultsError, match="counts runs of one checkpoint"):
        parse({**claim, **BOTH})
    assert parse(claim).type == "share"

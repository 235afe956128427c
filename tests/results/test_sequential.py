"""Sequential tests against simulation of their definition and dense enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fisher_lab.results.sequential import (
    FAILS,
    HOLDS,
    OPEN,
    UNDECIDED,
    Design,
    conclude,
    means,
    share_boundary,
    shares,
    t_boundary,
    wedge,
)

RNG = 20261127
SWEEPS = 40_000


def highest(rate: float, sweeps: int = SWEEPS) -> float:
    """What a simulated rate exceeds once in 10,000 times."""
    return float(scipy_stats.binom.ppf(0.9999, sweeps, rate)) / sweeps


def t_statistics(x: np.ndarray, looks: range) -> np.ndarray:
    """By scipy, one look at a time."""
    tests: list[Any] = [scipy_stats.ttest_1samp(x[:, :n], 0.0, axis=1) for n in looks]
    return np.stack([test.statistic for test in tests], 1)


@pytest.mark.parametrize(
    ("design", "alpha"),
    [
        (Design(max_seeds=12), 0.05),
        (Design(max_seeds=12), 0.005),
        (Design(first=2, max_seeds=6), 0.1),
        (Design(max_seeds=20, spending=3.0), 0.05),
    ],
)
def test_the_level_is_spent_look_by_look_as_designed(design, alpha):
    """The share of sweeps that have crossed at each look, by statistics that scipy computes."""
    x = np.random.default_rng(RNG).normal(0.0, 7.0, (SWEEPS, design.max_seeds))
    crossed = np.maximum.accumulate(
        t_statistics(x, design.looks) >= t_boundary(design, alpha), axis=1
    )
    for rate, spent in zip(crossed.mean(0), design.spent(alpha), strict=True):
        low, high = scipy_stats.binom.interval(0.9998, SWEEPS, spent)
        assert low <= rate * SWEEPS <= high


def test_two_looks_are_the_double_integral():
    """Two and three seeds, where Student's law and the joint one can be integrated directly."""
    design = Design(first=2, max_seeds=3, spending=1.0)
    first, last = t_boundary(design)
    assert first == pytest.approx(scipy_stats.t.isf(0.05 * 2 / 3, 1))
    # x1, x2 = r (cos a, sin a) with a uniform; x3 / r is Student's t with 2 degrees over sqrt 2.
    a = (np.arange(200_000) + 0.5) * 2 * math.pi / 200_000
    one, two = np.cos(a), np.sin(a)
    gone = (one + two) / np.abs(one - two) >= first
    # t >= c of three numbers, as a quadratic condition on v = x3 / r.
    share = last**2 * 3 / (2 + last**2)  # u^2 at the boundary: (s + v)^2 = share (1 + v^2)
    s = one + two
    assert share > 1  # so that v lies between both roots, where s + v is positive
    root = np.sqrt(np.maximum(share * (1 + s**2 - share), 0.0))
    low, high = (s - root) / (share - 1), (s + root) / (share - 1)
    law = scipy_stats.t(2)
    inside = law.cdf(math.sqrt(2) * high) - law.cdf(math.sqrt(2) * low)
    crossed = float(np.where(gone, 1.0, np.where(s + low > 0, inside, 0.0)).mean())
    assert crossed == pytest.approx(0.05, abs=2e-4)


def test_more_cells_change_no_boundary():
    design = Design(max_seeds=15)
    assert t_boundary(design, cells=800) == pytest.approx(t_boundary(design), rel=2e-3)


def test_a_share_crosses_as_enumeration_says():
    """Every sequence of ten runs, with its probability."""
    design, share = Design(max_seeds=10), 0.3
    less, more = share_boundary(design, share)
    runs = np.array(list(itertools.product([0, 1], repeat=10)))
    weight = share ** runs.sum(1) * (1 - share) ** (10 - runs.sum(1))
    counts = np.cumsum(runs, 1)[:, np.array(design.looks) - 1]
    above = weight[(counts >= more).any(1)].sum()
    below = weight[(counts <= less).any(1)].sum()
    assert 0.02 < above <= 0.05
    assert 0.01 < below <= 0.05


@pytest.mark.parametrize("give_up", [1.0, 0.3])
def test_wrong_verdicts_on_the_bound_keep_the_level(give_up):
    design = Design(max_seeds=20, give_up=give_up)
    x = np.random.default_rng(RNG).normal(2.0, 3.0, (SWEEPS, 20))
    for bounds in ((2.0, math.inf), (-math.inf, 2.0), (1.0, 2.0)):
        verdict, n = conclude([means(x, *bounds, design)], design)
        assert (verdict == HOLDS).mean() <= highest(0.05)
        assert (verdict == FAILS).mean() <= highest(0.05)
        assert set(verdict) <= {HOLDS, FAILS, UNDECIDED}
        assert (n.min() >= 3) & (n.max() <= 20)


def test_the_fixed_test_looked_at_again_is_wrong_far_more_often():
    """What the boundaries are for: 5 % at each of 48 looks."""
    design = Design()
    x = np.random.default_rng(RNG).normal(size=(10_000, 50))
    t = t_statistics(x, design.looks)
    fixed = (t >= [scipy_stats.t.isf(0.05, n - 1) for n in design.looks]).any(1).mean()
    kept = (t >= t_boundary(design)).any(1).mean()
    assert fixed > 0.2
    assert kept <= highest(0.05, 10_000)


@pytest.mark.parametrize("many", [3, 10])
def test_several_comparisons_share_the_level_of_failing(many):
    design = Design(max_seeds=12)
    x = np.random.default_rng(RNG).normal(0.0, 1.0, (many, 10_000, 12))
    paths = [means(one, 0.0, math.inf, design, many) for one in x]
    verdict, _ = conclude(paths, design)
    assert 0.02 <= (verdict == FAILS).mean() <= highest(0.05, 10_000)
    # All but one hold for certain: the last one's level is that of the claim.
    paths = [means(one + 50.0 * (i > 0), 0.0, math.inf, design, many) for i, one in enumerate(x)]
    verdict, _ = conclude(paths, design)
    assert 0.03 <= (verdict == HOLDS).mean() <= highest(0.05, 10_000)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_wrong_verdicts_on_a_share_keep_the_level(share):
    design = Design(max_seeds=30)
    hits = np.random.default_rng(RNG).random((SWEEPS, 30)) < share
    for bounds in ((share, 1.0), (0.0, share), (share / 2, share)):
        verdict, _ = conclude([shares(hits, *bounds, design)], design)
        assert (verdict == HOLDS).mean() <= highest(0.05)
        assert (verdict == FAILS).mean() <= highest(0.05)


def test_the_statistics_are_scipys_whatever_the_unit():
    x = np.random.default_rng(RNG).normal(1e6, 1e-2, (3, 9))
    path = means(x, 1e6 - 1.0, 1e6, Design(max_seeds=9))
    for n, lower, upper in zip(path.n, path.lower.T, path.upper.T, strict=True):
        for bound, found in ((1e6 - 1.0, lower), (1e6, upper)):
            known: Any = scipy_stats.ttest_1samp(x[:, :n] - bound, 0.0, axis=1)
            assert found == pytest.approx(known.statistic, rel=1e-5)


def test_a_path_goes_on_until_it_is_decided_and_a_verdict_stays():
    design = Design(max_seeds=10)
    d = [0.1, -0.1, 0.2, 5.0, 5.1, 4.9, 5.2, 5.0, 5.1, 5.0]
    assert [conclude([means(d[:n], 0.0, math.inf, design)], design)[0] for n in (3, 4)] == [
        OPEN
    ] * 2
    steady = [5.0, 5.1, 4.9, -9.0, 9.0, -9.0, 9.0, -9.0, 9.0, -9.0]
    for n in (3, 6, 10):
        verdict, at = conclude([means(steady[:n], 0.0, math.inf, design)], design)
        assert (verdict, at) == (HOLDS, 3)


def test_numbers_that_do_not_vary_decide_unless_the_metric_is_coarse():
    design = Design(max_seeds=10)
    for step, n, verdict in ((0.0, 3, HOLDS), (1.0, 3, OPEN), (1.0, 6, HOLDS), (1e-3, 3, HOLDS)):
        found, _ = conclude([means([2.0] * n, 1.5, math.inf, design, step=step)], design)
        assert found == verdict
    assert conclude([means([1.0] * 3, 1.5, math.inf, design)], design)[0] == FAILS


def test_the_wedge_meets_the_boundary_at_the_last_look():
    design = Design(max_seeds=20, give_up=0.5)
    inner = wedge(design)
    assert inner[-1] == pytest.approx(t_boundary(design)[-1])
    assert (inner[: 10 - 3 + 1] == -1).all()
    assert (np.diff(inner[8:]) > 0).all()
    assert (wedge(Design(give_up=1.0)) == -1).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("alpha", 0.5), ("first", 1), ("first", 51), ("spending", 0.0), ("give_up", 0.0)],
)
def test_a_design_out_of_its_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}={value} is not allowed"):
        Design(**{key: value})

"""The statistics against scipy and statsmodels, and by simulation where the answer is a rate."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from fisher_lab.results import stats

RNG = 20261122


def rate(happens: Callable[[Any], bool], samples: Iterable[Any]) -> float:
    """The share of samples for which something happens."""
    return float(np.mean([happens(sample) for sample in samples]))


def covers(mean: float, **more: Any) -> Callable[[np.ndarray], bool]:
    """Whether the interval of a sample covers the mean."""

    def found(x: np.ndarray) -> bool:
        s = stats.summarise(x, **more)
        return s.low <= mean <= s.high

    return found


def binomial(rate: float, n: int) -> tuple[float, float]:
    """A range that a simulated rate leaves once in 10,000 times."""
    low, high = scipy_stats.binom.interval(0.9999, n, rate)
    return low / n, high / n


def test_the_summary_is_scipys():
    x = np.random.default_rng(RNG).normal(3, 2, 7)
    s = stats.summarise(x)
    low, high = scipy_stats.t.interval(0.95, 6, loc=x.mean(), scale=scipy_stats.sem(x))
    assert (s.n, s.mean, s.std) == (7, pytest.approx(x.mean()), pytest.approx(x.std(ddof=1)))
    assert (s.low, s.high) == (pytest.approx(low), pytest.approx(high))
    assert (s.q1, s.median, s.q3) == tuple(np.percentile(x, [25, 50, 75]))
    assert s.half_width == pytest.approx((high - low) / 2)


def test_the_bootstrap_is_scipys():
    x = np.random.default_rng(RNG).exponential(2, 30)
    s = stats.summarise(x, method="bootstrap")
    known = scipy_stats.bootstrap((x,), np.mean, confidence_level=0.95, rng=0).confidence_interval
    assert (s.low, s.high) == (pytest.approx(known.low), pytest.approx(known.high))


def test_one_number_and_none_have_no_interval_and_equal_ones_one_of_no_width():
    one, none, equal = (stats.summarise(x) for x in ([2.0], [], [0.1] * 3))
    assert (one.n, one.mean, one.median, none.n) == (1, 2.0, 2.0, 0)
    assert all(map(math.isnan, (one.low, one.std, none.mean)))
    assert (equal.std, equal.low, equal.high) == (0.0, equal.mean, equal.mean)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_interval_covers_the_mean_as_often_as_it_says(n):
    samples = np.random.default_rng(RNG + n).normal(1.5, 3.0, (4000, n))
    low, high = binomial(0.95, 4000)
    assert low <= rate(covers(1.5), samples) <= high


def test_the_bootstrap_covers_nearly_as_often_with_many_runs():
    samples = np.random.default_rng(RNG).gamma(4.0, 0.5, (60, 40))
    hits = [covers(2.0, method="bootstrap", seed=i)(x) for i, x in enumerate(samples)]
    assert np.mean(hits) >= binomial(0.93, 60)[0]


def test_the_paired_comparison_is_scipys():
    rng = np.random.default_rng(RNG)
    a, b = rng.normal(1, 1, 8), rng.normal(0, 1, 8)
    p = stats.paired(a, b)
    known = scipy_stats.ttest_rel(a, b)
    interval = known.confidence_interval(0.95)
    assert (p.n, p.p) == (8, pytest.approx(known.pvalue))
    assert (p.low, p.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert p.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    assert not p.exact


def test_pairs_that_do_not_vary_are_exact_and_never_nan():
    same = stats.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    shifted = stats.paired([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (same.exact, same.mean, same.low, same.high) == (True, 0.0, 0.0, 0.0)
    rounded = stats.paired([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2 - 5e-17])
    assert (same.identical, rounded.identical, shifted.identical) == (True, True, False)
    assert (shifted.exact, shifted.mean) == (True, 0.5)
    assert stats.paired([1.0], [2.0]).n == 1
    assert stats.paired([], []).n == 0


def test_the_paired_test_keeps_its_level_and_has_its_power():
    rng = np.random.default_rng(RNG)
    rounds, n, effect = 3000, 6, 1.2
    for shift, rate in ((0.0, 0.05), (effect, TTestPower().power(effect, n, 0.05))):
        base = rng.normal(0, 5, (rounds, n))
        d = rng.normal(shift, 1, (rounds, n))
        hits = np.mean([stats.paired(b + e, b).p < 0.05 for b, e in zip(base, d, strict=True)])
        low, high = binomial(rate, rounds)
        assert low <= hits <= high


def test_holm_is_statsmodels_and_leaves_nan_alone():
    p = [0.01, math.nan, 0.04, 0.03, 0.005]
    got = stats.holm(p)
    known = multipletests([0.01, 0.04, 0.03, 0.005], method="holm")[1]
    assert [v for v in got if v == v] == pytest.approx(list(known))
    assert math.isnan(got[1])
    assert stats.holm([]) == []


def test_holm_keeps_the_familywise_level():
    rng = np.random.default_rng(RNG)
    rounds, family = 2000, 8
    gc.freeze()  # statsmodels collects garbage at every call: let there be little
    try:
        errors = np.mean([min(stats.holm(rng.uniform(size=family))) < 0.05 for _ in range(rounds)])
    finally:
        gc.unfreeze()
    low, high = binomial(1 - (1 - 0.05 / family) ** family, rounds)
    assert low <= errors <= high


def test_equivalence_is_statsmodels():
    d = np.random.default_rng(RNG).normal(0.1, 0.3, 9)
    e = stats.equivalence(d, -0.5, 0.4, 0.05, scale=1.0)
    p, (_, p_low, _), (_, p_high, _) = ttost_paired(d, np.zeros(9), -0.5, 0.4)
    assert e.p_inside == pytest.approx(float(p))
    assert e.p_inside == pytest.approx(max(float(p_low), float(p_high)))
    low, high = scipy_stats.t.interval(0.9, 8, loc=d.mean(), scale=scipy_stats.sem(d))
    assert (e.low, e.high) == (pytest.approx(low), pytest.approx(high))


def test_a_single_bound_is_the_one_sided_test():
    d = np.random.default_rng(RNG).normal(0.4, 0.3, 9)
    e = stats.equivalence(d, 0.2, math.inf, 0.05, scale=1.0)
    known = scipy_stats.ttest_1samp(d, 0.2, alternative="greater").pvalue
    assert e.p_inside == pytest.approx(known)
    assert e.p_outside == pytest.approx(1 - known)


def test_the_equivalence_test_keeps_its_level():
    """On the margin itself: at most 5 % are called equivalent, at most 5 % not."""
    samples = np.random.default_rng(RNG).normal(1.0, 0.5, (2000, 6))
    found = [stats.equivalence(d, -1.0, 1.0, 0.05, scale=1.0) for d in samples]
    for p in ([e.p_inside for e in found], [e.p_outside for e in found]):
        assert binomial(0.02, 2000)[0] <= rate(lambda p: p < 0.05, p) <= binomial(0.05, 2000)[1]


@pytest.mark.parametrize(("mean", "std", "n"), [(0.0, 0.5, 6), (0.3, 0.4, 8), (0.5, 0.6, 12)])
def test_the_power_of_equivalence_is_what_simulation_gives(mean, std, n):
    samples = np.random.default_rng(RNG).normal(mean, std, (2000, n))
    margins = (-1.0, 1.0, 0.05)
    hits = rate(lambda d: stats.equivalence(d, *margins, scale=1.0).p_inside < 0.05, samples)
    power = stats.power_inside(n, mean, std, *margins)
    low, high = binomial(power, 2000)
    # The formula is Phillips's approximation: exact but for the dependence of the two tests.
    assert low - 0.02 <= hits <= high + 0.02


def test_the_number_of_seeds_gives_the_power_that_is_asked():
    d = np.array([0.2, 0.6, -0.3, 0.5])
    e = stats.equivalence(d, -1.0, 1.0, 0.05, scale=1.0)
    n = stats.seeds_for(e, -1.0, 1.0, 0.05)
    assert n is not None
    assert stats.power_inside(n, e.mean, e.std, -1.0, 1.0, 0.05) >= stats.POWER
    assert stats.power_inside(n - 1, e.mean, e.std, -1.0, 1.0, 0.05) < stats.POWER
    on_the_margin = stats.Equivalence(4, 1.0, 0.5, 0.5, 1.5, 0.5, 0.5, exact=False)
    assert stats.seeds_for(on_the_margin, -1.0, 1.0, 0.05) is None


def test_the_number_of_seeds_beyond_the_margin_is_statsmodels():
    d = np.array([1.9, 1.0, 1.4, 1.2])
    e = stats.equivalence(d, -math.inf, 1.0, 0.05, scale=1.0)
    n = stats.seeds_for(e, -math.inf, 1.0, 0.05)
    effect = (e.mean - 1.0) / e.std
    known = TTestPower().solve_power(effect, None, 0.05, stats.POWER, alternative="larger")
    assert n == math.ceil(known)


def test_exact_differences_are_decided_without_a_test():
    inside = stats.equivalence([0.25] * 3, -1.0, 1.0, 0.05, scale=1.0)
    outside = stats.equivalence([2.0] * 3, -1.0, 1.0, 0.05, scale=1.0)
    assert (inside.exact, inside.p_inside, outside.p_inside) == (True, 0.0, 1.0)


def test_the_interval_of_a_share_covers():
    rng = np.random.default_rng(RNG)
    for share in (0.01, 0.3, 0.9):
        counts = rng.binomial(20, share, 2000)
        ends = {c: stats.proportion_interval(int(c), 20, 0.05) for c in set(counts)}
        hits = np.mean([ends[c][0] <= share <= ends[c][1] for c in counts])
        assert hits >= binomial(0.9, 2000)[0]


def test_cells_that_cannot_be_told_apart():
    a = pd.Series({0: 1.0, 1: 2.0, 2: 3.0})
    assert stats.overlap(a, a + pd.Series({0: 0.1, 1: -0.1, 2: 0.05}))
    assert not stats.overlap(a, a + pd.Series({0: 1.0, 1: 1.1, 2: 0.9}))
    assert stats.overlap(a, pd.Series({7: 1.5, 8: 2.5, 9: 2.2}))
    assert not stats.overlap(a.iloc[:1], a.iloc[1:2])


def test_a_share_is_tested_as_its_interval_says():
    for count, low, high in ((9, 0.5, 1.0), (1, 0.5, 1.0), (7, -1.0, 0.3), (4, 0.1, 0.9)):
        inside, beyond = stats.proportion_tests(count, 10, low, high)
        for alpha in (0.001, 0.01, 0.05, 0.2):
            ends = stats.proportion_interval(count, 10, alpha)
            held = (low < 0 or ends[0] > low) and (high >= 1 or ends[1] < high)
            assert (inside < alpha) == held
            assert (beyond < alpha) == (ends[0] > high or ends[1] < low)


BASE = pd.Series([0.52, 0.55, 0.546, 0.58, 0.50, 0.541, 0.56])


def test_medians_are_told_apart_by_ranks_and_one_outlier_hides_nothing():
    slower = BASE + pd.Series([0.13, 0.14, 0.137, 0.15, 0.12, 0.131, 40.0])
    assert stats.overlap(slower, BASE)  # the mean difference is anything
    assert not stats.overlap(slower, BASE, statistic="median")
    known = scipy_stats.wilcoxon(slower, BASE).pvalue
    assert known == pytest.approx(2.0**-6)
    assert stats.overlap(slower, BASE, 1 - known, "median")
    assert stats.overlap(slower, BASE, 0.99, "median")
    mixed = BASE + pd.Series([0.13, -0.14, 0.137, -0.15, 0.12, 0.131, 40.0])
    assert stats.overlap(mixed, BASE, statistic="median")


def test_medians_of_few_pairs_need_one_direction_and_a_clear_ratio():
    for shift, tied in (
        ([0.13, 0.14, 0.137], False),
        ([0.13, 0.14, -0.001], True),  # a pair that points the other way
        ([0.01, 0.14, 0.9], True),  # one way, but by anything
    ):
        assert stats.overlap(BASE[:3] + shift, BASE[:3], statistic="median") is tied
    assert not stats.overlap(2 * BASE[:3], BASE[:3], statistic="median")  # twice, exactly
    assert stats.overlap(BASE[:3] + 1e-17, BASE[:3], statistic="median")
    below = pd.Series([-1.0, -2.0, -1.5])
    assert not stats.overlap(below - [1.0, 1.1, 0.9], below, statistic="median")


def test_medians_without_pairs_are_compared_by_ranks():
    other = pd.Series([0.7, 0.71, 0.75, 0.9], index=[10, 11, 12, 13])
    assert not stats.overlap(BASE[:4], other, statistic="median")
    assert stats.overlap(BASE[:3], other[:3], statistic="median")  # p is 0.1 at the least
    assert not stats.overlap(BASE[:1], other[:1], statistic="median")


@pytest.mark.parametrize("n", [3, 5, 8])
def test_ties_of_skewed_times_keep_their_level(n):
    pairs = np.random.default_rng(RNG + n).lognormal(0.0, 1.0, (400, 2, n))
    tied = rate(lambda p: stats.overlap(*map(pd.Series, p), statistic="median"), pairs)
    assert 1 - tied <= binomial(0.05, 400)[1]


def test_ranks_with_ties_and_zeros_are_exact():
    shift = pd.Series([0.1, 0.1, 0.1, 0.2, 0.2, 0.0, 0.3])
    base = pd.Series([1.0] * 7)
    method = scipy_stats.PermutationMethod()
    known = scipy_stats.wilcoxon((base + shift) - base, method=method).pvalue
    assert known < 0.05
    assert not stats.overlap(base + shift, base, statistic="median")
    assert stats.overlap(base + shift, base, 1 - 0.9 * known, "median")

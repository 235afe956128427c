"""The statistics against scipy and statsmodels, and by simulation where the answer is a rate."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportOptionalIterable=false

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
from fisher_lab.results.coarse import resolution

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


def test_the_bootstrap_is_scipys_at_the_level_of_students_interval():
    x = np.random.default_rng(RNG).exponential(2, 30)
    s = stats.summarise(x, method="bootstrap")
    wider = scipy_stats.t.ppf(0.975, 29) * math.sqrt(30 / 29)
    level = 1 - 2 * scipy_stats.norm.sf(wider)
    known = scipy_stats.bootstrap((x,), np.mean, confidence_level=level, rng=0).confidence_interval
    assert (s.low, s.high) == (pytest.approx(known.low), pytest.approx(known.high))


def test_few_runs_have_no_bootstrap_interval():
    """Of three runs it would cover the mean in three quarters of cases."""
    nine, ten = (stats.summarise(np.sqrt(np.arange(n)), method="bootstrap") for n in (9, 10))
    assert math.isnan(nine.low)
    assert ten.low < ten.mean < ten.high
    samples = np.random.default_rng(RNG).normal(size=(200, 3))
    ends = [scipy_stats.bootstrap((x,), np.mean, n_resamples=999, rng=0).confidence_interval
            for x in samples]  # fmt: skip
    assert np.mean([low <= 0 <= high for low, high in ends]) < 0.85


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_the_interval_of_mean_times_covers(spread):
    """Log-normal seconds of mean 1, where Student's interval covers in 88 % of cases and fewer."""
    samples = np.random.default_rng(RNG).lognormal(-(spread**2) / 2, spread, (2000, 5))
    by_logs = rate(covers(1.0, method="log"), samples)
    assert by_logs >= binomial(0.935, 2000)[0]
    if spread == 1.0:
        assert rate(covers(1.0), samples) < 0.87


def test_the_interval_of_a_ratio_of_times_covers():
    rng = np.random.default_rng(RNG)
    pairs = rng.lognormal(0.0, 1.0, (1500, 2, 4))
    found = [stats.paired_ratio(3.0 * a, b) for a, b in pairs]
    low, high = binomial(0.95, 1500)
    assert low <= np.mean([p.low <= 3.0 <= p.high for p in found]) <= high
    below = stats.paired_ratio([1.0, -1.0], [2.0, 2.5])
    assert (below.as_ratio, below.mean) == (False, -2.25)


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


@pytest.mark.parametrize(("effect", "n"), [(0.4, 4), (0.5, 8)])
def test_the_range_of_seeds_holds_the_right_number_as_often_as_it_says(effect, n):
    """A single guess is above twice or below half of it in more than a third of cases.

    The range is that of a mean on the side of the bound that was seen, and covers a little more.
    """
    bounds = (0.0, math.inf, 0.05)
    true = stats.Equivalence(n, effect, 1.0, 0.0, 0.0, 0.5, 0.5, exact=False)
    number = stats.seeds_for(true, *bounds)
    found = [stats.equivalence(x, *bounds, scale=1.0)
             for x in np.random.default_rng(RNG).normal(effect, 1.0, (150, n))]  # fmt: skip
    ranges = [stats.seeds_range(e, *bounds) for e in found]
    held = np.mean([(low or math.inf) <= number <= (high or math.inf) for low, high in ranges])
    assert held >= binomial(stats.GUESS, 150)[0]
    single = [stats.seeds_for(e, *bounds) or math.inf for e in found]
    assert np.mean([number / 2 <= one <= 2 * number for one in single]) < 0.67


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


def test_the_step_of_a_coarse_metric_is_found_and_that_of_a_fine_one_is_none():
    for samples, step in (
        (([1.0, 3.0], [2.0, 2.0]), 2.0),
        (([5.0, 5.0], [8.0, 8.0]), 1.0),
        (([0.25, 0.5], [0.25, 0.75]), 0.25),
        (([1 / 7, 3 / 7], [2 / 7, 2 / 7]), 2 / 7),
        (([300 / 7, 400 / 7], [300 / 7, 500 / 7]), 100 / 7),
        (([0.0, 0.0], [0.0, 0.0]), 1.0),
        (([0.52, 0.55], [0.58, 0.58]), 0.03),
        (([3e-7, 5e-7], [4e-7, 4e-7]), 2e-7),
        (([math.pi, 2.0], [2.0, 2.0]), 0.0),
        (([0.1 + 0.2, 0.3], [0.3, 0.3]), 0.1),
        (([2.718281828, 3.0],), 0.0),
    ):
        assert resolution(*samples) == pytest.approx(step)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("steps", [0.5, 1.5, 6.0])
def test_ties_of_a_coarse_metric_decide_nothing_by_chance(n, steps):
    """The margin is so many steps from 0, and the mean is on it; spreads of 0.3 to 2 steps."""
    rng = np.random.default_rng([RNG, n])
    for spread in (0.3, 0.5, 1.0, 2.0):
        d = np.round(rng.normal(steps, spread, (20_000, n)))
        d = d[(d == d[:, :1]).all(1)]  # those that do not vary; of others the t test decides
        values, counts = np.unique(d[:, 0], return_counts=True)
        wrong = {0: 0, 1: 0}
        for value, count in zip(values, counts, strict=True):
            e = stats.equivalence([value] * n, -steps, steps, 0.05, 1.0, step=1.0)
            wrong[0] += count * (e.p_inside < 0.05)
            wrong[1] += count * (e.p_outside < 0.05)
        assert max(wrong.values()) / 20_000 <= binomial(0.05, 20_000)[1]
    assert stats.equivalence([0.0, 0.0], -1.0, 1.0, 0.05, 1.0, step=0.0).p_inside == 0.0


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
        sides = (low >= 0) + (high < 1)
        for alpha in (0.001, 0.01, 0.05, 0.2):
            ends = stats.proportion_interval(count, 10, alpha)
            held = (low < 0 or ends[0] > low) and (high >= 1 or ends[1] < high)
            assert (inside < alpha) == held
            ends = stats.proportion_interval(count, 10, alpha / sides)
            assert (beyond < alpha) == (ends[0] > high or ends[1] < low)


@pytest.mark.parametrize(("n", "low", "high"), [(50, 0.4, 0.5), (100, 0.45, 0.5), (30, 0.1, 0.3)])
def test_a_share_on_one_of_two_bounds_is_called_wrongly_at_its_level(n, low, high):
    """By enumeration of all counts; both sides together."""
    counts = np.arange(n + 1)
    p = np.array([stats.proportion_tests(int(c), n, low, high) for c in counts])
    for share in (low, (low + high) / 2, high):
        pmf = scipy_stats.binom.pmf(counts, n, share)
        assert pmf[p[:, 1] < 0.05].sum() <= 0.05
        if share != (low + high) / 2:
            assert pmf[p[:, 0] < 0.05].sum() <= 0.05


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


@pytest.mark.parametrize("spreads", [[1.0] * 8, [10.0, *[1.0] * 7], np.geomspace(0.1, 10, 8)])
def test_cells_as_good_as_the_best_keep_their_mark_together(spreads):
    """Eight equal cells: each against the one that looks best loses one in 41 % of cases."""
    rng = np.random.default_rng(RNG)
    lost, before = [], []
    for _ in range(150):
        x = np.array(spreads)[:, None] * rng.normal(size=(8, 5)) + rng.normal(0, 9, 5)
        best = int(x.mean(1).argmax())
        p = {k: stats.paired(x[k], x[best]).p for k in range(8) if k != best}
        kept = stats.contenders(p, 8, lambda k, confidence, p=p: p[k] >= 1 - confidence, 0.95)
        lost.append(len(kept) < 7)
        before.append(min(p.values()) < 0.05)
    assert np.mean(lost) <= binomial(0.05, 150)[1]
    assert np.mean(before) > 0.15


def test_for_two_cells_the_mark_is_the_plain_test_and_worse_cells_go_in_steps():
    asked = []

    def alike(key: int, confidence: float) -> bool:
        asked.append(round(1 - confidence, 6))
        return key < 1

    assert stats.contenders([0], 2, alike, 0.95) == {0}
    assert asked == [0.05]
    asked.clear()
    assert stats.contenders([0, 1, 2], 4, alike, 0.95) == {0}
    assert set(asked) == {round(2 * 0.05 / (m * 3), 6) for m in (4, 2)}


def test_coarse_numbers_that_differ_by_chance_are_tied():
    one, other = pd.Series([3.0, 4.0]), pd.Series([4.0, 5.0])
    assert stats.overlap(one, other)
    assert stats.overlap(one, other, statistic="median")
    assert not stats.overlap(one / 7919.0, other / 7919.0 + 1.0)
    many = pd.Series(range(12)) + 0.0
    assert not stats.overlap(many, many + 5.0)

"""The statistics of tables and claims; scipy and statsmodels compute them.

Differences are taken between runs that share everything but the compared setting (and so the
seed). Differences that do not vary have no distribution to test: they are compared as numbers and
the answer says ``exact``, but where the metric is so coarse that they may be equal by chance
(:func:`resolution`, :func:`tie_chance`). `benchmarks/intervals.py` measures how often each interval
covers and each test errs.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from fisher_lab.results.coarse import ROUNDING, resolution, tie_chance

Floats = NDArray[np.float64]

Key = TypeVar("Key", bound=Hashable)

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
"""The largest number of seeds that is worth naming."""

BOOTSTRAP_RUNS = 10
"""The fewest runs that a bootstrap interval is made of. It covers the mean in 73 % of cases with
three runs, since few numbers give few resamples, none of which reaches beyond them."""


@dataclass(frozen=True)
class Summary:
    """What the numbers of one cell come to; all but ``n`` are NaN where there is no number.

    Attributes:
        n: how many numbers there are.
        mean: of them.
        std: sample standard deviation, NaN where ``n < 2``.
        low: lower end of the interval for the mean, NaN where ``n < 2``.
        high: its upper end.
        median: of them.
        q1: lower quartile.
        q3: upper quartile.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    median: float
    q1: float
    q3: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval, NaN where there is none."""
        return (self.high - self.low) / 2


def summarise(
    values: ArrayLike, confidence: float = CONFIDENCE, method: str = "t", seed: int = 0
) -> Summary:
    """Mean, spread and interval of finite numbers.

    Args:
        values: one a run.
        confidence: of the interval.
        method: ``t`` (Student); ``log``, for positive numbers that are skewed as times are
            (:func:`_log_interval`); or ``bootstrap`` (bias-corrected and accelerated, scipy), which
            needs :data:`BOOTSTRAP_RUNS` numbers and is NaN below.
        seed: of the bootstrap.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Summary(0, *[math.nan] * 7)
    q1, median, q3 = (float(v) for v in np.percentile(x, [25, 50, 75]))
    mean = float(x.mean())
    if x.size == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan, median, q1, q3)
    if _constant(x, size(x, x)):
        return Summary(x.size, mean, 0.0, mean, mean, median, q1, q3)
    about = _describe(x)
    if method == "bootstrap":
        low, high = _bootstrap_interval(x, confidence, seed)
    elif method == "log" and x.min() > 0:
        low, high = _log_interval(x, confidence)
    else:
        low, high = about.tconfint_mean(alpha=1 - confidence)
    return Summary(x.size, mean, float(about.std), float(low), float(high), median, q1, q3)


def _bootstrap_interval(x: Floats, confidence: float, seed: int) -> tuple[float, float]:
    """BCa at the level at which normal numbers have Student's interval (Hesterberg 2015, 4.5).

    Without this correction resamples of n numbers are too narrow by ``sqrt((n - 1) / n)`` and have
    the quantiles of the normal distribution: the interval of ten runs covers in 90 % of cases.
    """
    n = x.size
    if n < BOOTSTRAP_RUNS:
        return math.nan, math.nan
    wider = stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
    level = float(1 - 2 * stats.norm.sf(wider))
    with warnings.catch_warnings():
        # Few distinct numbers give degenerate resamples; scipy then answers with NaN.
        warnings.simplefilter("ignore")
        found = stats.bootstrap((x,), np.mean, confidence_level=level, rng=seed)
    return found.confidence_interval


def _log_interval(x: Floats, confidence: float) -> tuple[float, float]:
    """Cox's interval for the mean of log-normal numbers, with t for the normal quantile.

    The mean of a log-normal distribution is ``exp(m + v / 2)``; ``m`` and ``v`` are estimated by
    mean and variance of the logarithms (Olsson 2005, J. Stat. Education 13(1), eq. 4).
    """
    logs = np.log(x)
    m, v = float(logs.mean()), float(logs.var(ddof=1))
    error = math.sqrt(v / x.size + v**2 / (2 * (x.size - 1)))
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1)) * error
    with np.errstate(over="ignore"):
        low, high = np.exp([m + v / 2 - half, m + v / 2 + half])
    return float(low), float(high)


def _describe(x: Floats) -> Any:
    """By statsmodels; its cached attributes carry no types."""
    return DescrStatsW(x, ddof=1)


def _constant(x: Floats, scale: float) -> bool:
    """Whether numbers, computed from some of a size, do not vary beyond rounding."""
    return bool(x.max() - x.min() <= ROUNDING * scale)


# ---- pairs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """The difference between two paired samples, or their ratio.

    Attributes:
        n: pairs.
        mean: of ``a - b``.
        low: of the interval of the mean difference.
        high: likewise.
        p: two-sided, by the paired t test; NaN where there is nothing to test (see ``exact``).
        effect: mean over standard deviation of the differences (Cohen's d_z); NaN likewise.
        exact: the differences do not vary; ``mean`` is the difference.
        identical: nor are they more than rounding (:data:`ROUNDING` of the numbers' size).
        as_ratio: ``mean``, ``low`` and ``high`` are those of ``a / b``, a geometric mean; ``p`` and
            ``effect`` are those of the logarithms.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    effect: float
    exact: bool
    identical: bool = False
    as_ratio: bool = False


def paired_ratio(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Paired:
    """Compare two positive samples whose members belong together by the ratio of the pairs.

    The t interval of the logarithms is exact for log-normal numbers, as times are, whereas that of
    their differences is not. Samples with a number that is not positive are compared by their
    differences.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.size == 0 or min(x.min(), y.min()) <= 0:
        return paired(x, y, confidence)
    # Logarithms of numbers that agree to rounding do so absolutely: their size is 1.
    found = _compared(np.log(x) - np.log(y), 1.0, confidence)
    mean, low, high = (math.exp(v) for v in (found.mean, found.low, found.high))
    return replace(found, mean=mean, low=low, high=high, as_ratio=True)


def paired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Paired:
    """Compare two samples whose members belong together, in the same order."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.size == 0:
        return Paired(0, *[math.nan] * 5, exact=False)
    return _compared(x - y, size(x, y), confidence)


def _compared(d: Floats, scale: float, confidence: float) -> Paired:
    """The test of some differences of numbers of a size."""
    mean = float(d.mean())
    if d.size == 1:
        return Paired(1, mean, *[math.nan] * 4, exact=False)
    if _constant(d, scale):
        same = float(np.abs(d).max()) <= ROUNDING * scale
        return Paired(d.size, mean, mean, mean, math.nan, math.nan, exact=True, identical=same)
    test: Any = stats.ttest_1samp(d, 0.0)
    interval = test.confidence_interval(confidence)
    effect = mean / float(d.std(ddof=1))
    return Paired(
        d.size, mean, float(interval.low), float(interval.high), float(test.pvalue), effect, False
    )


def size(x: Floats, y: Floats) -> float:
    """The largest magnitude in two samples, by which rounding is told from variation."""
    return float(max(np.abs(x).max(), np.abs(y).max()))


def holm(p: Sequence[float]) -> list[float]:
    """P values after Holm's correction; those that are NaN are left out of it and stay NaN.

    statsmodels' function collects garbage first, which takes as long as all else of a claim.
    """
    values = np.asarray(p, dtype=float)
    known = ~np.isnan(values)
    corrected = np.full(values.shape, math.nan)
    if known.any():
        order = np.flatnonzero(known)[np.argsort(values[known])]
        raised = np.maximum.accumulate(values[order] * np.arange(order.size, 0, -1))
        corrected[order] = np.minimum(raised, 1.0)
    return [float(v) for v in corrected]


def false_discovery(p: Sequence[float]) -> list[float]:
    """P values after the correction of Benjamini and Hochberg (1995); NaN likewise stays NaN.

    Of all with a value up to q a share of at most q is expected to be wrong, where they are
    independent or depend on each other positively.
    """
    values = np.array(p, dtype=float)
    known = ~np.isnan(values)
    if known.any():
        values[known] = stats.false_discovery_control(values[known])
    return [float(v) for v in values]


# ---- equivalence ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equivalence:
    """Whether a mean difference lies between two bounds.

    Attributes:
        n: pairs.
        mean: mean difference.
        std: standard deviation of the differences.
        low: of the interval that the two one-sided tests ask of (confidence ``1 - 2 alpha``).
        high: likewise.
        p_inside: of the two one-sided tests: small where the difference lies inside.
        p_outside: of the test that it lies beyond one of them: small where it lies outside.
        exact: the differences do not vary: ``p`` are 0 or 1, and nothing was tested, but for
        step: of a coarse metric, where one of them is that of :func:`tie_chance`; else 0.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    p_inside: float
    p_outside: float
    exact: bool
    step: float = 0.0


def equivalence(
    d: ArrayLike, lower: float, upper: float, alpha: float, scale: float, step: float = 0.0
) -> Equivalence:
    """Two one-sided paired t tests (Schuirmann 1987), and the same for the opposite.

    Args:
        d: differences, one a pair; at least one.
        lower: bound, may be ``-inf``.
        upper: bound, may be ``inf``.
        alpha: level; the interval has confidence ``1 - 2 alpha``.
        scale: size of the numbers whose differences these are, to tell rounding from variation.
        step: of a coarse metric (:func:`resolution`), in the unit of the differences.
    """
    x = np.asarray(d, dtype=float)
    mean = float(x.mean())
    if x.size == 1:
        return Equivalence(1, mean, *[math.nan] * 5, exact=False)
    if _constant(x, scale):
        inside = bool((x >= lower).all() and (x <= upper).all())
        p = float(tie_chance(_gap(mean, lower, upper), step, x.size))
        p = (p, 1.0) if inside else (1.0, min(1.0, _sides(lower, upper) * p))
        return Equivalence(x.size, mean, 0.0, mean, mean, *p, exact=True, step=step)
    about = _describe(x)
    low, high = about.tconfint_mean(alpha=2 * alpha)
    below = float(about.ttest_mean(upper, alternative="smaller")[1])
    above = float(about.ttest_mean(lower, alternative="larger")[1])
    if math.isfinite(lower) and math.isfinite(upper):
        inside = float(ttost_paired(x, np.zeros_like(x), lower, upper)[0])
    else:
        inside = max(below, above)
    # Beyond either bound: two chances, so both count (Bonferroni).
    sides = [1 - p for p, bound in ((below, upper), (above, lower)) if math.isfinite(bound)]
    outside = min(1.0, len(sides) * min(sides, default=1.0))
    return Equivalence(
        x.size, mean, float(about.std), float(low), float(high), inside, outside, False
    )


def _gap(mean: float, lower: float, upper: float) -> float:
    """How far a mean is from the nearest of two bounds, on whichever side of it."""
    return min(abs(mean - lower), abs(upper - mean))


def _sides(lower: float, upper: float) -> int:
    """How many of two bounds there are."""
    return sum(map(math.isfinite, (lower, upper)))


def power_inside(
    n: int, mean: float, std: float, lower: float, upper: float, alpha: float
) -> float:
    """Power of the two one-sided tests by the noncentral t distribution (Phillips 1990).

    ``mean`` and ``std`` are the true ones of ``n`` differences; a bound may be infinite.
    """
    df = n - 1
    critical = float(stats.t.ppf(1 - alpha, df))
    scale = std / math.sqrt(n)
    above = _reaches(critical, df, (mean - lower) / scale)
    below = _reaches(critical, df, (upper - mean) / scale)
    return max(0.0, above + below - 1.0)


def _reaches(critical: float, df: int, noncentrality: float) -> float:
    """P(T > critical) for a noncentral t."""
    if noncentrality > 100:
        return 1.0
    if noncentrality < -30:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = float(stats.nct.sf(critical, df, noncentrality))
    return found if math.isfinite(found) else float(noncentrality > critical)


def seeds_for(
    d: Equivalence, lower: float, upper: float, alpha: float, many: int = 1
) -> int | None:
    """How many pairs would decide, if mean and spread are what was observed.

    Decide: power :data:`POWER` for whichever side the observed mean lies on.

    Args:
        d: what was observed.
        lower: bound, may be infinite.
        upper: bound, may be infinite.
        alpha: level.
        many: comparisons that share the level where the difference lies outside.

    Returns:
        The number; None where more than :data:`MAX_SEEDS` would be needed, or nothing varies.
    """
    inside = lower < d.mean < upper
    level = alpha if inside else alpha / many / max(_sides(lower, upper), 1)
    if d.exact and d.step > 0:
        return _ties_for(_gap(d.mean, lower, upper) / d.step, level)
    if not (d.n > 1 and d.std > 0):
        return None
    if inside:
        return _first(lambda n: power_inside(n, d.mean, d.std, lower, upper, alpha))
    far = max(lower - d.mean, d.mean - upper) / d.std
    return _first(
        lambda n: _reaches(float(stats.t.ppf(1 - level, n - 1)), n - 1, far * math.sqrt(n))
    )


def _ties_for(steps: float, level: float) -> int | None:
    """How many equal numbers of a coarse metric, so many steps from the bound, would decide."""
    if steps <= 0:
        return None
    n = 2 + math.floor(-math.log(2 * level) / math.log1p(2 * steps))
    return n if n <= MAX_SEEDS else None


GUESS = 0.8
"""Confidence of a range for a number of seeds."""

Range = tuple[int | None, int | None]
"""From and to; None stands for more than :data:`MAX_SEEDS`."""


def seeds_range(d: Equivalence, lower: float, upper: float, alpha: float, many: int = 1) -> Range:
    """Between which numbers of pairs lies the one that would decide.

    Few pairs say little of how far the mean is from the bound in units of the spread, which decides
    the number: :func:`seeds_for` at both ends of the interval of this ratio by the noncentral t
    distribution (confidence :data:`GUESS`; exact for one bound, near the bounds for two).
    """
    if d.exact:
        number = seeds_for(d, lower, upper, alpha, many)
        return number, number
    gap = _gap(d.mean, lower, upper)
    if not (d.n > 1 and d.std > 0 and gap > 0):
        return None, None
    root = math.sqrt(d.n)
    t = min(gap / d.std * root, 50.0)  # beyond it two pairs decide
    ends = [_noncentrality(t, d.n - 1, p) / root for p in _tails(GUESS)]
    weak, strong = (
        seeds_for(replace(d, std=gap / effect), lower, upper, alpha, many) if effect > 0 else None
        for effect in ends
    )
    return strong, weak


def _tails(confidence: float) -> tuple[float, float]:
    return (1 + confidence) / 2, (1 - confidence) / 2


def _noncentrality(t: float, df: int, p: float) -> float:
    """The noncentrality of which a t value is the ``p`` quantile."""
    far = 10 + 3 * abs(t)

    def excess(noncentrality: float) -> float:
        return 1 - _reaches(t, df, noncentrality) - p

    found: Any = optimize.brentq(excess, t - far, t + far, xtol=1e-6)
    return float(found)


def _first(power: Callable[[int], float]) -> int | None:
    """The smallest number of pairs with enough power, which grows with it."""
    numbers = range(2, MAX_SEEDS + 1)
    found = bisect.bisect_left(numbers, POWER, key=power)
    return numbers[found] if found < len(numbers) else None


# ---- proportions ---------------------------------------------------------------------------------


def proportion_interval(count: int, n: int, alpha: float) -> tuple[float, float]:
    """The interval of a proportion by Clopper and Pearson, each side at level ``alpha``."""
    ends = np.asarray(proportion_confint(count, n, alpha=2 * alpha, method="beta"), dtype=float)
    return float(ends[0]), float(ends[1])


def proportion_tests(
    count: ArrayLike, n: ArrayLike, low: float, high: float
) -> tuple[Floats, Floats]:
    """P values of proportions by the exact binomial tests that Clopper and Pearson invert.

    Args:
        count: runs that have the property; a number or several.
        n: all runs; at least one.
        low: bound; below 0 where there is none.
        high: bound; 1 or more where there is none.

    Returns:
        P that it lies between the bounds, and p that it lies beyond one of them (of two bounds
        each has a chance, so both count: Bonferroni).
    """
    k, runs = np.asarray(count), np.asarray(n)
    inside, beyond = [np.zeros(k.shape)], [np.ones(k.shape)]
    if low >= 0:
        inside.append(stats.binom.sf(k - 1, runs, low))
        beyond.append(stats.binom.cdf(k, runs, low))
    if high < 1:
        inside.append(stats.binom.cdf(k, runs, high))
        beyond.append(stats.binom.sf(k - 1, runs, high))
    sides = max(len(beyond) - 1, 1)
    return np.max(inside, axis=0), np.minimum(1.0, sides * np.min(beyond, axis=0))


# ---- ties ----------------------------------------------------------------------------------------


def overlap(
    values: pd.Series, others: pd.Series, confidence: float = CONFIDENCE, statistic: str = "mean"
) -> bool:
    """Whether two cells do not differ significantly.

    Args:
        values: of one cell, by pairing key.
        others: of the other one.
        confidence: of the interval, and 1 less the level of the tests.
        statistic: what the cells are summarised by, ``mean`` or ``median``.

    Returns:
        For means: True where the interval of their difference contains zero, paired where at least
        two members belong together, else by Welch's test. For medians likewise by rank tests:
        Wilcoxon's of the pairs (see :func:`_medians_alike` where these are few), else that of
        Mann and Whitney. Pairs that differ by a constant differ, unless a coarse metric makes them
        equal by chance. False where two cells of single runs are compared: there is no test.
    """
    both = values.index.intersection(others.index)
    if len(both) >= 2:
        x, y = (np.asarray(side[both], dtype=float) for side in (values, others))
        if statistic == "median":
            return _medians_alike(x, y, confidence)
        found = paired(x, y, confidence)
        return _tied(x, y, confidence) if found.exact else found.low <= 0 <= found.high
    if min(len(values), len(others)) < 2:
        return False
    if statistic == "median":
        return bool(stats.mannwhitneyu(values, others).pvalue >= 1 - confidence)
    test = stats.ttest_ind(values, others, equal_var=False)
    interval = test.confidence_interval(confidence)
    return bool(interval.low <= 0 <= interval.high)


def _tied(x: Floats, y: Floats, confidence: float) -> bool:
    """Whether pairs that differ by a constant are equal, or may be so by chance."""
    d = np.abs(x - y)
    chance = 2 * float(tie_chance(d.mean(), resolution(x, y), d.size))
    return float(d.max()) <= ROUNDING * size(x, y) or chance >= 1 - confidence


def contenders(
    others: Iterable[Key], many: int, alike: Callable[[Key, float], bool], confidence: float
) -> set[Key]:
    """Which cells may be as good as the one that looks best, in spite of its having been chosen.

    A cell is out where a two-sided test tells it from the best one at the level
    ``2 (1 - confidence) / (m (k - 1))`` of ``k`` cells of which ``m`` are still in, the best one
    included; this is repeated with the smaller ``m`` until no further cell is out.

    With probability ``confidence`` no cell that is truly as good as the best is out, whatever the
    variances and correlations: while all these ``b`` cells are in, ``m >= b``, and one of
    ``b (k - 1)`` one-sided tests would have to err (Bonferroni over the choice of the best, as in
    the comparison with the best of Hsu 1981, Ann. Statist. 9; stepwise as Holm 1979). For two cells
    it is the plain test. Hsu's own test pools the variances, which differ between the settings of
    an ablation by orders of magnitude; Holm over all pairs tells fewer cells apart.

    Args:
        others: the cells beside the best one.
        many: how many cells there are, the best one included.
        alike: whether a cell and the best one do not differ at a confidence.
        confidence: that all marks of the metric have together.
    """
    left, before = set(others), -1
    while left and len(left) != before:
        before = len(left)
        level = 2 * (1 - confidence) / ((before + 1) * (many - 1))
        left = {key for key in left if alike(key, 1 - level)}
    return left


def _medians_alike(x: Floats, y: Floats, confidence: float) -> bool:
    """Whether paired numbers that may be skewed do not differ significantly.

    The test is Wilcoxon's signed rank test. Fewer pairs than it needs to reach its level (six at
    95 %) differ if all pairs point one way and the t interval of the logarithms of their ratios
    excludes zero.
    """
    d, level, scale = x - y, 1 - confidence, size(x, y)
    if _constant(d, scale):
        return _tied(x, y, confidence)
    if 2.0 ** (1 - d.size) < level:
        return bool(_signed_rank(d) >= level)
    if d.min() <= 0 <= d.max():
        return True
    if min(x.min(), y.min()) > 0:
        d, scale = np.log(x) - np.log(y), 1.0
    if _constant(d, scale):
        return False
    test: Any = stats.ttest_1samp(d, 0.0)
    return bool(test.pvalue >= level)


MOST_SIGNS = 13
"""Pairs of which every choice of signs is tried; scipy's limit of 9999 leaves no more."""


def _signed_rank(d: Floats) -> float:
    """P of Wilcoxon's test, exact for few pairs with ties or zeros among them too."""
    size = np.abs(d)
    plain = size.min() > 0 and np.unique(size).size == size.size
    method: Any = "auto" if plain or d.size > MOST_SIGNS else stats.PermutationMethod()
    test: Any = stats.wilcoxon(d, method=method)
    return float(test.pvalue)

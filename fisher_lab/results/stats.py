"""The statistics of tables and claims; scipy and statsmodels compute them.

Differences are taken between runs that share everything but the compared setting (and so the
seed). Two samples that do not vary have no distribution to test: they are compared as numbers and
the answer says ``exact``.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
POWER = 0.8
MAX_SEEDS = 1000
"""The largest number of seeds that is worth naming."""

ROUNDING = 1e-12
"""Numbers that vary by less than this fraction of their size do not vary: the order of summation
causes such differences, and no test should be run on them."""


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
        method: ``t`` (Student) or ``bootstrap`` (bias-corrected and accelerated, scipy).
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
    low, high = about.tconfint_mean(alpha=1 - confidence)
    if method == "bootstrap":
        with warnings.catch_warnings():
            # Few seeds give degenerate resamples; scipy then answers with NaN, which is shown.
            warnings.simplefilter("ignore")
            found = stats.bootstrap((x,), np.mean, confidence_level=confidence, rng=seed)
        low, high = found.confidence_interval
    return Summary(x.size, mean, float(about.std), float(low), float(high), median, q1, q3)


def _describe(x: Floats) -> Any:
    """By statsmodels; its cached attributes carry no types."""
    return DescrStatsW(x, ddof=1)


def _constant(x: Floats, scale: float) -> bool:
    """Whether numbers, computed from some of a size, do not vary beyond rounding."""
    return bool(x.max() - x.min() <= ROUNDING * scale)


@dataclass(frozen=True)
class Paired:
    """The difference between two paired samples.

    Attributes:
        n: pairs.
        mean: of ``a - b``.
        low: of the interval of the mean difference.
        high: likewise.
        p: two-sided, by the paired t test; NaN where there is nothing to test (see ``exact``).
        effect: mean over standard deviation of the differences (Cohen's d_z); NaN likewise.
        exact: the differences do not vary; ``mean`` is the difference.
        identical: nor are they more than rounding (:data:`ROUNDING` of the numbers' size).
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    effect: float
    exact: bool
    identical: bool = False


def paired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Paired:
    """Compare two samples whose members belong together, in the same order."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    d = x - y
    if d.size == 0:
        return Paired(0, *[math.nan] * 5, exact=False)
    mean = float(d.mean())
    if d.size == 1:
        return Paired(1, mean, *[math.nan] * 4, exact=False)
    scale = size(x, y)
    if _constant(d, scale):
        same = float(np.abs(d).max()) <= ROUNDING * scale
        return Paired(d.size, mean, mean, mean, math.nan, math.nan, exact=True, identical=same)
    test = stats.ttest_rel(x, y)
    interval = test.confidence_interval(confidence)
    effect = mean / float(d.std(ddof=1))
    return Paired(
        d.size, mean, float(interval.low), float(interval.high), float(test.pvalue), effect, False
    )


def size(x: Floats, y: Floats) -> float:
    """The largest magnitude in two samples, by which rounding is told from variation."""
    return float(max(np.abs(x).max(), np.abs(y).max()))


def holm(p: Sequence[float]) -> list[float]:
    """P values after Holm's correction; those that are NaN are left out of it and stay NaN."""
    values = np.asarray(p, dtype=float)
    known = ~np.isnan(values)
    corrected = np.full(values.shape, math.nan)
    if known.any():
        corrected[known] = multipletests(values[known], method="holm")[1]
    return [float(v) for v in corrected]


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
        exact: the differences do not vary: ``p`` are 0 or 1, and nothing was tested.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    p_inside: float
    p_outside: float
    exact: bool


def equivalence(
    d: ArrayLike, lower: float, upper: float, alpha: float, scale: float
) -> Equivalence:
    """Two one-sided paired t tests (Schuirmann 1987), and the same for the opposite.

    Args:
        d: differences, one a pair; at least one.
        lower: bound, may be ``-inf``.
        upper: bound, may be ``inf``.
        alpha: level; the interval has confidence ``1 - 2 alpha``.
        scale: size of the numbers whose differences these are, to tell rounding from variation.
    """
    x = np.asarray(d, dtype=float)
    mean = float(x.mean())
    if x.size == 1:
        return Equivalence(1, mean, *[math.nan] * 5, exact=False)
    if _constant(x, scale):
        inside = bool((x >= lower).all() and (x <= upper).all())
        p = (0.0, 1.0) if inside else (1.0, 0.0)
        return Equivalence(x.size, mean, 0.0, mean, mean, *p, exact=True)
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
    if not (d.n > 1 and d.std > 0):
        return None
    if lower < d.mean < upper:
        return _first(lambda n: power_inside(n, d.mean, d.std, lower, upper, alpha))
    level = alpha / many / max(sum(map(math.isfinite, (lower, upper))), 1)
    far = max(lower - d.mean, d.mean - upper) / d.std
    return _first(
        lambda n: _reaches(float(stats.t.ppf(1 - level, n - 1)), n - 1, far * math.sqrt(n))
    )


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


def proportion_tests(count: int, n: int, low: float, high: float) -> tuple[float, float]:
    """P values of a proportion by the exact binomial tests that Clopper and Pearson invert.

    Args:
        count: runs that have the property.
        n: all runs; at least one.
        low: bound; below 0 where there is none.
        high: bound; 1 or more where there is none.

    Returns:
        P that it lies between the bounds, and p that it lies beyond one of them.
    """
    sides = []
    if low >= 0:
        sides.append((low, "greater", "less"))
    if high < 1:
        sides.append((high, "less", "greater"))
    p = [
        [float(stats.binomtest(count, n, min(bound, 1.0), alternative=way).pvalue) for way in ways]
        for bound, *ways in sides
    ]
    inside, beyond = [one for one, _ in p], [other for _, other in p]
    return max(inside, default=0.0), min(beyond, default=1.0)


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
        Mann and Whitney. False where two cells of single runs are compared: there is no test.
    """
    both = values.index.intersection(others.index)
    if len(both) >= 2:
        x, y = (np.asarray(side[both], dtype=float) for side in (values, others))
        if statistic == "median":
            return _medians_alike(x, y, confidence)
        found = paired(x, y, confidence)
        return found.identical or found.low <= 0 <= found.high
    if min(len(values), len(others)) < 2:
        return False
    if statistic == "median":
        return bool(stats.mannwhitneyu(values, others).pvalue >= 1 - confidence)
    test = stats.ttest_ind(values, others, equal_var=False)
    interval = test.confidence_interval(confidence)
    return bool(interval.low <= 0 <= interval.high)


def _medians_alike(x: Floats, y: Floats, confidence: float) -> bool:
    """Whether paired numbers that may be skewed do not differ significantly.

    The test is Wilcoxon's signed rank test. Fewer pairs than it needs to reach its level (six at
    95 %) differ if all pairs point one way and the t interval of the logarithms of their ratios
    excludes zero.
    """
    d, level, scale = x - y, 1 - confidence, size(x, y)
    if _constant(d, scale):
        return float(np.abs(d).max()) <= ROUNDING * scale
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

"""The tests of a claim's comparisons for a fixed number of seeds.

A finding is the answer for one comparison; :mod:`fisher_lab.results.claims` makes the verdict of
them. Such a test holds its level where nobody has looked at it with fewer seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fisher_lab.results import components, stats
from fisher_lab.results.coarse import ROUNDING, resolution
from fisher_lab.results.comparisons import Bounds, Sample, samples
from fisher_lab.results.hypotheses import CHECKPOINT, FAILS, HOLDS, OPEN, Hypothesis
from fisher_lab.results.values import SEED, ResultsError


@dataclass(frozen=True)
class Finding:
    """One comparison of a hypothesis.

    Attributes:
        about: what was compared, in words.
        verdict: holds, does not hold or inconclusive, before Holm's correction.
        n: how many seeds (pairs, or runs) it rests on.
        says: the numbers in words.
        p_holds: p of the test that it holds; NaN where there was no test.
        p_fails: p of the test that it does not hold; NaN likewise.
        needed: how many seeds would decide if mean and spread stay; None where that is not known.
        between: the numbers of seeds between which the right one lies; None likewise.
        values: the numbers themselves.
        lost: state of the runs that are lost -> how many.
        seeds_at: number of comparisons that the level is divided by -> ``needed``, ``between``.
        exact: the pairs do not vary: they were compared as numbers, without a test but for chance
            ties of a coarse metric.
    """

    about: str
    verdict: str
    n: int
    says: str
    p_holds: float = math.nan
    p_fails: float = math.nan
    needed: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    between: stats.Range | None = None
    seeds_at: Callable[[int], tuple[int | None, stats.Range]] | None = None
    exact: bool = False

    @property
    def tested(self) -> bool:
        """Whether a statistical test stands behind it."""
        return not math.isnan(self.p_fails)


def findings(hypothesis: Hypothesis, runs: pd.DataFrame) -> list[Finding]:
    """All comparisons of a hypothesis with the runs that it is about: some, with its metric.

    Raises:
        ResultsError: a setting that the runs do not have.
    """
    return [judge(hypothesis, sample) for sample in samples(hypothesis, runs)]


def judge(hypothesis: Hypothesis, sample: Sample) -> Finding:
    """The answer for one comparison."""
    if sample.kind == "absent":
        return Finding(sample.about, OPEN, 0, sample.words)
    found = Finding(sample.about, OPEN, 0, "nothing to compare", lost=sample.lost)
    if sample.x.size > 0:
        found = _TESTS[sample.kind](hypothesis, sample)
    if sample.diverged:
        says = f"{len(sample.diverged)} diverged within the range"
        return Finding(found.about, FAILS, found.n, says, lost=found.lost)
    return found


# ---- pairs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairDifferences:
    """The differences of pairs, or the logarithms of their ratios, as a mean is tested.

    Attributes:
        d: one a pair.
        scale: size of the numbers whose differences these are.
        step: of a coarse metric, in the unit of the differences; 0 for others.
        as_ratio: whether they are logarithms.
    """

    d: np.ndarray
    scale: float
    step: float
    as_ratio: bool


def differences(sample: Sample) -> PairDifferences | tuple[str, str]:
    """The differences of a comparison of pairs, or a verdict and why there are none."""
    x, y = sample.x.to_numpy(), sample.y.to_numpy()
    step = resolution(x, y)
    if sample.kind == "margin":
        return PairDifferences(x - y, stats.size(x, y), step, as_ratio=False)
    if sample.kind == "factor":
        if np.array_equal(x, y) and x.size > 1 and not step:
            return HOLDS, "identical"
        if (x * y <= 0).any():
            apart = x.size > 1 and (np.sign(x) != np.sign(y)).all()
            if apart:
                return FAILS, "the sign changes: no factor holds"
            return OPEN, "zeros or signs: give a margin"
        d = np.log(np.abs(x)) - np.log(np.abs(y))
        step /= float(min(np.abs(x).min(), np.abs(y).min()))
        return PairDifferences(d, 1.0, step, as_ratio=True)
    least = min(x.min(), y.min())
    if least <= 0:
        return OPEN, "not all numbers are above 0: no ratio"
    return PairDifferences(np.log(y / x), 1.0, step / float(least), as_ratio=True)


def _pairs(hypothesis: Hypothesis, sample: Sample) -> Finding:
    found = differences(sample)
    if isinstance(found, tuple):
        verdict, says = found
        identical = verdict == HOLDS
        values = {"difference": 0.0} if identical else {}
        return Finding(
            sample.about, verdict, sample.x.size, says, values=values, lost=sample.lost,
            exact=identical,
        )  # fmt: skip
    varies = np.ptp(found.d) > ROUNDING * found.scale
    if set(sample.over) == {SEED, CHECKPOINT} and varies:
        return _over_checkpoints(sample, found, hypothesis.alpha)
    return _tested(sample, found, hypothesis.alpha)


def _over_checkpoints(sample: Sample, given: PairDifferences, alpha: float) -> Finding:
    """The tests of a mean over new checkpoints and new seeds."""
    first = sample.over.index(CHECKPOINT)
    keys = ((key[first], key[1 - first]) for key in sample.keys)
    try:
        found = components.components(dict(zip(keys, given.d.tolist(), strict=True)))
    except ResultsError as error:
        return Finding(sample.about, OPEN, sample.x.size, str(error), lost=sample.lost)
    e = components.equivalence(found, *sample.bounds, alpha)
    verdict = HOLDS if e.p_inside < alpha else FAILS if e.p_outside < alpha else OPEN
    scaled, name = (math.exp, "ratio") if given.as_ratio else (float, "difference")
    mean, low, high = (scaled(value) for value in (e.mean, e.low, e.high))
    parts = zip(("checkpoints", "seeds", "rest"), found.spread, strict=True)
    values = {"mean": mean, "low": low, "high": high}
    values |= {f"spread_{part}": value for part, value in parts} | {"df": found.df}
    says = f"{name} {mean:.4g}, {_interval(alpha)} for new checkpoints and seeds "
    says += f"[{low:.4g}, {high:.4g}] ({found.words})"
    p = (e.p_inside, e.p_outside)
    return Finding(sample.about, verdict, found.used, says, *p, values=values, lost=sample.lost)


def _tested(sample: Sample, given: PairDifferences, alpha: float) -> Finding:
    """Two one-sided tests of differences, or of logarithms of ratios, of a metric with a step."""
    about, lost, bounds, as_ratio = sample.about, sample.lost, sample.bounds, given.as_ratio
    e = stats.equivalence(given.d, *bounds, alpha, given.scale, given.step)
    scaled = math.exp if as_ratio else float
    values = {name: scaled(getattr(e, name)) for name in ("mean", "low", "high")}
    values["std"] = e.std
    name = "ratio" if as_ratio else "difference"
    if e.n == 1:
        # Nothing is known of the spread yet: two are the least that can be tested.
        says = f"{name} {values['mean']:.4g}: one seed, no test"
        return Finding(about, OPEN, 1, says, needed=2, values=values, lost=lost)
    verdict = HOLDS if e.p_inside < alpha else FAILS if e.p_outside < alpha else OPEN
    p = (e.p_inside, e.p_outside)
    if e.exact:
        worst = float(np.abs(given.d).max())
        says = f"{name} {values['mean']:.6g}, exact"
        if verdict == HOLDS and not (as_ratio and worst > 1e-9):
            says = f"exact to {worst:.2g}"
        if verdict == OPEN:
            says = f"{name} {values['mean']:.6g} {e.n} times, which may be chance: a coarse metric"
        p = p if given.step > 0 else (math.nan, math.nan)
    else:
        ends = f"[{values['low']:.4g}, {values['high']:.4g}]"
        says = f"{name} {values['mean']:.4g}, {_interval(alpha)} {ends}"

    def seeds_at(many: int) -> tuple[int | None, stats.Range]:
        known = (e, *bounds, alpha, many)
        return stats.seeds_for(*known), stats.seeds_range(*known)

    return Finding(
        about, verdict, e.n, says, *p, values=values, lost=lost, seeds_at=seeds_at, exact=e.exact
    )


def _interval(alpha: float) -> str:
    """The interval that two one-sided tests at this level use; a table's interval is wider."""
    return f"{100 * (1 - 2 * alpha):g}% interval"


# ---- numbers -------------------------------------------------------------------------------------


def _match(hypothesis: Hypothesis, sample: Sample) -> Finding:
    x, y = sample.x.to_numpy(), sample.y.to_numpy()
    relative = hypothesis.get("relative", True)
    errors = np.abs(x - y)
    if relative:
        none = np.where(errors == 0, 0.0, np.inf)
        errors = np.divide(errors, np.abs(y), out=none, where=y != 0)
    error = float(errors.max())
    verdict = HOLDS if error <= hypothesis.get("tolerance") else FAILS
    words = "relative" if relative else "absolute"
    says = f"exact to {error:.2g} ({words})" if verdict == HOLDS else f"{words} error {error:.3g}"
    values = {"error": error}
    return Finding(sample.about, verdict, x.size, says, values=values, lost=sample.lost)


def _range(hypothesis: Hypothesis, sample: Sample) -> Finding:
    x, (low, high) = sample.x.to_numpy(), sample.bounds
    verdict = HOLDS if low <= x.min() and x.max() <= high else FAILS
    says = f"from {x.min():.4g} to {x.max():.4g}"
    values = {"least": float(x.min()), "most": float(x.max())}
    return Finding(sample.about, verdict, x.size, says, values=values, lost=sample.lost)


# ---- shares --------------------------------------------------------------------------------------


def _proportion(hypothesis: Hypothesis, sample: Sample) -> Finding:
    """Whether the proportion of some runs lies between two bounds."""
    count, n, bounds, alpha = int(sample.x.sum()), sample.x.size, sample.bounds, hypothesis.alpha
    verdict, low, high = _proportion_verdict(count, n, bounds, alpha)
    tests = stats.proportion_tests(count, n, *bounds)
    p = float(tests[0]), float(tests[1])
    says = f"{count} of {n} {sample.words}: {count / n:.0%}, {_interval(alpha)} "
    says += f"[{low:.0%}, {high:.0%}]"
    values = {"share": count / n, "low": low, "high": high}

    def runs_at(share: float, many: int) -> int | None:
        """How many runs would decide if that is the proportion."""
        numbers = np.arange(n + 1, stats.MAX_SEEDS + 1)
        p_holds, p_fails = stats.proportion_tests(np.round(share * numbers), numbers, *bounds)
        decided = (p_holds < alpha) | (p_fails < alpha / many)
        return int(numbers[decided.argmax()]) if decided.any() else None

    def seeds_at(many: int) -> tuple[int | None, stats.Range]:
        ends = stats.proportion_interval(count, n, (1 - stats.GUESS) / 2)
        some = [runs_at(share, many) for share in (*ends, count / n)]
        # Where a bound lies within the interval no number is enough for a proportion near it.
        past = any(0 <= one < 1 and ends[0] <= one <= ends[1] for one in bounds)
        known = sorted(filter(None, some)) or [None]
        return some[-1], (known[0], None if past or None in some else known[-1])

    return Finding(
        sample.about, verdict, n, says, *p, values=values, lost=sample.lost, seeds_at=seeds_at
    )


def _proportion_verdict(
    count: int, n: int, bounds: Bounds, alpha: float
) -> tuple[str, float, float]:
    """The verdict on a proportion and its interval, of one comparison."""
    low, high = stats.proportion_interval(count, n, alpha)
    if (low > bounds[0] or bounds[0] < 0) and (high < bounds[1] or bounds[1] >= 1):
        return HOLDS, low, high
    if stats.proportion_tests(count, n, *bounds)[1] < alpha:
        return FAILS, low, high
    return OPEN, low, high


_TESTS: dict[str, Callable[[Hypothesis, Sample], Finding]] = {
    "margin": _pairs,
    "factor": _pairs,
    "ratio": _pairs,
    "match": _match,
    "range": _range,
    "share": _proportion,
}

_PAIRED = "two one-sided paired t tests"
_RATIO = "one-sided paired t test of log ratios"
_PROPORTION = "share of runs, Clopper and Pearson"

WORDS = {
    "equivalent": _PAIRED,
    "stable": f"{_PAIRED} for every pair of values",
    "faster": _RATIO,
    "smaller": _RATIO,
    "matches": "every pair or run",
    "bounded": "every run",
    "fails": _PROPORTION,
    "share": _PROPORTION,
}
"""Type -> its test in words."""

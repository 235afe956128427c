"""How often the intervals of tables and claims cover, and how often their tests err, by simulation.

    python benchmarks/intervals.py [--sweeps 4000] [--out benchmarks/results]

Every row calls the functions that make the tables and verdicts, on numbers whose true mean is
known. Seeds are fixed; `benchmarks/results/intervals.md` has the last table.
The sequential tests have a benchmark of their own, `benchmarks/claims.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import stats as scipy_stats
from simulations import simulated

from fisher_lab.results import stats
from fisher_lab.results.coarse import tie_chance

SEED = 20261127
LEVEL = 0.05
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Row = tuple[str, ...]

NORMAL: Draw = lambda rng, shape: rng.normal(1.0, 1.0, shape)  # noqa: E731


def lognormal(spread: float) -> Draw:
    """Log-normal numbers of mean 1."""
    return lambda rng, shape: rng.lognormal(-(spread**2) / 2, spread, shape)


def percent(hits: float, sweeps: int) -> str:
    """A rate with its standard error."""
    return f"{100 * hits:.1f} ± {100 * math.sqrt(hits * (1 - hits) / sweeps):.1f}"


# ---- intervals -----------------------------------------------------------------------------------


def covered(draw: Draw, n: int, method: str, sweeps: int) -> float:
    """How often the interval of a cell covers the mean, which is 1."""
    samples = draw(np.random.default_rng([SEED, n]), (sweeps, n))
    found = [stats.summarise(x, method=method) for x in samples]
    return float(np.mean([s.low <= 1.0 <= s.high for s in found]))


def ratio_covered(spread: float, n: int, sweeps: int) -> float:
    """How often the interval of a ratio of times covers the ratio of the medians, 1.5."""
    rng = np.random.default_rng([SEED, n])
    pairs = lognormal(spread)(rng, (sweeps, 2, n))
    found = [stats.paired_ratio(1.5 * a, b) for a, b in pairs]
    return float(np.mean([p.low <= 1.5 <= p.high for p in found]))


def share_covered(share: float, n: int) -> float:
    """How often the interval of a share covers it, by enumeration."""
    counts = np.arange(n + 1)
    ends = [stats.proportion_interval(int(c), n, LEVEL / 2) for c in counts]
    inside = np.array([low <= share <= high for low, high in ends])
    return float(scipy_stats.binom.pmf(counts, n, share)[inside].sum())


def range_covered(effect: float, n: int, sweeps: int) -> float:
    """How often the range of seeds holds the number that a claim with one bound needs."""
    rng = np.random.default_rng([SEED, n])
    true = stats.Equivalence(n, effect, 1.0, 0.0, 0.0, 0.5, 0.5, exact=False)
    bounds = (0.0, math.inf, LEVEL)
    number = stats.seeds_for(true, *bounds) or math.inf
    hits = []
    for x in rng.normal(effect, 1.0, (sweeps, n)):
        e = stats.equivalence(x, *bounds, scale=1.0)
        low, high = stats.seeds_range(e, *bounds)
        hits.append((low or math.inf) <= number <= (high or math.inf))
    return float(np.mean(hits))


def interval_rows(sweeps: int) -> Iterator[Row]:
    """What is covered, by which interval, of which numbers, how often, and how often it should."""
    for n in (3, 5, 10):
        yield "mean", "t", "normal", str(n), percent(covered(NORMAL, n, "t", sweeps), sweeps), "95"
    for spread, n in itertools.product((0.1, 0.5, 1.0), (3, 5, 10)):
        numbers = f"log-normal, spread {spread:g}"
        for words, method in (("log (of times)", "log"), ("t (before)", "t")):
            rate = percent(covered(lognormal(spread), n, method, sweeps), sweeps)
            yield "mean", words, numbers, str(n), rate, "95"
    some = max(sweeps // 4, 100)
    for words, draw in (("normal", NORMAL), ("log-normal, spread 0.5", lognormal(0.5))):
        for n in (10, 20):
            rate = percent(covered(draw, n, "bootstrap", some), some)
            yield "mean", "bootstrap", words, str(n), rate, "95"
    for spread, n in itertools.product((0.5, 1.0), (3, 5)):
        numbers = f"log-normal, spread {spread:g}"
        rate = percent(ratio_covered(spread, n, sweeps), sweeps)
        yield "ratio of times", "t of logarithms", numbers, str(n), rate, "95"
    for share in (0.01, 0.3, 0.9):
        rate = f"{100 * share_covered(share, 20):.1f} (exact)"
        yield "share", "Clopper and Pearson", f"share {share:g}", "20", rate, "95"
    for effect, n in itertools.product((0.3, 0.6), (3, 5, 10)):
        rate = percent(range_covered(effect, n, some), some)
        yield "number of seeds", "range", f"{effect:g} spreads from the bound", str(n), rate, "80"


# ---- verdicts ------------------------------------------------------------------------------------


def verdicts_on_the_margin(draw: Draw, n: int, sweeps: int) -> tuple[float, float]:
    """How often equivalence is called, and its opposite, where the mean is on the margin."""
    samples = draw(np.random.default_rng([SEED, n]), (sweeps, n))
    found = [stats.equivalence(x, -1.0, 1.0, LEVEL, 1.0) for x in samples]
    holds = float(np.mean([e.p_inside < LEVEL for e in found]))
    return holds, float(np.mean([e.p_outside < LEVEL for e in found]))


def errors_of_rounded(n: int, margin: float, spread: float) -> tuple[float, float]:
    """The chance of a wrong verdict on numbers that are rounded to whole ones, by enumeration.

    Their mean is on the margin; where they vary the t test decides, else the chance of the tie.
    """
    values = np.arange(math.floor(margin - 6 * spread), math.ceil(margin + 6 * spread) + 1.0)
    ends = np.append(values - 0.5, math.inf)
    law = np.diff(scipy_stats.norm.cdf(ends, margin, spread))
    d = np.stack(np.meshgrid(*[values] * n), -1).reshape(-1, n)
    weight = np.prod(np.stack(np.meshgrid(*[law] * n), -1).reshape(-1, n), 1)
    error = d.std(1, ddof=1) / math.sqrt(n)
    off = d.mean(1) - margin
    tie, inside = error == 0, off < 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = off / error
    chance = tie_chance(np.abs(off), 1.0, n)
    side = [float(scipy_stats.t.isf(level, n - 1)) for level in (LEVEL, LEVEL / 2)]
    holds = np.where(tie, inside & (chance < LEVEL), t <= -side[0])
    fails = np.where(tie, ~inside & (2 * chance < LEVEL), t >= side[1])
    return float(weight[holds].sum()), float(weight[fails].sum())


def share_errors(n: int, low: float, high: float) -> tuple[float, float]:
    """The largest chance of a wrong "holds" and "does not hold" of a share, by enumeration."""
    counts = np.arange(n + 1)
    p = np.array([stats.proportion_tests(int(c), n, low, high) for c in counts])
    at = [scipy_stats.binom.pmf(counts, n, share) for share in (low, high)]
    holds = max(float(pmf[p[:, 0] < LEVEL].sum()) for pmf in at)
    return holds, max(float(pmf[p[:, 1] < LEVEL].sum()) for pmf in at)


def verdict_rows(sweeps: int) -> Iterator[Row]:
    """What is tested, on which numbers, and how often "holds" and "does not hold" are wrong."""
    for n in (2, 3, 5, 10):
        rates = verdicts_on_the_margin(NORMAL, n, sweeps)
        yield "mean on the margin", "normal", str(n), *(percent(r, sweeps) for r in rates)
    spreads = (0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0)
    for n, margin in itertools.product((2, 3, 4), (0.5, 1.0, 2.5, 8.0)):
        rates = [errors_of_rounded(n, margin, spread) for spread in spreads]
        worst = [f"{100 * max(side):.1f} (exact)" for side in zip(*rates, strict=True)]
        numbers = f"rounded, margin {margin:g} steps, worst of {len(spreads)} spreads"
        yield "mean on the margin", numbers, str(n), *worst
    for n, (low, high) in itertools.product((10, 30, 50), ((0.1, 0.3), (0.4, 0.6))):
        rates = [f"{100 * r:.1f} (exact)" for r in share_errors(n, low, high)]
        yield "share on a bound", f"bounds {low:g} and {high:g}", str(n), *rates


# ---- marks ---------------------------------------------------------------------------------------

Marks = Callable[[np.ndarray, int], set[int]]
"""Numbers of cells (cells, seeds) and the best cell -> the cells that are marked."""


def pair_p(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P of the paired t test; the table calls `stats.overlap`, which takes far longer."""
    test: Any = scipy_stats.ttest_1samp(x - y, 0.0, axis=-1)
    return np.asarray(test.pvalue)


def plain(x: np.ndarray, best: int) -> set[int]:
    """Every cell against the best at 95 %, as it was."""
    p = pair_p(x, x[best])
    return {k for k in range(len(x)) if k == best or p[k] >= LEVEL}


def stepwise(x: np.ndarray, best: int) -> set[int]:
    """As the table does."""
    p = pair_p(x, x[best])
    others = [k for k in range(len(x)) if k != best]
    left = stats.contenders(others, len(x), lambda k, level: p[k] >= 1 - level, 1 - LEVEL)
    return {best, *left}


def holm_of_all_pairs(x: np.ndarray, best: int) -> set[int]:
    """Holm's correction over all pairs of cells."""
    one, other = np.triu_indices(len(x), 1)
    p = pair_p(x[one], x[other])
    ranks = p.argsort().argsort()
    corrected = np.sort(p) * np.arange(len(p), 0, -1)
    out = np.maximum.accumulate(corrected)[ranks] < LEVEL
    pairs = zip(one[out], other[out], strict=True)
    return set(range(len(x))) - {int(a + b) - best for a, b in pairs if best in (a, b)}


def hsu(x: np.ndarray, best: int) -> set[int]:
    """Hsu's comparison with the best in blocks: pooled variance, Bonferroni for Dunnett.

    Its level is that of one cell, truly the best, being left out.
    """
    k, n = x.shape
    rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    df = (k - 1) * (n - 1)
    error = math.sqrt(2 * float((rest**2).sum()) / df / n)
    far = float(scipy_stats.t.isf(LEVEL / (k - 1), df)) * error
    return {key for key in range(k) if x[best].mean() - x[key].mean() <= far}


WAYS: dict[str, Marks] = {
    "each against the best (before)": plain,
    "stepwise (the table's)": stepwise,
    "Holm over all pairs": holm_of_all_pairs,
    "Hsu, pooled variance": hsu,
}


def mark_rates(way: Marks, means: np.ndarray, spreads: np.ndarray, n: int, sweeps: int) -> Row:
    """How often a cell that is as good as the best loses its mark; how many worse ones do."""
    rng = np.random.default_rng([SEED, len(means), n])
    good = np.flatnonzero(means == means.max())
    lost, told = [], []
    for _ in range(sweeps):
        x = means[:, None] + spreads[:, None] * rng.normal(size=(len(means), n))
        x += rng.normal(0.0, 5.0, n)  # what the seed does to all cells
        marked = way(x, int(x.mean(1).argmax()))
        lost.append(not marked.issuperset(good))
        told.append(1 - len(marked - set(good)) / max(len(means) - len(good), 1))
    worse = percent(float(np.mean(told)), sweeps) if len(good) < len(means) else ""
    return percent(float(np.mean(lost)), sweeps), worse


def mark_rows(sweeps: int) -> Iterator[Row]:
    """Cells, seeds, way, how often a good cell loses its mark, how many worse cells do."""
    one = np.ones(8)
    cases = [
        ("2 equal", np.zeros(2), np.ones(2)),
        ("8 equal", np.zeros(8), one),
        ("8 equal, one with ten times the spread", np.zeros(8), np.array([10.0, *one[1:]])),
        ("8 equal, spreads from 0.1 to 10", np.zeros(8), np.geomspace(0.1, 10, 8)),
        ("2 equal, 6 worse by 4 spreads", np.array([0.0, 0.0, *-4.0 * one[2:]]), one),
        ("2 equal, 6 worse by 10 spreads", np.array([0.0, 0.0, *-10.0 * one[2:]]), one),
    ]
    for (words, means, spreads), n in itertools.product(cases, (3, 5, 10)):
        for way, marks in WAYS.items():
            yield words, str(n), way, *mark_rates(marks, means, spreads, n, sweeps)


# ---- the table -----------------------------------------------------------------------------------

PARTS: tuple[tuple[str, Row, Callable[[int], Iterator[Row]]], ...] = (
    ("Intervals: how often they cover, in percent",
     ("of", "interval", "numbers", "n", "covers", "nominal"), interval_rows),
    ("Verdicts at a level of 5 %: how often they are wrong, in percent",
     ("tested", "numbers", "n", "wrong holds", "wrong does not hold"), verdict_rows),
    ("Marks of the best: how often a cell as good as the best loses its mark, which cells keep it",
     ("cells", "n", "marks", "a good cell loses its mark", "worse cells that lose it"), mark_rows),
)  # fmt: skip


def head(sweeps: int) -> list[str]:
    """The lines above the tables."""
    return [
        "# Intervals, verdicts and marks by simulation",
        "",
        f"`python benchmarks/intervals.py --sweeps {sweeps}`; rates ± standard errors.",
    ]


if __name__ == "__main__":
    simulated("intervals", "Simulate intervals, verdicts and marks.", 4000, head, PARTS)

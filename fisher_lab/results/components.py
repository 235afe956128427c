"""Differences over seeds and checkpoints: their variance components, and the interval for new ones.

A run's ``seed`` draws batches and sampling, ``model.train_seed`` the checkpoint. Runs of one
checkpoint are alike in more than what is compared, so that many seeds of few checkpoints say little
of new checkpoints: the two are random factors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fisher_lab.results.hypotheses import CHECKPOINT
from fisher_lab.results.stats import Equivalence
from fisher_lab.results.values import ResultsError


@dataclass(frozen=True)
class Components:
    """What differences of pairs over checkpoints and seeds come to.

    Attributes:
        mean: of all checkpoints.
        se: its standard error for new checkpoints and new seeds.
        df: degrees of freedom of the standard error.
        checkpoints: how many there are.
        seeds: of each checkpoint.
        spread: standard deviation between checkpoints, between seeds (those that all checkpoints
            share; NaN where each has its own) and of the rest.
        used: pairs in the computation.
    """

    mean: float
    se: float
    df: float
    checkpoints: int
    seeds: int
    spread: tuple[float, float, float]
    used: int

    @property
    def words(self) -> str:
        """The components in words."""
        names = ("between checkpoints", "between seeds", "of the rest")
        known = zip(names, self.spread, strict=True)
        parts = ", ".join(f"{value:.2g} {name}" for name, value in known if value == value)
        return f"{self.checkpoints} checkpoints with {self.seeds} seeds; spread {parts}"


def components(d: Mapping[tuple[float, float], float]) -> Components:
    """Variance components of differences, by analysis of variance.

    Where the checkpoints share their seeds, both are crossed: the variance of the mean is
    ``(MS_c + MS_s - MS_rest) / (c s)`` (Searle, Casella and McCulloch 1992, chapter 4), at least
    that of either alone, with the degrees of freedom of the fewer: Satterthwaite's are too many
    where the larger mean square has few. Where each checkpoint has seeds of
    its own, it is that of the checkpoints' means.

    Args:
        d: (checkpoint, seed) -> difference.

    Raises:
        ResultsError: fewer than two checkpoints, or seeds that some checkpoints share and not all.
    """
    by_checkpoint: dict[float, dict[float, float]] = {}
    for (checkpoint, seed), value in d.items():
        by_checkpoint.setdefault(checkpoint, {})[seed] = value
    if len(by_checkpoint) < 2:
        raise ResultsError(f"over {CHECKPOINT}: {len(by_checkpoint)} checkpoint shows no spread")
    rows = list(by_checkpoint.values())
    shared = set(rows[0]).intersection(*rows[1:])
    if len(shared) > 1 or (shared and all(len(row) == 1 for row in rows)):
        return _crossed(np.array([[row[seed] for seed in sorted(shared)] for row in rows]))
    if shared or len(set().union(*rows)) < len(d):
        raise ResultsError(f"over {CHECKPOINT}: the checkpoints share some of their seeds, not all")
    return _nested([np.array(list(row.values())) for row in rows])


def _crossed(x: np.ndarray) -> Components:
    c, s = x.shape
    mean = float(x.mean())
    rows, columns = x.mean(1) - mean, x.mean(0) - mean
    between = s * float(rows @ rows) / (c - 1)
    if s == 1:
        spread = (math.sqrt(between), math.nan, math.nan)
        return Components(mean, math.sqrt(between / c), c - 1, c, 1, spread, x.size)
    seeds = c * float(columns @ columns) / (s - 1)
    rest = x - mean - rows[:, None] - columns[None, :]
    error = float((rest**2).sum()) / ((c - 1) * (s - 1))
    total = max(between + seeds - error, between, seeds)
    spread = (
        math.sqrt(max(between - error, 0.0) / s),
        math.sqrt(max(seeds - error, 0.0) / c),
        math.sqrt(error),
    )
    se = math.sqrt(total / (c * s))
    return Components(mean, se, min(c, s) - 1, c, s, spread, x.size)


def _nested(rows: list[np.ndarray]) -> Components:
    means = np.array([row.mean() for row in rows])
    c, used = len(rows), sum(row.size for row in rows)
    within = sum(float(((row - row.mean()) ** 2).sum()) for row in rows)
    error = within / (used - c) if used > c else math.nan
    between = float(means.var(ddof=1))
    size = c / sum(1 / row.size for row in rows)  # seeds of a checkpoint, the harmonic mean
    part = between - error / size if used > c else between
    spread = (math.sqrt(max(part, 0.0)), math.nan, math.sqrt(error))
    se = math.sqrt(between / c)
    return Components(float(means.mean()), se, c - 1, c, min(map(len, rows)), spread, used)


def equivalence(found: Components, lower: float, upper: float, alpha: float) -> Equivalence:
    """Two one-sided t tests of the mean over new checkpoints and seeds, and the opposite.

    Args:
        found: the components; a standard error of 0 stands for differences that do not vary.
        lower: bound, may be ``-inf``.
        upper: bound, may be ``inf``.
        alpha: level; the interval has confidence ``1 - 2 alpha``.
    """
    mean, se, df = found.mean, found.se, found.df
    half = float(stats.t.isf(alpha, df)) * se
    with np.errstate(divide="ignore", invalid="ignore"):
        above, below = (np.divide(gap, se) for gap in (mean - lower, upper - mean))
    p = [float(stats.t.sf(t, df)) for t in (above, below)]
    sides = [1 - one for one, bound in zip(p, (lower, upper), strict=True) if math.isfinite(bound)]
    outside = min(1.0, len(sides) * min(sides, default=1.0))
    std = se * math.sqrt(found.used)
    return Equivalence(
        found.used, mean, std, mean - half, mean + half, max(p), outside, exact=False
    )

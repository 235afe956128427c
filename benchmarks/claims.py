"""Claims that are looked at after every seed: wrong verdicts, power and seeds, by simulation.

    python benchmarks/claims.py [--sweeps 10000] [--out benchmarks/results]

Every sweep is looked at with 3 to 50 seeds, by the functions of `fisher_lab.results.sequential`.
`benchmarks/results/claims.md` has the last table. Claims of the types `matches` and `bounded` are
not in it: they compare numbers, without a test.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats
from simulations import simulated

from fisher_lab.results import stats
from fisher_lab.results.sequential import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Design,
    conclude,
    means,
    shares,
    t_boundary,
)
from fisher_lab.results.sequential import (
    Path as LookPath,
)

SEED = 20261127
DESIGN = Design()
SEEDS = DESIGN.max_seeds
Row = tuple[str, ...]
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

NORMAL: Draw = lambda rng, shape: rng.normal(size=shape)  # noqa: E731


def log_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Skewed noise of mean 0 and spread 1: log-normal, spread of the logarithms 0.5."""
    s = 0.5
    x = rng.lognormal(0.0, s, shape)
    return (x - math.exp(s**2 / 2)) / math.sqrt((math.exp(s**2) - 1) * math.exp(s**2))


def student(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise with heavy tails, mean 0 and spread 1: Student's t with 5 degrees of freedom."""
    return rng.standard_t(5, shape) / math.sqrt(5 / 3)


NOISE: dict[str, Draw] = {"normal": NORMAL, "t(5)": student, "log-normal": log_normal}


def percent(hits: float, sweeps: int) -> str:
    """A rate, and its upper 95 % bound by Clopper and Pearson."""
    count = round(hits * sweeps)
    top = 1.0 if count == sweeps else scipy_stats.beta.ppf(0.95, count + 1, sweeps - count)
    return f"{100 * hits:.2f} (< {100 * top:.2f})"


def verdicts(paths: list[LookPath], design: Design, sweeps: int) -> Row:
    """Rates of "holds", "does not hold" and undecided, and the mean number of seeds."""
    verdict, n = conclude(paths, design)
    rates = [float((verdict == one).mean()) for one in (HOLDS, FAILS, UNDECIDED)]
    return (*(percent(r, sweeps) for r in rates[:2]), f"{100 * rates[2]:.1f}", f"{n.mean():.1f}")


# ---- errors --------------------------------------------------------------------------------------


def mean_rows(sweeps: int) -> Iterator[Row]:
    """Claims on means and log ratios with the mean on a bound."""
    for (words, draw), (kind, lower, upper) in itertools.product(
        NOISE.items(),
        (
            ("faster, smaller (at least)", 0.0, math.inf),
            ("faster, smaller (at most)", -math.inf, 0.0),
            ("equivalent, stable: margins 1 spread apart", -1.0, 0.0),
            ("equivalent, stable: margins 0.2 spreads apart", -0.2, 0.0),
        ),
    ):
        x = draw(np.random.default_rng([SEED, 1]), (sweeps, SEEDS))
        paths = [means(x, lower, upper, DESIGN)]
        yield kind, words, "1", *verdicts(paths, DESIGN, sweeps)


def many_rows(sweeps: int) -> Iterator[Row]:
    """Claims of several comparisons: all on the bound, or all but one far inside."""
    for many in (3, 10):
        x = NORMAL(np.random.default_rng([SEED, many]), (many, sweeps, SEEDS))
        x += NORMAL(np.random.default_rng([SEED, many + 1]), (sweeps, SEEDS))  # they share a cell
        for words, shift in (("all on the bound", 0.0), ("one on the bound, the rest hold", 50.0)):
            paths = [
                means(one - 1.0 - (i > 0) * shift, -200.0, -1.0, DESIGN, many)
                for i, one in enumerate(x)
            ]
            yield "equivalent, stable", words, str(many), *verdicts(paths, DESIGN, sweeps)


def share_rows(sweeps: int) -> Iterator[Row]:
    """Claims on shares with the share on a bound."""
    for kind, lower, upper, share in (
        ("fails (more than half)", 0.5, 1.0, 0.5),
        ("share (at least)", 0.9, 1.0, 0.9),
        ("share (at most)", 0.0, 0.05, 0.05),
        ("share (between)", 0.1, 0.3, 0.1),
        ("share (between)", 0.1, 0.3, 0.3),
    ):
        hits = np.random.default_rng([SEED, 2]).random((sweeps, SEEDS)) < share
        paths = [shares(hits, lower, upper, DESIGN)]
        yield kind, f"share {share:g}", "1", *verdicts(paths, DESIGN, sweeps)


def error_rows(sweeps: int) -> Iterator[Row]:
    """All of them."""
    yield from mean_rows(sweeps)
    yield from many_rows(sweeps)
    yield from share_rows(sweeps)


def fixed_rows(sweeps: int) -> Iterator[Row]:
    """What the test for a fixed number of seeds does if it is made at every look."""
    x = NORMAL(np.random.default_rng([SEED, 3]), (sweeps, SEEDS))
    path = means(x, 0.0, math.inf, dataclasses.replace(DESIGN, give_up=1.0))
    plain = path.lower >= scipy_stats.t.isf(DESIGN.alpha, path.n - 1)
    for last in (5, 10, 20, 50):
        seen = path.n <= last
        kept = path.held[:, seen].any(1).mean()
        rate = plain[:, seen].any(1).mean()
        yield str(last), f"{100 * rate:.1f}", f"{100 * kept:.2f}"


# ---- seeds ---------------------------------------------------------------------------------------


def effect_of(n: int, power: float = 0.8, alpha: float = DESIGN.alpha) -> float:
    """The mean, in spreads, at which the one-sided t test of n seeds has a power."""
    critical = scipy_stats.t.isf(alpha, n - 1)

    def excess(effect: float) -> float:
        return float(scipy_stats.nct.sf(critical, n - 1, effect * math.sqrt(n))) - power

    found: Any = optimize.brentq(excess, 1e-3, 20.0)
    return float(found)


def anytime_boundary(mixture: float) -> np.ndarray:
    """T of every look at which a test valid for any number of seeds decides one side.

    The scale-invariant mixture of Lai (1976) as Wang and Ramdas (2023) have it: with a normal law
    of precision ``c2`` for the mean in spreads, ``sqrt(c2 / (n + c2)) (1 - u^2 / (n + c2))^(-n/2)``
    exceeds ``1 / (2 alpha)`` with probability 2 alpha at most, on both sides together.
    """
    n = np.array(DESIGN.looks, dtype=float)
    wanted = (2 * DESIGN.alpha * np.sqrt(mixture / (n + mixture))) ** (2 / n)
    u2 = (n + mixture) * (1 - wanted)
    inside = u2 < n
    t2 = np.where(inside, u2 * (n - 1) / np.where(inside, n - u2, 1.0), np.inf)
    return np.sqrt(t2)


def seed_rows(sweeps: int) -> Iterator[Row]:
    """Power and seeds where the fixed test of some seeds has power 0.8."""
    x = NORMAL(np.random.default_rng([SEED, 4]), (sweeps, SEEDS))
    designs = {
        "spending 2, give up from 0.2 (default)": DESIGN,
        "spending 2, never give up": dataclasses.replace(DESIGN, give_up=1.0),
        "spending 1, never give up": Design(spending=1.0, give_up=1.0),
        "spending 3, give up from 0.2": Design(spending=3.0),
    }
    for fixed in (20, 30, 33, 36, 40, 45):
        moved = x + effect_of(fixed)
        for words, design in designs.items():
            verdict, n = conclude([means(moved, 0.0, math.inf, design)], design)
            power = (verdict == HOLDS).mean()
            yield words, str(fixed), f"{power:.3f}", f"{n.mean():.1f}", f"{n.mean() / fixed:.3f}"
        path = means(moved, 0.0, math.inf, dataclasses.replace(DESIGN, give_up=1.0))
        for mixture in (1.0, 10.0):
            hit = path.lower >= anytime_boundary(mixture)
            n = path.n[np.where(hit.any(1), hit.argmax(1), -1)]
            words = f"anytime-valid, mixture {mixture:g}"
            power = hit.any(1).mean()
            yield words, str(fixed), f"{power:.3f}", f"{n.mean():.1f}", f"{n.mean() / fixed:.3f}"


def tost_effect(n: int, power: float = 0.8) -> float:
    """The margins, in spreads, with which the two one-sided tests of n seeds have a power at 0."""

    def excess(margin: float) -> float:
        return stats.power_inside(n, 0.0, 1.0, -margin, margin, DESIGN.alpha) - power

    found: Any = optimize.brentq(excess, 1e-2, 20.0)
    return float(found)


def equivalence_rows(sweeps: int) -> Iterator[Row]:
    """The same of two bounds, with the mean in their middle; and of shares."""
    x = NORMAL(np.random.default_rng([SEED, 5]), (sweeps, SEEDS))
    for fixed in (33, 36, 40):
        margin = tost_effect(fixed)
        verdict, n = conclude([means(x, -margin, margin, DESIGN)], DESIGN)
        power = (verdict == HOLDS).mean()
        words = "equivalent, in the middle"
        yield words, str(fixed), f"{power:.3f}", f"{n.mean():.1f}", f"{n.mean() / fixed:.3f}"
    for bound, share in ((0.5, 0.71), (0.5, 0.75), (0.05, 0.22)):
        counts = np.arange(SEEDS + 1)
        for fixed in range(5, SEEDS + 1):
            p = scipy_stats.binom.sf(counts[: fixed + 1] - 1, fixed, bound)
            law = scipy_stats.binom.pmf(counts[: fixed + 1], fixed, share)
            if law[p < DESIGN.alpha].sum() >= 0.8:
                break
        hits = np.random.default_rng([SEED, 6]).random((sweeps, SEEDS)) < share
        verdict, n = conclude([shares(hits, bound, 1.0, DESIGN)], DESIGN)
        power = (verdict == HOLDS).mean()
        words = f"share {share:g} against {bound:g}"
        yield words, str(fixed), f"{power:.3f}", f"{n.mean():.1f}", f"{n.mean() / fixed:.3f}"


# ---- the table -----------------------------------------------------------------------------------

ERRORS = (
    "type", "numbers", "comparisons", "holds, %", "does not hold, %", "undecided, %", "mean seeds",
)  # fmt: skip
SEEDS_NAMES = ("design", "fixed test's seeds", "power", "mean seeds", "part of the fixed test's")
PARTS: tuple[tuple[str, Row, Callable[[int], Iterator[Row]]], ...] = (
    ("On the bound, where each verdict is an error: rates and their upper 95 % bounds",
     ERRORS, error_rows),
    ("The test for a fixed number of seeds, made at every look, and the sequential one",
     ("last look", "fixed, %", "sequential, %"), fixed_rows),
    ("Where the fixed test has power 0.8: one bound", SEEDS_NAMES, seed_rows),
    ("Where the fixed test has power 0.8: two bounds, and shares", SEEDS_NAMES, equivalence_rows),
)  # fmt: skip


def head(sweeps: int) -> list[str]:
    """The lines above the tables."""
    boundary = ", ".join(f"{t:.2f}" for t in t_boundary(DESIGN)[[0, 2, 7, 17, 47]])
    return [
        "# Sequential claims by simulation",
        "",
        f"`python benchmarks/claims.py --sweeps {sweeps}`; looks with 3 to {SEEDS} seeds.",
        f"The t boundary of the default design with 3, 5, 10, 20 and 50 seeds: {boundary}.",
    ]


if __name__ == "__main__":
    about = "Simulate claims that are looked at after every seed."
    simulated("claims", about, 10_000, head, PARTS)

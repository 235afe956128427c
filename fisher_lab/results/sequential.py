"""Tests that may be looked at after every seed, at a level that is true however the sweep ends.

A test for a fixed number of seeds that is made again after every further one is wrong more often
than it says (Armitage, McPherson and Rowe 1969): five times as often after 50. Here the level is
*spent* over the looks (Lan and DeMets 1983, Biometrika 70): a claim registers its design, of which
the boundaries follow, and every further seed costs a known part of the level.

Means and log ratios are tested by t statistics. Their joint law over all looks does not depend on
the spread, and under the hypothesis that the mean is the bound they are a Markov chain in one
number, so that the boundaries are exact for three seeds as for fifty (:func:`t_boundary`). Shares
are tested by their counts, whose law is enumerated (:func:`share_boundary`).

"Holds" and "does not hold" are both errors if they are wrong: each has a boundary, and each of them
is crossed wrongly with a chance of at most ``alpha``. Between both a claim that the rest of its
seeds will hardly decide is given up (:func:`wedge`); this can only make fewer errors.

Tests that are valid for any number of seeds (Lai 1976, Ann. Statist. 4; Wang and Ramdas 2023,
arXiv 2310.03722) pay for looks that are never made: for 50 seeds at the most they need more of them
and decide less often. `benchmarks/claims.py` measures both, and errors, power and seeds of the
designs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from fisher_lab.results.coarse import tie_chance

Floats = NDArray[np.float64]

CELLS = 400
"""Cells in which the law of the statistic between two looks is kept; twice as many change the first
boundaries by up to 1e-3 of them, and the others by 3e-4."""


MOST_SEEDS = 500
"""The boundaries of more looks take minutes."""


CERTAIN = 1e-12
"""A share of 0 or 1 as a bound: one run with, or without, the property refutes it."""


@dataclass(frozen=True)
class Design:
    """How a claim is tested while its seeds are run; it is to be registered before the first one.

    Attributes:
        alpha: the chance of a wrong "holds", and that of a wrong "does not hold".
        first: seeds of the first look; at least 2.
        max_seeds: seeds of the last look.
        spending: how the level is spent: the share that a share t of the seeds may spend is
            ``I_t(spending, spending)``, the distribution function of a beta law. 1 spends evenly,
            2 spends ``t ** 2 (3 - 2 t)``, most of it halfway.
        give_up: share of the seeds after which a claim may be given up; 1 for never.
    """

    alpha: float = 0.05
    first: int = 3
    max_seeds: int = 50
    spending: float = 2.0
    give_up: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a number is out of its range.
        """
        ranges = {
            "alpha": (0 < self.alpha < 0.5, "between 0 and 0.5"),
            "max_seeds": (2 <= self.max_seeds <= MOST_SEEDS, f"from 2 to {MOST_SEEDS}"),
            "first": (2 <= self.first <= self.max_seeds, "from 2 to max_seeds"),
            "spending": (0 < self.spending <= 10, "above 0, at most 10"),
            "give_up": (0 < self.give_up <= 1, "above 0, at most 1"),
        }
        for name, (right, allowed) in ranges.items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: {allowed}")

    @property
    def looks(self) -> range:
        """The numbers of seeds of all looks."""
        return range(self.first, self.max_seeds + 1)

    def spent(self, alpha: float) -> Floats:
        """The level that is spent up to every look, ``alpha`` at the last one."""
        time = np.array(self.looks) / self.max_seeds
        return alpha * special.betainc(self.spending, self.spending, time)


# ---- boundaries ----------------------------------------------------------------------------------


Crossing = Callable[[float], float]
"""u -> the chance that u at a look is larger, and that the boundary was not reached before."""


def _t_looks(design: Design, alpha: float, cells: int) -> Iterator[tuple[float, Crossing]]:
    """The boundary of every look as a t statistic, and how the chance of it was computed."""
    spent = design.spent(alpha)
    n = design.first

    def begun(u: float, n: int = n) -> float:
        return float(stats.t.sf(_t_of(np.array([u]), n)[0], n - 1))

    found = float(stats.t.isf(spent[0], n - 1))
    yield found, begun
    edges = _edges(found, n, cells)
    mass = np.diff(stats.t.cdf(_t_of(edges, n), n - 1))
    for n, level in zip(design.looks[1:], np.diff(spent), strict=True):
        middles = (edges[1:] + edges[:-1]) / 2
        law = _Transition(n - 1)

        def crossing(
            u: float, middles: Floats = middles, mass: Floats = mass, law: _Transition = law
        ) -> float:
            return float(mass @ (1 - law(middles, np.full(1, u))[:, 0]))

        def excess(u: float, level: float = level, crossing: Crossing = crossing) -> float:
            return crossing(u) - level

        top = math.sqrt(n)
        bound: Any = optimize.brentq(excess, 0.0, top, xtol=1e-12) if excess(0.0) > 0 else 0.0
        found = float(_t_of(np.array([bound], dtype=float), n)[0])
        yield found, crossing
        edges = _edges(found, n, cells)
        mass = mass @ np.diff(law(middles, edges), axis=1)


@functools.lru_cache(maxsize=256)
def _t_boundary(design: Design, alpha: float, cells: int) -> tuple[float, ...]:
    return tuple(found for found, _ in _t_looks(design, alpha, cells))


def t_boundary(design: Design, alpha: float | None = None, cells: int = CELLS) -> Floats:
    """The t statistic at which one side of a bound is decided, for every look of a design.

    For differences with their mean on the bound, and any spread, the chance that the t statistic of
    the first n of them reaches its boundary at any look is ``alpha``, and so is that of the lower
    boundary, minus this one. A mean on the other side of the bound has a smaller one.

    The method: ``u = sum(x) / sqrt(sum(x ** 2))`` has one value for each t. Given u of n numbers, u
    of n + 1 is ``(u + v) / sqrt(1 + v ** 2)`` where ``sqrt(n) v`` has Student's distribution with n
    degrees of freedom and does not depend on the numbers before: their direction is independent
    of their length. The law of u, of what has not crossed, is carried from look to look (the
    recursion of Armitage, McPherson and Rowe 1969, JRSS A 132, with t for z).

    Args:
        design: first and last look, and how the level is spent.
        alpha: the level of this side; by default the design's. A comparison of many, or one bound
            of two, has a part of it.
        cells: of the law.

    Returns:
        One number a look.
    """
    return np.array(_t_boundary(design, design.alpha if alpha is None else alpha, cells))


@functools.lru_cache(maxsize=1024)
def t_p_value(design: Design, t: float, n: int, alpha: float | None = None) -> float:
    """P of a t statistic that reaches its boundary first with n seeds.

    That is the chance, under the hypothesis that the mean is the bound, of an earlier crossing or
    of a larger statistic at this look (stage-wise ordering; Fairbanks and Madsen 1982, Biometrika
    69). It is at most ``alpha``, and below a number p with a chance of at most p.

    Args:
        design: registered.
        t: the statistic, in the direction in which it crosses; ``inf`` of pairs that do not vary.
        n: seeds of the look.
        alpha: the level of this side; by default the design's.
    """
    level = design.alpha if alpha is None else alpha
    before = design.spent(level)[n - design.first - 1] if n > design.first else 0.0
    looks = itertools.islice(_t_looks(design, level, CELLS), n - design.first, None)
    _, crossing = next(looks)
    u = math.sqrt(n) if math.isinf(t) else _u_of(t, n)
    return float(before) + crossing(u)


def _t_of(u: Floats, n: int) -> Floats:
    """The t statistics of n numbers from their u."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return u * np.sqrt((n - 1) / np.maximum(n - u**2, 0.0))


def _u_of(t: float, n: int) -> float:
    return t * math.sqrt(n / (n - 1 + t * t))


def _edges(t: float, n: int, cells: int) -> Floats:
    """Cells of u from the least to a boundary, equal in its angle; all that is far below is one."""
    root = math.sqrt(n)
    low, high = math.asin(-min(1.0, 4.5 / root)), math.asin(_u_of(t, n) / root)
    inner = root * np.sin(np.linspace(low, high, cells + 1))
    return inner if root <= 4.5 else np.concatenate([[-root], inner])


class _Transition:
    """The chance that u of n + 1 numbers is at most y, given u of n numbers."""

    NODES = np.linspace(-math.pi / 2, math.pi / 2, 20001)

    def __init__(self, n: int) -> None:
        """Tabulate Student's distribution by the angle whose tangent is v."""
        self._law = stats.t.cdf(math.sqrt(n) * np.tan(self.NODES), n)
        self._law[[0, -1]] = 0.0, 1.0

    def __call__(self, u: Floats, y: Floats) -> Floats:
        """``[len(u), len(y)]``: with v = tan(psi), u' = sqrt(1 + u^2) sin(psi + arctan(u))."""
        turn = np.arctan(u)[:, None]
        angle = np.arcsin(np.clip(y[None, :] / np.sqrt(1 + u[:, None] ** 2), -1, 1))
        above, below = math.pi - angle - turn, -math.pi - angle - turn  # the sine falls again
        law = self._of(angle - turn)
        law += np.where(above < math.pi / 2, 1 - self._of(above), 0.0)
        return law - np.where(below > -math.pi / 2, self._of(below), 0.0)

    def _of(self, angle: Floats) -> Floats:
        return np.interp(angle, self.NODES, self._law)


def _share_looks(design: Design, share: float, alpha: float) -> Iterator[tuple[int, float, Floats]]:
    """The boundary of every look as a count, what was spent before it, and the tail of its law."""
    law, left = np.ones(1), 0.0
    spent = dict(zip(design.looks, design.spent(alpha), strict=True))
    for n in range(1, design.max_seeds + 1):
        law = np.convolve(law, [1 - share, share])
        if n not in spent:
            continue
        above = np.append(np.cumsum(law[::-1])[::-1], 0.0)  # chance of at least k that are left
        bound = int(np.argmax(above <= spent[n] - left))
        yield bound, left, above
        left += float(above[bound])
        law[bound:] = 0.0


@functools.lru_cache(maxsize=256)
def _share_boundary(design: Design, share: float, alpha: float) -> tuple[int, ...]:
    return tuple(bound for bound, _, _ in _share_looks(design, share, alpha))


def share_p_value(
    design: Design, share: float, count: int, n: int, alpha: float | None = None
) -> float:
    """P of a count that reaches its boundary first with n runs, as :func:`t_p_value`.

    Args:
        design: registered.
        share: the bound that more than it is shown of. For less than it, give the share and the
            count of the runs without the property.
        count: of the runs that have the property.
        n: runs of the look.
        alpha: the level of this side; by default the design's.
    """
    looks = _share_looks(design, share, design.alpha if alpha is None else alpha)
    _, before, above = next(itertools.islice(looks, n - design.first, None))
    return before + float(above[count])


def share_boundary(
    design: Design, share: float, alpha: float | None = None
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """The counts at which a share is decided to lie below or above a bound, for every look.

    The chance that a count of runs with the property, of which the share is the bound, is at or
    beyond its boundary at any look is at most ``alpha`` on each side, by enumeration. What one look
    cannot spend, as counts are whole, the next ones may.

    Args:
        design: first and last look, and how the level is spent.
        share: the bound, between 0 and 1.
        alpha: the level of each side; by default the design's.

    Returns:
        The largest count that shows less than the share (-1: none does), and the smallest one that
        shows more (n + 1: none does), one pair a look.
    """
    alpha = design.alpha if alpha is None else alpha
    more = np.array(_share_boundary(design, share, alpha))
    less = np.array(design.looks) - np.array(_share_boundary(design, 1 - share, alpha))
    return less, more


def wedge(design: Design) -> Floats:
    """The absolute t statistic below which a claim is given up, for every look; -1: at none.

    In the scale of sums the wedge opens at ``give_up`` of the seeds, with the square of the share
    of the others that are run, and meets the boundary at the last look (an inner wedge as that of
    Pampallona and Tsiatis 1994, J. Stat. Plan. Inference 42; its form by simulation). Giving up is
    not counted on where the boundaries are computed, so that they hold without it.
    """
    time = np.array(design.looks) / design.max_seeds
    if design.give_up == 1:
        return np.full(time.shape, -1.0)
    opened = np.maximum(time - design.give_up, 0.0) / (1 - design.give_up)
    boundary = t_boundary(design)
    inner = np.minimum(boundary[-1] * opened**2 / np.sqrt(time), boundary)
    return np.where(opened > 0, inner, -1.0)


# ---- paths ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """What the looks at one comparison saw: the statistics between their boundaries.

    Every array has one number a look, up to the last one that was made, and boundaries one for
    every look of the design; those of many simulated sweeps have further axes before.

    Attributes:
        n: seeds at every look.
        lower: t statistic against the lower bound, or the count; NaN where nothing is known yet.
        upper: t statistic against the upper bound, or the count.
        holds_at: what ``lower`` has to reach at some look, and what ``upper`` has to come down to.
        fails_at: what ``lower`` has to come down to at some look, or ``upper`` has to reach.
        held: whether both have been reached.
        failed: whether one of these has been.
        hopeless: whether it has been in the wedge on a side on which it does not hold yet.
    """

    n: NDArray[np.int_]
    lower: Floats
    upper: Floats
    holds_at: tuple[Floats, Floats]
    fails_at: tuple[Floats, Floats]
    held: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    hopeless: NDArray[np.bool_]


def _path(
    statistics: tuple[Floats, Floats],
    holds_at: tuple[Floats, Floats],
    fails_at: tuple[Floats, Floats],
    scores: tuple[Floats, Floats],
    design: Design,
) -> Path:
    """Compare two statistics with their boundaries, and their scores with the wedge."""
    lower, upper = statistics
    looks = lower.shape[-1]
    inner_low, inner_high, outer_low, outer_high = (one[:looks] for one in (*holds_at, *fails_at))
    above, below = (_ever(hit) for hit in (lower >= inner_low, upper <= inner_high))
    failed = _ever((lower <= outer_low) | (upper >= outer_high))
    inner = wedge(design)[:looks]
    hopeless = (np.abs(scores[0]) < inner) & ~above | (np.abs(scores[1]) < inner) & ~below
    n = np.array(design.looks)[:looks]
    return Path(n, lower, upper, holds_at, fails_at, above & below, failed, _ever(hopeless))


def _ever(hit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.logical_or.accumulate(hit, axis=-1)


def means(
    d: ArrayLike,
    lower: float,
    upper: float,
    design: Design,
    many: int = 1,
    step: float = 0.0,
) -> Path:
    """Whether the mean of paired differences, or of log ratios, lies between two bounds.

    "Holds" needs both bounds to be passed, each at ``alpha`` (the intersection-union test of
    Schuirmann's two one-sided tests). "Does not hold" needs one to be passed outwards, at
    ``alpha`` divided by the bounds there are and by the comparisons of the claim (Bonferroni, the
    first step of the sequential Holm procedure of Ye et al. 2013, Stat. Med. 32, and all of it that
    a claim uses: it ends there).

    Args:
        d: ``[..., seeds]`` in the order in which they were run, at least ``design.first``.
        lower: bound, may be ``-inf``.
        upper: bound, may be ``inf``.
        design: registered.
        many: comparisons of the claim.
        step: of a coarse metric (:func:`fisher_lab.results.coarse.resolution`), else 0: differences
            that do not vary decide where they are not equal by chance.
    """
    x = np.asarray(d, dtype=float)[..., : design.max_seeds]
    sides = max(math.isfinite(lower) + math.isfinite(upper), 1)
    level = design.alpha / sides / many
    holds, fails = t_boundary(design), t_boundary(design, level)
    both = (_t_path(x, lower, design, level, step), _t_path(x, upper, design, level, step))
    return _path(both, (holds, -holds), (-fails, fails), both, design)


def _t_path(x: Floats, bound: float, design: Design, level: float, step: float) -> Floats:
    """The t statistics of numbers against a bound, for every look; NaN where ties may be chance."""
    looks = np.array(design.looks)[: max(x.shape[-1] - design.first + 1, 0)]
    if math.isinf(bound):
        return np.full((*x.shape[:-1], len(looks)), -bound)
    shifted = x - x[..., :1]  # for differences that are far larger than their spread
    total = np.cumsum(shifted, -1)[..., looks - 1]
    squares = np.cumsum(shifted**2, -1)[..., looks - 1]
    mean = x[..., :1] + total / looks - bound
    variance = np.maximum(squares - total**2 / looks, 0.0) / (looks - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / np.sqrt(variance / looks)
    chance = tie_chance(np.abs(mean), step, looks)
    return np.where((variance == 0) & (chance >= level), np.nan, t)


def shares(hits: ArrayLike, lower: float, upper: float, design: Design, many: int = 1) -> Path:
    """Whether the share of runs with a property lies between two bounds.

    Args:
        hits: ``[..., runs]``, whether each run has it, in the order in which they were run.
        lower: bound; 0 or less where there is none.
        upper: bound; 1 or more where there is none.
        design: registered.
        many: comparisons of the claim.
    """
    x = np.asarray(hits, dtype=float)[..., : design.max_seeds]
    n = np.array(design.looks)[: max(x.shape[-1] - design.first + 1, 0)]
    counts = np.cumsum(x, -1)[..., n - 1]
    bounds = [share if 0 < share < 1 else None for share in (lower, upper)]
    level = design.alpha / max(sum(share is not None for share in bounds), 1) / many
    holds, fails, scores = [], [], []
    for share, side in zip(bounds, (1, 0), strict=True):
        if share is None:
            never = np.full(len(design.looks), math.inf)
            holds.append(-never if side else never)
            fails.append(-never if side else never)
            scores.append(np.full(counts.shape, np.inf))
            continue
        holds.append(share_boundary(design, share)[side])
        fails.append(share_boundary(design, share, level)[1 - side])
        certain = min(share, 1 - share) <= CERTAIN  # one run refutes it, at any time
        far = (counts - n * share) / np.sqrt(n * share * (1 - share))
        scores.append(np.full(counts.shape, np.inf) if certain else far)
    return _path(
        (counts, counts),
        (holds[0], holds[1]),
        (fails[0], fails[1]),
        (scores[0], scores[1]),
        design,
    )


# ---- verdicts ------------------------------------------------------------------------------------

HOLDS, FAILS, UNDECIDED, OPEN = "holds", "does not hold", "undecided", "go on"


def conclude(paths: Sequence[Path], design: Design) -> tuple[NDArray[np.str_], NDArray[np.int_]]:
    """The verdict on a claim of some comparisons, and the seeds at which it fell.

    A claim holds when all of its comparisons have held, at whichever looks; it does not hold when
    one has failed. It is undecided when it is hopeless that the rest ever hold and none looks as if
    it failed, or after the last look.

    Args:
        paths: one a comparison, all with the same seeds and axes.
        design: registered.

    Returns:
        Verdicts and numbers of seeds, with the axes of the paths before the looks.
    """
    held = np.all([path.held for path in paths], axis=0)
    failed = np.any([path.failed for path in paths], axis=0)
    stuck = np.all([path.held | path.hopeless for path in paths], axis=0)
    ended = [held, failed, stuck]
    at = np.stack([np.where(hit.any(-1), hit.argmax(-1), hit.shape[-1]) for hit in ended])
    first = at.min(0)
    n = paths[0].n
    over = len(n) == len(design.looks)
    left = UNDECIDED if over else OPEN
    order = np.where(first == len(n), 3, at.argmin(0))
    # A look at which one comparison fails and the claim holds cannot be: it would hold at no other.
    return np.array([HOLDS, FAILS, UNDECIDED, left])[order], n[np.minimum(first, len(n) - 1)]

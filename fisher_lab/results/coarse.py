"""Coarse metrics: counts, shares of few examples and rounded numbers, which may be equal by chance.

Where the differences between two cells are the same number for every seed, a metric with many
digits is deterministic, whereas a coarse one may not be: of differences with a spread of one step
two are equal in more than a quarter of cases.
"""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-12
"""Numbers that vary by less than this fraction of their size do not vary: the order of summation
causes such differences, and no test should be run on them."""

DENOMINATOR = 1000
"""Numbers that are a fraction with at most this denominator come from a coarse metric,"""

DIGITS = 8
"""and so do numbers with at most so many digits."""


def resolution(*samples: ArrayLike) -> float:
    """The step of a metric whose values are multiples of one: counts, shares, rounded numbers.

    Args:
        samples: numbers of one metric, one sample for each cell.

    Returns:
        Where numbers vary within a sample, the greatest step of which all of their differences are
        multiples, else the step that their digits or denominators show; 0 for a metric with too
        many digits for a step.
    """
    parts = [[_fraction(float(v)) for v in np.unique(np.asarray(s, dtype=float))] for s in samples]
    known = [f for part in parts for f in part if f is not None]
    if not known or any(f is None for part in parts for f in part):
        return 0.0
    common = math.lcm(*(f.denominator for f in known))
    whole = [sorted({int(f * common) for f in part if f is not None}) for part in parts]
    gaps = [b - a for part in whole for a, b in itertools.pairwise(part)]
    return (math.gcd(*gaps) if gaps else 1) / common


def _fraction(value: float) -> Fraction | None:
    """A number as a fraction, where few digits or a small denominator are enough."""
    near = Fraction(value).limit_denominator(DENOMINATOR)
    if abs(float(near) - value) <= ROUNDING * abs(value):
        return near
    written = Decimal(repr(value))
    return Fraction(written) if len(written.as_tuple().digits) <= DIGITS else None


def tie_chance(gap: ArrayLike, step: float, n: ArrayLike) -> NDArray[np.float64]:
    """How likely ``n`` numbers of a coarse metric are all equal, and so far from their mean.

    Args:
        gap: from the value that they have to the nearest mean that they are to be told from; a
            number, or several.
        step: of the metric; 0 for one whose numbers cannot be equal by chance.
        n: how many they are.

    Returns:
        An upper bound for every distribution that is symmetric about its mean and falls off from
        it. A value that far off has at most the share ``1 / (1 + 2 gap / step)`` of the numbers,
        which a uniform distribution reaches, and all values on its side have half of them together:
        ``0.5 (1 + 2 gap / step) ** (1 - n)``.
    """
    far = np.asarray(gap, dtype=float)
    if step == 0:
        return np.zeros_like(far)
    return 0.5 * (1 + 2 * far / step) ** (1 - np.asarray(n, dtype=float))

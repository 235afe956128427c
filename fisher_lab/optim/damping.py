"""How the damping changes in a training: not at all, or by Levenberg and Marquardt's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fisher_lab.config.fields import Allowed, fraction
from fisher_lab.config.kfac import require


class DampingSchedule(Protocol):
    """Chooses the multiplier of the dampings of both factors; it starts at 1."""

    wants_ratio: bool
    """Whether the schedule needs the reduction ratio, which costs a forward pass."""

    def update(self, multiplier: float, ratio: float) -> float:
        """The next multiplier.

        Args:
            multiplier: the multiplier of the last steps.
            ratio: actual over predicted change of the loss; not finite if it is unknown.
        """
        ...


@dataclass(frozen=True)
class ConstantDamping:
    """The damping does not change."""

    wants_ratio = False

    def update(self, multiplier: float, ratio: float) -> float:
        """Returns the same multiplier."""
        return multiplier


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """More damping after steps for which the quadratic model predicted too much, else less.

    Martens & Grosse 2015, section 6.5: the multiplier grows when the reduction ratio is below
    ``low`` and shrinks when it is above ``high``. NaN and minus infinity count as low.

    Attributes:
        factor: divides or multiplies the multiplier, between 0 and 1.
        low: ratios below it increase the damping.
        high: ratios above it decrease the damping.
        smallest: lower bound of the multiplier.
        largest: upper bound of the multiplier.
    """

    factor: float = 0.77
    low: float = 0.25
    high: float = 0.75
    smallest: float = 1e-3
    largest: float = 1e6

    wants_ratio = True

    def __post_init__(self) -> None:
        require("lm_factor", self.factor, fraction())
        below = Allowed(f"a number from 0 to {self.high:g}", lambda low: 0.0 <= low <= self.high)
        require("lm_low", self.low, below)

    def update(self, multiplier: float, ratio: float) -> float:
        """Returns the next multiplier, as `DampingSchedule` says."""
        if ratio > self.high:
            return max(multiplier * self.factor, self.smallest)
        if ratio >= self.low:
            return multiplier
        return min(multiplier / self.factor, self.largest)

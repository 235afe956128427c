"""How the damping moves during a training: not at all, or by how well the last steps came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fisher_lab.config.fields import Allowed, fraction
from fisher_lab.config.kfac import require


class DampingSchedule(Protocol):
    """What multiplies the dampings of both factors; 1 at the start."""

    wants_ratio: bool
    """Whether the schedule needs the reduction ratio, which costs a forward pass."""

    def update(self, multiplier: float, ratio: float) -> float:
        """The next multiplier.

        Args:
            multiplier: the one that the last steps were made with.
            ratio: actual over predicted change of the loss; not finite where it cannot be told.
        """
        ...


@dataclass(frozen=True)
class ConstantDamping:
    """The damping stays what it is."""

    wants_ratio = False

    def update(self, multiplier: float, ratio: float) -> float:
        """The same multiplier."""
        return multiplier


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """More damping after steps that the quadratic model promised too much for, less after others.

    Martens & Grosse 2015, section 6.5: the multiplier grows where the reduction ratio is under
    ``low`` and shrinks where it is over ``high``. NaN and minus infinity count as low.

    Attributes:
        factor: what the multiplier is divided or multiplied by, between 0 and 1.
        low: ratios below it ask for more damping.
        high: ratios above it allow less.
        smallest: the multiplier stays at or above this.
        largest: and at or below this.
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
        """The next multiplier; see :class:`DampingSchedule`."""
        if ratio > self.high:
            return max(multiplier * self.factor, self.smallest)
        if ratio >= self.low:
            return multiplier
        return min(multiplier / self.factor, self.largest)

"""Bounds on the length of a step, in nats of predicted divergence per label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fisher_lab.config.fields import at_least, one_of
from fisher_lab.config.kfac import require

ClipName = Literal["unit", "kl", "trust", "none"]


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """A bound on the length of a step: on the predicted change of the model's distribution.

    The divergence between the predictions before and after a step ``d`` is, to second order,
    ``KL = d^T F d / 2`` nats per label, with ``F`` the Fisher matrix of the mean loss.

    Attributes:
        kind: ``unit`` scales the natural gradient to length 1 in the damped metric, so that the
            predicted divergence of a step is ``lr^2 / 2`` for every gradient (the step of a trust
            region with radius ``lr``). ``kl`` bounds the natural gradient of this batch, before
            momentum, with ``d^T F d`` estimated by ``lr^2 <g, u>`` (Ba, Grosse & Martens 2017,
            section 5: it costs nothing, and is an upper bound because it contains the damping).
            ``trust`` bounds the whole step with its momentum by K-FAC's own damped Fisher-vector
            product (one more product per step), whatever the rates were before. ``none`` bounds
            nothing.
        limit: largest ``d^T F d / 2``, in nats per label.
    """

    kind: ClipName = "kl"
    limit: float = 1e-4

    def __post_init__(self) -> None:
        require("clip", self.kind, one_of("unit", "kl", "trust", "none"), str)
        require("clip_limit", self.limit, at_least(0))

    def scale(self, quadratic: float) -> float:
        """The factor, at most 1, by which a step with this ``d^T F d`` is shortened.

        With ``unit``: the factor that gives it the length 1.
        """
        if self.kind == "none" or quadratic <= 0.0:
            return 1.0
        if self.kind == "unit":
            return 1.0 / math.sqrt(quadratic)
        return min(1.0, math.sqrt(2.0 * self.limit / quadratic))

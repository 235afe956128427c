"""Weighted running mean and spread in float64 (``docs/math.md``, section 9).

Sources: Welford 1962; Chan et al. 1979 for the merge, by which every update is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Weighted mean and ``M2 = sum w (x - mean)^2`` of one tensor.

    Attributes:
        mean: float64, the tensor's shape.
        m2: float64, the same shape.
        w: ``W = sum w``.
        w2: ``W2 = sum w^2``.
    """

    mean: Tensor
    m2: Tensor
    w: float
    w2: float

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> Moments:
        """Returns the moments of rows ``[c, ...]`` with weights ``[c]``, all above zero."""
        x, w = rows.double(), weights.to(rows.device, torch.float64)
        total = float(w.sum())
        by_row = w.view(-1, *[1] * (x.dim() - 1))
        mean = (x * by_row).sum(0) / total
        return cls(mean, ((x - mean).square() * by_row).sum(0), total, float(w.square().sum()))

    def merge(self, other: Moments) -> None:
        """Takes in the moments of other data; the result is that of all data together."""
        total = self.w + other.w
        delta = other.mean.to(self.mean.device) - self.mean
        self.mean += delta * (other.w / total)
        self.m2 += other.m2.to(self.m2.device)
        self.m2 += delta.square_().mul_(self.w * (other.w / total))
        self.w, self.w2 = total, self.w2 + other.w2

    def variance(self, weights: str = "frequency") -> Tensor:
        """Returns the variance.

        Args:
            weights: ``frequency`` (``w`` counts repetitions): ``M2 / max(W - 1, 1)``; ``general``:
                ``M2 / (W - W2 / W)``, zero where a single update leaves it undefined.
        """
        if weights == "frequency":
            return self.m2 / max(self.w - 1.0, 1.0)
        free = self.w - self.w2 / self.w
        return self.m2 / free if free > 1e-12 * self.w else torch.zeros_like(self.m2)

    def clone(self) -> Moments:
        """Returns a copy that shares nothing."""
        return Moments(self.mean.clone(), self.m2.clone(), self.w, self.w2)

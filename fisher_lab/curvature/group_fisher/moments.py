"""Weighted running mean and spread in float64 (``docs/math.md``, section 9).

The overlap of two tasks says how far they agree on what matters. Sources: Welford 1962; Chan et
al. 1979 for the merge, by which every update is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError


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
        """Returns the variance with ``frequency`` or ``general`` weights.

        ``frequency`` (``w`` counts repetitions) is ``M2 / max(W - 1, 1)``; ``general`` is
        ``M2 / (W - W2 / W)``, zero where a single update leaves it undefined.
        """
        if weights == "frequency":
            return self.m2 / max(self.w - 1.0, 1.0)
        free = self.w - self.w2 / self.w
        return self.m2 / free if free > 1e-12 * self.w else torch.zeros_like(self.m2)

    def clone(self) -> Moments:
        """Returns a copy that shares nothing."""
        return Moments(self.mean.clone(), self.m2.clone(), self.w, self.w2)


def overlap(first: Tensor, second: Tensor, share: float) -> dict[str, float | None]:
    """Compares two vectors of Fisher values, ``[n]`` float64 and not negative.

    ``cosine`` is of the values, ``jaccard`` of the top entries: a ``share`` of all, those above
    zero only, so that disjoint supports do not share their zeros. Both are None where a vector has
    no entry above zero.

    Raises:
        CurvatureError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise CurvatureError(f"share: {share}; allowed: above 0, at most 1")
    if float(first.max()) <= 0 or float(second.max()) <= 0:
        return {"cosine": None, "jaccard": None}
    # The vectors are scaled first: squares of Fisher values of 1e-200 would vanish.
    x, y = first / first.max(), second / second.max()
    cosine = float(x @ y) / float((x @ x).sqrt() * (y @ y).sqrt())
    count = max(1, round(share * len(x)))
    top_first, top_second = (_top(values, count) for values in (first, second))
    both = float((top_first & top_second).sum())
    return {"cosine": cosine, "jaccard": both / float((top_first | top_second).sum())}


def by_element(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the means of two tasks as vectors over the elements of all their parameters.

    Raises:
        CurvatureError: a parameter has another shape in the other task.
    """
    sizes = {name: mean.numel() for name, mean in {**first, **second}.items()}
    left, right = (
        torch.cat(
            [
                means[name].flatten().cpu()
                if name in means
                else torch.zeros(size, dtype=torch.float64)
                for name, size in sorted(sizes.items())
            ]
        )
        for means in (first, second)
    )
    if len(left) != len(right):
        raise CurvatureError("task: the two hold parameters of other shapes")
    return left, right


def _top(values: Tensor, count: int) -> Tensor:
    """Marks the ``count`` largest entries above zero; the first of equal ones."""
    order = values.argsort(descending=True, stable=True)[:count]
    marked = torch.zeros(len(values), dtype=torch.bool)
    marked[order] = True
    return marked & (values > 0)

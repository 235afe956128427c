"""How far two tasks agree on what matters (``docs/math.md``, section 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError


def overlap(first: Tensor, second: Tensor, share: float) -> dict[str, float | None]:
    """Compares two vectors of Fisher values.

    Args:
        first: ``[n]`` float64, not negative.
        second: ``[n]`` likewise.
        share: of the entries, above 0 and at most 1: what counts as the top.

    Returns:
        ``cosine`` of the values and ``jaccard`` of the top entries (those above zero only, so that
        disjoint supports do not share their zeros); None where a vector has no entry above zero.

    Raises:
        CurvatureError: the share is out of range.
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


def by_group(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Returns the scores of two tasks as vectors over the groups of both."""
    names = sorted(set(first) | set(second))
    left, right = (
        torch.tensor([scores.get(name, 0.0) for name in names], dtype=torch.float64)
        for scores in (first, second)
    )
    return left, right


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

"""The loss along directions: how long a step should be, and what it is worth on other batches.

A step of length ``t`` along a direction ``d`` takes the parameters from ``theta`` to
``theta - t d``; the natural gradient, the gradient and its sign are such directions. The length is
found by a search that encloses the lowest loss of one half of the held-out batches, and judged on
the other half, so that the choice does not flatter it. Differences are taken batch by batch, which
leaves out what makes one batch harder than another. ``docs/math.md``, section 10.

    sums of every batch at theta - t d -> :func:`search` -> a length -> :class:`MeanChange`

Shapes: ``B`` batches; sums of losses and labels are float64 arrays ``[B]``, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor, nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator, Progress, no_progress
from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.evaluation_mode import evaluating
from fisher_lab.curvature.linalg import blocks
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.wrappers import unwrap

Array = NDArray[np.float64]
Direction = Mapping[str, Tensor]
"""Name in ``named_parameters()`` -> a tensor of the parameter's shape, of any dtype."""

OWN, CHOOSING, JUDGING = "own", "choosing", "judging"
"""Sets of batches: those that the directions were computed from, and the two held-out halves."""

CONFIDENCE = 0.95
"""Of the intervals."""

FIRST_MOVE = 5e-3
"""A search without a given start begins with a step of this part of the parameters' norm."""

STRIDE = 2.0
"""Ratio of two neighbouring lengths while the lowest loss is being enclosed."""

MOST_STRIDES = 60
"""Strides up or down after which a search gives up."""

SMALL, ROUNDING = 1e-4, 1e-7
"""Parts of the loss: smaller changes are linear in the length, or cannot be told from rounding."""


@dataclass(frozen=True)
class BatchSums:
    """Losses of some batches, each summed over the labels of its batch.

    Attributes:
        losses: ``[B]``, in nats.
        labels: ``[B]``, how many labels each batch has.
    """

    losses: Array
    labels: Array


@dataclass(frozen=True)
class MeanChange:
    """A mean per label with its standard error over batches.

    Attributes:
        mean: in nats a label.
        se: its standard error; NaN with fewer than two batches.
        n: batches that have labels.
    """

    mean: float
    se: float
    n: int

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the interval by Student's t with ``n - 1`` degrees of freedom; NaN for n < 2."""
        if self.n < 2:
            return math.nan, math.nan
        half = float(stdtrit(self.n - 1, 0.5 + confidence / 2)) * self.se
        return self.mean - half, self.mean + half


def mean_change(changes: Array, labels: Array) -> MeanChange:
    """Returns the mean change per label, and its standard error over batches.

    The mean is the ratio ``sum_b c_b / sum_b n_b``, the error that of a ratio estimator (Cochran
    1977, equation 6.13, without a finite population): the usual one where all batches have as many
    labels.

    Args:
        changes: ``[B]``, changes of the summed losses.
        labels: ``[B]``, labels of each batch; batches without any are left out.
    """
    changes, labels = changes[labels > 0], labels[labels > 0]
    n, total = len(labels), float(labels.sum())
    if n == 0:
        return MeanChange(math.nan, math.nan, 0)
    mean = float(changes.sum()) / total
    if n == 1:
        return MeanChange(mean, math.nan, 1)
    spread = float(np.square(changes - mean * labels).sum())
    return MeanChange(mean, math.sqrt(n / (n - 1) * spread) / total, n)


# ---- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """What a search ended in.

    Attributes:
        length: of the lowest value; 0 where no length that was tried is lower than standing still.
        edge: "" where the lowest value is enclosed by higher ones on both sides; ``zero`` where the
            search came to 0, ``longest`` where the values still fell at the longest step tried.
    """

    length: float
    edge: str = ""


def search(
    value: Callable[[float], float], start: float, *, scale: float = 0.0, refinements: int = 1
) -> SearchResult:
    """Finds a length at which a function is lowest, between two lengths at which it is higher.

    From ``start`` lengths are doubled or halved until the lowest value has a higher one on either
    side; then parabolas through the three narrow it down. There is no grid that it could end at the
    edge of; where it gives up after :data:`MOST_STRIDES`, the answer says so.

    Args:
        value: the change at a length above 0, with 0 for the length 0. A value that is not finite
            counts as higher than all others.
        start: the first length, above 0.
        scale: size of what changes; :data:`SMALL` and :data:`ROUNDING` are parts of it.
        refinements: how many parabolas.
    """
    known: dict[float, float] = {0.0: 0.0}

    def at(t: float) -> float:
        if t not in known:
            found = value(t)
            known[t] = found if math.isfinite(found) else math.inf
        return known[t]

    best = _first_lower(at, start, scale)
    if best is None:
        return SearchResult(0.0, "zero")
    strides = 0
    while at(best * STRIDE) < at(best):
        best, strides = best * STRIDE, strides + 1
        if strides == MOST_STRIDES:
            return SearchResult(best, "longest")
    while at(best / STRIDE) <= at(best):
        best /= STRIDE
    for _ in range(refinements):
        t = _lowest_of_parabola(known, best)
        if t is None:
            break
        best = t if at(t) < at(best) else best
    return SearchResult(best)


def _first_lower(at: Callable[[float], float], start: float, scale: float) -> float | None:
    """The first of ever shorter lengths whose value is below 0; None where 0 is the lowest.

    It is where a value is within rounding of 0, or small and proportional to the length: then the
    function rises from the beginning.
    """
    t = start
    while abs(at(t)) <= ROUNDING * scale and t < start * STRIDE**MOST_STRIDES:
        t *= STRIDE**2  # too short to be seen
    for _ in range(MOST_STRIDES // 2):
        if at(t) < -ROUNDING * scale:
            return t
        shorter = t / STRIDE**2
        proportional = at(shorter) > 0.9 * at(t) / STRIDE**2
        if at(t) <= ROUNDING * scale or (at(t) < SMALL * scale and proportional):
            return None
        t = shorter
    return None


def _lowest_of_parabola(known: Mapping[float, float], best: float) -> float | None:
    """The lowest point of the parabola through the best length and both its neighbours.

    None where a neighbour is not finite, or the point is one that is known already.
    """
    order = sorted(known)
    place = order.index(best)
    low, high = order[place - 1], order[place + 1]
    left, right = known[low] - known[best], known[high] - known[best]
    if not math.isfinite(right) or not math.isfinite(left):
        return best * math.sqrt(high / best)
    a, b = best - low, high - best
    bottom = a * right + b * left
    if bottom <= 0:
        return None
    t = best + 0.5 * (b * b * left - a * a * right) / bottom
    near = 1e-3 * best
    return t if min(abs(t - x) for x in (low, best, high)) > near else None


# ---- moving a model ------------------------------------------------------------------------------


@contextmanager
def moved_along(model: nn.Module, direction: Direction) -> Iterator[Callable[[float], float]]:
    """Moves a model's parameters along a direction, and puts them back exactly, also after errors.

    One copy of the parameters that move is kept; what is added to them is computed in float64 and
    rounded to their dtype once.

    Args:
        model: whose parameters move.
        direction: along which; parameters that it does not name stay.

    Yields:
        ``move(t)``: takes the parameters to ``theta - t d``, from wherever they are, and returns
        which part of the step was left by rounding: ``<theta - theta_t, d> / (t <d, d>)``, 1 where
        nothing was lost.

    Raises:
        LayerError: the direction has a name or a shape that the model has not.
    """
    parameters = dict(unwrap(model).named_parameters())
    for name, value in direction.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(value.shape):
            has = "no such parameter" if shape is None else f"the shape {shape}"
            raise LayerError(f"direction: {name} {tuple(value.shape)}; the model has {has}")
    kept = {name: parameters[name].detach().clone() for name in direction}
    square = sum(float(value.double().square().sum()) for value in direction.values())

    def move(t: float) -> float:
        taken = 0.0
        with torch.no_grad():
            for name, value in direction.items():
                taken += _move(parameters[name].data, kept[name], value, t)
        return taken / (t * square) if t * square > 0 else 1.0

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def _move(parameter: Tensor, kept: Tensor, value: Tensor, t: float) -> float:
    """Moves one parameter, a block of rows at a time; returns ``<kept - moved, value>``."""
    parameter, kept, value = (
        x.unsqueeze(0) if x.dim() == 0 else x for x in (parameter, kept, value)
    )
    taken = 0.0
    for rows in blocks(len(kept), 24 * max(kept[0].numel(), 1) if len(kept) else 1):
        start, along = kept[rows].double(), value[rows].to(kept.device).double()
        parameter[rows] = torch.sub(start, along, alpha=t).to(kept.dtype)
        taken += float(((start - parameter[rows].double()) * along).sum())
    return taken


def sums_of_batches(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None = None,
    ranks: Communicator | None = None,
) -> BatchSums:
    """Returns the losses of batches at a model's present parameters; no gradient, no dropout.

    Args:
        model: any module whose labelling is known, or any with a ``loss_fn``.
        batches: as :func:`fisher_lab.curvature.losses.prepare` gives them; on several ranks this
            rank's part of each, None where it has none.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        ranks: over which the sums are taken; collective then.
    """
    rows = []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            if batch is None or losses.is_empty(batch):
                rows.append((0.0, 0.0))
                continue
            summed = losses.compute_loss(model, batch, loss_fn)
            rows.append((float(summed.loss), float(summed.n_labels)))
    every = (ranks or Alone()).all_gather_objects(rows)
    total = np.asarray(every, dtype=np.float64).reshape(len(every), len(rows), 2).sum(axis=0)
    return BatchSums(total[:, 0], total[:, 1])


# ---- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What one length did.

    Attributes:
        length: ``t``.
        kept: which part of the step was left by rounding; see :func:`moved_along`.
        changes: set of batches -> changes of their summed losses, ``[B]``; the half that judges is
            asked about the chosen length alone.
    """

    length: float
    kept: float
    changes: Mapping[str, Array]


@dataclass(frozen=True)
class StepCurve:
    """The loss along one direction.

    Attributes:
        norm: Euclidean norm of the direction: a step of length ``t`` moves the parameters by
            ``t * norm``.
        length: the chosen length; 0 where no step lowers the loss of the half that chooses.
        edge: as in :class:`SearchResult`.
        points: every length that was tried, the shortest first.
        labels: set of batches -> labels of each, ``[B]``.
    """

    norm: float
    length: float
    edge: str
    points: tuple[Point, ...]
    labels: Mapping[str, Array]

    def at(self, length: float) -> Point:
        """Returns the point of a length that was tried, or of 0."""
        still = Point(0.0, 1.0, {name: np.zeros(len(n)) for name, n in self.labels.items()})
        return next((p for p in self.points if p.length == length), still)

    def change(self, part: str, length: float | None = None) -> MeanChange:
        """Returns the mean change of a set of batches, at the chosen length or at another one.

        NaN where the set was not asked about that length.
        """
        point = self.at(self.length if length is None else length)
        if part not in point.changes:
            return MeanChange(math.nan, math.nan, 0)
        return mean_change(point.changes[part], self.labels[part])


@dataclass(frozen=True)
class Lead:
    """Which direction the half that chooses puts first, and how far it is ahead on the other half.

    Attributes:
        first: the direction.
        rival: the other direction that comes closest to it; "" where there is none.
        margin: by how much the change of ``first`` is lower than the rival's, paired by batch;
            above 0 it is ahead.
    """

    first: str
    rival: str
    margin: MeanChange

    @property
    def certain(self) -> bool:
        """Whether the interval of the margin lies above 0: then it is ahead of *every* other."""
        return self.margin.interval()[0] > 0


@dataclass(frozen=True)
class StepCurves:
    """The loss along several directions, on the same batches.

    Attributes:
        curves: by name.
        before: set of batches -> its sums before any step.
    """

    curves: Mapping[str, StepCurve]
    before: Mapping[str, BatchSums] = field(repr=False)

    def difference(self, one: str, other: str) -> MeanChange:
        """Returns the judged change of one direction minus that of another, paired by batch."""
        a, b = self.curves[one], self.curves[other]
        taken = a.at(a.length).changes[JUDGING] - b.at(b.length).changes[JUDGING]
        return mean_change(taken, self.before[JUDGING].labels)

    def lead(self) -> Lead:
        """Returns which direction is ahead, and of whom.

        The first is named by the half that chose the lengths, the margin is measured on the other.
        To be ahead of all others at a level it has to be ahead of each at that level (an
        intersection-union test, Berger 1982), so that nothing is corrected for their number.
        """
        first = min(self.curves, key=lambda name: self.curves[name].change(CHOOSING).mean)
        margins = {n: self.difference(n, first) for n in self.curves if n != first}
        if not margins:
            return Lead(first, "", MeanChange(math.nan, math.nan, 0))

        def closeness(name: str) -> float:
            low = margins[name].interval()[0]
            return margins[name].mean if math.isnan(low) else low

        rival = min(margins, key=closeness)
        return Lead(first, rival, margins[rival])


def halves(batches: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Divides held-out batches: every other one chooses, beginning with the first."""
    return {CHOOSING: batches[0::2], JUDGING: batches[1::2]}


def step_curves(
    model: nn.Module,
    directions: Mapping[str, Direction],
    heldout: Sequence[Any],
    own: Sequence[Any] = (),
    *,
    loss_fn: LossFunction | None = None,
    starts: Mapping[str, float] | None = None,
    ranks: Communicator | None = None,
    progress: Progress = no_progress,
) -> StepCurves:
    """Returns the loss along every direction, with the length that held-out batches choose.

    The model is evaluated without dropout and left as it was found.

    Args:
        model: any module whose labelling is known, or any with a ``loss_fn``.
        directions: name -> direction; of the same parameters, where they are to be compared.
        heldout: batches; on several ranks this rank's part of each, None where it has none. With
            one batch there is no half that judges: what it would say is NaN.
        own: batches that the directions were computed from, shown beside; there may be none.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        starts: name -> first length of a search; :data:`FIRST_MOVE` where there is none.
        ranks: that work together; collective then, and their directions are the same.
        progress: shows the directions.

    Raises:
        BatchError: no label in the batches that choose.
        LayerError: a direction does not go with the model.
    """
    sets = {**halves(heldout), OWN: own}
    sets = {
        name: [None if one is None else losses.prepare(model, one, loss_fn) for one in some]
        for name, some in sets.items()
    }

    def sums(names: Sequence[str]) -> dict[str, BatchSums]:
        return {n: sums_of_batches(model, sets[n], loss_fn, ranks) for n in names}

    before = sums(list(sets))
    if not before[CHOOSING].labels.sum() > 0:
        raise BatchError("held-out batches: no label counts; allowed: at least one")
    curves = {}
    for name in progress(list(directions), "step curves", len(directions)):
        start = (starts or {}).get(name)
        curves[name] = _curve(model, directions[name], before, sums, start)
    return StepCurves(curves, before)


def _curve(
    model: nn.Module,
    direction: Direction,
    before: Mapping[str, BatchSums],
    sums: Callable[[Sequence[str]], Mapping[str, BatchSums]],
    start: float | None,
) -> StepCurve:
    """The curve of one direction, searched for on the half that chooses."""
    labels = {name: one.labels for name, one in before.items()}
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in direction.values()))
    points: dict[float, Point] = {}
    with moved_along(model, direction) as move:

        def point(t: float, *names: str) -> Point:
            kept, after = move(t), sums(names)
            changes = {name: after[name].losses - before[name].losses for name in names}
            return Point(t, kept, changes)

        def value(t: float) -> float:
            points[t] = point(t, CHOOSING, OWN)
            return mean_change(points[t].changes[CHOOSING], labels[CHOOSING]).mean

        if norm == 0:
            return StepCurve(0.0, 0.0, "zero", (), labels)
        first = _first_length(model, direction, norm) if start is None else start
        choosing = before[CHOOSING]
        scale = abs(float(choosing.losses.sum())) / float(choosing.labels.sum())
        found = search(value, first, scale=scale)
        if found.length in points:
            judged = point(found.length, JUDGING).changes
            chosen = points[found.length]
            points[found.length] = replace(chosen, changes={**chosen.changes, **judged})
    ordered = tuple(points[t] for t in sorted(points))
    return StepCurve(norm, found.length, found.edge, ordered, labels)


def _first_length(model: nn.Module, direction: Direction, norm: float) -> float:
    """A first length that moves the parameters by a small part of their norm."""
    parameters = dict(unwrap(model).named_parameters())
    size = math.sqrt(sum(float(parameters[n].detach().double().square().sum()) for n in direction))
    return FIRST_MOVE * (size or 1.0) / norm

"""Whether the two libraries agree on a question of the exam, and if not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from exam_matrices import (
    Question,
    at_once,
    by_example,
    collected,
    gauss_newton,
    headless,
    like,
    ours,
    outputs_basis,
    relative,
    theirs,
)
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac import collect, ekfac
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.likelihoods import Scored, understood

EXACT = 1e-9
VERDICTS = ("equal", "explained", "different", "excluded")

CROSS = (
    "type-2 sends one pass a class for all positions of an example at once, so that its outer "
    "products have cross terms between positions, which the expectation has not"
)
SUMS = (
    "its EKFAC squares the gradient of an example, summed over its tokens, in the eigenbasis; here "
    "that is ekfac_unit=sequence, and EKFAC by token was asked (docs/math.md, section 6)"
)
WHOLE = (
    "its EKFAC squares whole gradients with reduce too, which reach into the null space of "
    "reduce's A, where any basis is an eigenbasis; equal beside it, and in the trace"
)
COUNT = "its mean counts the labels that ignore_index leaves out, which torch's mean does not"
UNSEEN = "its type-2 and mc do not look at the labels: those that ignore_index leaves out count"
CALLS = (
    "its A is summed over the calls of a shared layer but divided by the rows of one of them, and "
    "modules with one weight are layers of their own; such models are held to the exact "
    "Gauss-Newton matrix where K-FAC is exact (one example, squared error, expand)"
)
FORWARD = "forward-only sets G to the identity: that is no Fisher matrix, and it is not offered"
FLAT = "its EKFAC takes outputs of two dimensions only"
WIDE = "type-2 would take a pass for each of over 300 numbers of an output"
WIDEST = 300


@dataclass(frozen=True)
class Outcome:
    """What came out of a question: one of ``VERDICTS``."""

    verdict: str
    error: float | None = None
    reason: str = ""


def answered(asked: Question, ignored: int | None = None, shared: bool = False) -> Outcome:
    """Compares the two libraries.

    Args:
        asked: the question.
        ignored: label that does not count.
        shared: whether a layer is called several times in a pass.
    """
    if asked.fisher == "forward-only":
        return Outcome("excluded", reason=FORWARD)
    with torch.no_grad():
        outputs = asked.model(asked.batches[0][0])
    classes = 1 if type(asked.loss).__name__ == "CrossEntropyLoss" else -1
    if asked.fisher == "type-2" and outputs.shape[classes] > WIDEST:
        return Outcome("excluded", reason=WIDE)
    if shared:
        exact = asked.fisher == "type-2" and asked.sharing == "expand" and not asked.ekfac
        if not exact or type(asked.loss).__name__ != "MSELoss":
            return Outcome("excluded", reason=CALLS)
        error = relative(ours(asked), gauss_newton(asked))
        return Outcome("equal" if error < EXACT else "different", error, "the exact Gauss-Newton")
    try:
        expected = theirs(asked)
    except ValueError as error:
        flat = "Only 2d output" in str(error)
        return Outcome("excluded", reason=FLAT if flat else f"it refuses: {error}")
    try:
        error = relative(ours(asked), expected)
    except CurvatureError as refused:
        return Outcome("excluded", reason=f"refused here: {refused}")
    if error < EXACT:
        return Outcome("equal", error)
    reason = _reason(asked, expected, ignored)
    return Outcome("explained" if reason else "different", error, reason)


def _reason(asked: Question, expected: Tensor, ignored: int | None) -> str:
    """The reason of a difference whose formula gives curvlinops' matrix; empty without any."""
    if asked.ekfac and _is(ours(asked, moments=by_example), expected):
        return SUMS
    if asked.ekfac and asked.sharing == "reduce" and _is_of_whole_gradients(asked, expected):
        return WHOLE
    if asked.fisher == "type-2":
        # Then there is no head, and the positions of an example are not told apart.
        with headless(asked.model), mock.patch(f"{collect.__name__}.by_example", lambda x, *_: x):
            if _is(ours(asked, at_once), expected):
                return CROSS
            if asked.ekfac and _is(ours(asked, at_once, by_example), expected):
                return f"{CROSS}; {SUMS}"
    if ignored is not None and asked.fisher != "empirical":
        every = [(x, y.masked_fill(y == ignored, 0)) for x, y in asked.batches]
        return UNSEEN if _is(ours(replace(asked, batches=every)), expected) else ""
    if ignored is not None and not asked.summed:
        # Of a batch with n labels, k of which count, its gradients are n/k times those of the sum.
        total = sum(y.numel() for _, y in asked.batches)
        sizes = [(y.numel(), int((y != ignored).sum())) for _, y in asked.batches]
        weights = [(n / k) ** 2 / total for n, k in sizes]
        return COUNT if _is(_weighted(asked, weights), expected) else ""
    return ""


def _is_of_whole_gradients(asked: Question, expected: Tensor) -> bool:
    """Whether EKFAC in the bases of reduce, with the moments of expand's tokens, is the matrix.

    A and G of ten examples have large null spaces. The gradient of an example, ``sum_t g_t a_t^T``,
    is no product of a mean and a sum, and has a part there; which basis it is squared in there is
    the solver's. The trace does not depend on it, nor what lies in the span of the others.
    """
    tokens = collected(replace(asked, sharing="expand")).kfac_factors

    def whole(f: LayerFactors, basis: ekfac.Eigenbasis, n: int) -> Tensor:
        own = next(x for x in tokens.values() if x.layer.weight == f.layer.weight)
        return by_example(own, basis, n) * (own.tokens / f.tokens)

    def span(f: LayerFactors, basis: ekfac.Eigenbasis, n: int) -> Tensor:
        assert f.A is not None
        assert basis.v_a is not None
        v_a, v_g = basis.v_a.contiguous(), outputs_basis(basis)
        a, g = ((v * (x.to_dense() @ v)).sum(0) for v, x in ((v_a, f.A), (v_g, f.G)))
        inside = (g > EXACT * g.max())[:, None] & (a > EXACT * a.max())
        return inside / (f.ratio * (f.n_labels if asked.summed else 1))

    found, beside, start = ours(asked, moments=whole), ours(asked, moments=span), 0
    for name, p in asked.parameters().items():
        own = slice(start, start := start + p.numel())
        if name.endswith("bias") and not asked.joint:  # by itself it has no such space
            beside[own, own] = torch.eye(p.numel()).to(found)
    same = torch.isclose(found.trace(), expected.trace(), rtol=EXACT)
    return bool(same) and _is(beside @ found @ beside, beside @ expected @ beside)


def _is(found: Tensor, expected: Tensor) -> bool:
    return relative(found, expected) < EXACT


def _weighted(asked: Question, weights: Sequence[float]) -> Tensor:
    """The matrix of a summed loss with the batches' gradient covariances weighted."""
    options = {k: v for k, v in vars(asked.loss).items() if k == "ignore_index"}
    summed = type(asked.loss)(reduction="sum", **options)
    base: Any = type(understood(summed))

    def weighted(loss: Any) -> Any:
        left = iter(weights)  # of one pass over the batches

        class OfBatch(base):
            def total(self, scored: Scored) -> Tensor:
                return super().total(scored) * next(left) ** 0.5

        return like(OfBatch, loss)

    return ours(replace(asked, loss=summed), weighted)


def summary(outcomes: Iterable[Outcome]) -> list[str]:
    """Lines: the counts, the largest error of an equal case, and the reasons with their counts."""
    outcomes = list(outcomes)
    counts = Counter(outcome.verdict for outcome in outcomes)
    lines = [", ".join(f"{counts[v]} {v}" for v in VERDICTS) + f" of {len(outcomes)} cases.", ""]
    worst = max((o.error or 0.0 for o in outcomes if o.verdict == "equal"), default=0.0)
    lines += [f"Largest relative error of an equal case: {worst:.1e} (bound {EXACT:g}).", ""]
    lines += ["Reasons:", ""]
    reasons = Counter((o.verdict, o.reason) for o in outcomes if o.reason)
    return [*lines, *(f"- {n} {verdict}: {reason}." for (verdict, reason), n in reasons.items())]

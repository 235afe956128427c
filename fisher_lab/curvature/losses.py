"""From a model and a batch to the token-summed loss that every engine differentiates.

What this module fixes (``docs/math.md``, section 1):

- the loss is a *sum* over labelled tokens, natural logarithm, computed from the logits in their
  own dtype but at least float32;
- with no label at all the loss is a zero that still touches the graph.

Which labels those are is the business of :mod:`.labels` and :mod:`.labelling`, whose names are here
as well.

Shapes: ``B`` sequences of ``S`` positions, ``C`` classes, ``N`` labelled positions of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.errors import LossError
from fisher_lab.curvature.labelling import Labelling, labelling_of, shift_of
from fisher_lab.curvature.labels import (
    IGNORE_INDEX,
    count_labels,
    example_count,
    forward,
    is_empty,
    labels_of,
    logits_of,
    loss_of,
    map_tensors,
    named_outputs,
)
from fisher_lab.curvature.likelihoods import (
    BinaryCrossEntropy,
    CrossEntropy,
    Likelihood,
    Scored,
    SquaredError,
    at_least_float32,
    behind,
    understood,
)
from fisher_lab.curvature.measurement import function_shifts
from fisher_lab.curvature.preparation import prepare
from fisher_lab.curvature.wrappers import unwrap

__all__ = [
    "IGNORE_INDEX", "BinaryCrossEntropy", "CrossEntropy", "Likelihood", "LossFunction", "Scored",
    "SquaredError", "SummedLoss", "at_least_float32", "compute_loss", "count_labels", "forward",
    "gradients_of", "is_empty", "labels_of", "likelihood_of", "logits_of", "map_tensors", "prepare",
    "score", "scorer", "shift_of", "sum_of", "summed_loss", "token_losses", "understood",
]  # fmt: skip

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, batch)``: a scalar, or unreduced losses (one a token) that are summed."""


def gradients_of(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], *, retain_graph: bool = False
) -> dict[str, Tensor]:
    """Returns the gradients of a scalar loss by the parameters' names.

    Zeros where it does not reach, or nothing is to be trained.
    """
    if not parameters or not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=retain_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def score(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> Scored:
    """Runs the model and returns logits and targets at the labelled positions.

    Args:
        model: any module whose labelling is known (``shift_of``), or any with a ``loss_fn``.
        batch: as for ``forward``; it is not changed.
        loss_fn: None for a Hugging Face model; else a :class:`Likelihood`.

    Raises:
        LossError: the labelling is not known, or the loss is no likelihood.
    """
    batch = prepare(model, batch, loss_fn)
    return likelihood_of(model, loss_fn).score(forward(model, batch), batch)


def scorer(model: nn.Module, loss_fn: LossFunction | None = None) -> CrossEntropy:
    """Returns the cross-entropy of a model, or the caller's own; errors as :func:`score`."""
    found = likelihood_of(model, loss_fn)
    if not isinstance(found, CrossEntropy):
        raise LossError(f"loss: {found.name}; allowed here: a cross-entropy")
    return found


def likelihood_of(model: nn.Module, loss_fn: LossFunction | None = None) -> Likelihood:
    """Returns the likelihood of a model, or the caller's own; errors as :func:`score`."""
    loss_fn = understood(loss_fn)
    if isinstance(loss_fn, Likelihood):
        return loss_fn
    if loss_fn is not None:
        raise LossError(
            f"loss: {loss_fn!r} gives no logits and targets; allowed here: "
            "fisher_lab.curvature.losses.CrossEntropy, SquaredError, BinaryCrossEntropy"
        )
    shift = shift_of(model)
    if shift is None:
        raise LossError(
            f"model: how {type(unwrap(model)).__name__} aligns labels with logits is not known; "
            "give loss=fisher_lab.curvature.losses.CrossEntropy(shift=...)"
        )
    return CrossEntropy(shift)


def token_losses(scored: Scored) -> Tensor:
    """Returns the losses ``[M]`` of the labelled tokens, in nats, with graph."""
    return scored.likelihood.losses(scored)


def summed_loss(scored: Scored) -> Tensor:
    """Returns the token-summed loss, a scalar; with no label, a zero that touches the graph."""
    if scored.n_labels == 0:
        return scored.logits.sum() * 0.0
    return scored.likelihood.total(scored)


@dataclass(frozen=True)
class SummedLoss:
    """A token-summed loss with its number of labels, ready for ``backward``.

    Attributes:
        loss: scalar with graph.
        n_labels: labels that count, ``N``.
        scored: logits and targets where the loss is a likelihood that we computed, else None.
        logits: the model's own output of logits behind ``scored``.
        labelling: which labels count and whose loss it is, in words.
    """

    loss: Tensor
    n_labels: int
    scored: Scored | None = None
    logits: Tensor | None = None
    labelling: str = ""


def compute_loss(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    n_labels: int | None = None,
    reduction: str = "mean",
) -> SummedLoss:
    """Runs the model on a prepared batch and returns the token-summed loss.

    Args:
        model: any module.
        batch: a prepared batch (:func:`prepare`).
        loss_fn: the caller's loss function; None uses the model's labelling, else its own loss.
        n_labels: count that turns a mean into a sum; None counts the labels.
        reduction: ``mean`` or ``sum``, of a scalar that ``loss_fn`` returns.

    Raises:
        LossError: there is neither a loss function nor a loss in the model's output, or the
            number of labels behind a mean loss is not known.
    """
    labelling = labelling_of(model, batch)
    if loss_fn is None and not labelling.scored:
        return _own_loss(model, batch, labelling, n_labels)
    if loss_fn is None and labels_of(batch) is None:
        raise LossError("batch: no 'labels' in it; add them or give loss=<function or tensor>")
    outputs = forward(model, batch)
    loss_fn = understood(loss_fn)
    if loss_fn is None or isinstance(loss_fn, Likelihood):
        likelihood = CrossEntropy(bool(labelling.shift)) if loss_fn is None else loss_fn
        scored = likelihood.score(outputs, batch)
        about = str(labelling) if loss_fn is None else _said(likelihood)
        logits = logits_of(outputs)
        return SummedLoss(summed_loss(scored), scored.n_labels, scored, logits, about)
    loss = loss_fn(outputs, batch)
    about = f"by {getattr(loss_fn, '__name__', type(loss_fn).__name__)}"
    if loss.dim() > 0:
        count = _count_of_unreduced(loss, batch) if n_labels is None else n_labels
        return SummedLoss(loss.sum(), count, labelling=about)
    if n_labels is None:
        n_labels = _count_of_function(loss_fn, outputs, batch)
    touch = zero_of(model, outputs)
    summed = sum_of(loss, batch, n_labels=n_labels, reduction=reduction, touch=touch)
    return replace(summed, labelling=about)


def _said(likelihood: Likelihood) -> str:
    if isinstance(likelihood, CrossEntropy):
        return str(Labelling(likelihood.shift, scored=True))
    return f"by the {likelihood.name}"


def _own_loss(
    model: nn.Module, batch: Any, labelling: Labelling, n_labels: int | None
) -> SummedLoss:
    """The loss that the model computes itself, times what it is a mean over."""
    name = type(unwrap(model)).__name__
    outputs = forward(model, batch, with_labels=True)
    loss = loss_of(outputs)
    if loss is None:
        raise LossError(
            f"model: the output of {name} has no loss; give loss=<function of (outputs, batch)>"
        )
    if n_labels is None and labelling.count == "examples":
        n_labels = example_count(batch)
    elif n_labels is None and labelling.count is not None:
        n_labels = count_labels(batch, shift=bool(labelling.shift))
        labels = labels_of(batch)
        if labelling.count == "rows" and labels is not None:
            n_labels = labels[..., 0].numel()
    if n_labels is None and count_labels(batch) == 0:
        n_labels = 0
    if n_labels is None:
        raise LossError(
            f"n_labels: what the loss of {name} is a mean over cannot be told from it; give "
            "n_labels=, or loss=fisher_lab.curvature.losses.CrossEntropy(shift=...)"
        )
    loss = loss if loss.dim() == 0 else loss.mean()
    touch = zero_of(model, outputs)
    how = "sum" if labelling.summed else "mean"
    summed = sum_of(loss, batch, n_labels=n_labels, reduction=how, touch=touch)
    scored = behind(outputs, batch, loss, n_labels)
    logits = None if scored is None else logits_of(outputs)
    return replace(summed, scored=scored, logits=logits, labelling=str(labelling))


def zero_of(model: nn.Module, outputs: Any) -> Tensor:
    """Returns a tensor of the graph from which a zero can be made; a mean over no label is none.

    It is one of the output, else the first parameter.
    """
    tensors = [outputs] if isinstance(outputs, Tensor) else list(named_outputs(outputs).values())
    found = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad and x.dim() > 0]
    parameters = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
    return (found or parameters)[0]


def _count_of_unreduced(loss: Tensor, batch: Any) -> int:
    """How many losses of a function count: all, but for those of labels that are -100.

    Raises:
        LossError: it cannot be told which labels they belong to.
    """
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        return loss.numel()
    counts = {shift: count_labels(batch, shift=shift) or 0 for shift in (False, True)}
    if loss.numel() == labels.numel():
        fits = _placed(loss.detach().reshape(labels.shape), labels)
    elif labels.dim() > 1 and loss.shape == labels[:, 1:].shape:
        fits = [True]
    else:  # the labelled ones alone, or in one row
        cut = labels.dim() > 1 and loss.numel() == labels[:, 1:].numel()
        fits = [s for s, n in counts.items() if loss.numel() == n or (s and cut)]
    found = {counts[shift] for shift in fits}
    if len(found) != 1:
        raise LossError(
            f"n_labels: losses of shape {tuple(loss.shape)} for labels of shape "
            f"{tuple(labels.shape)}; which labels count cannot be told; give n_labels="
        )
    return found.pop()


def _placed(loss: Tensor, labels: Tensor) -> list[bool]:
    """The shifts for which losses are zero where a label does not count, and there alone if so."""
    ignored, zero = labels == IGNORE_INDEX, loss == 0
    if labels.dim() < 2:
        return [False]
    moved = torch.ones_like(ignored)
    moved[:, :-1] = ignored[:, 1:]
    where = {False: ignored, True: moved}
    exactly = [shift for shift, x in where.items() if torch.equal(zero, x)]
    return exactly or [shift for shift, x in where.items() if bool(zero[x].all())]


def _count_of_function(function: LossFunction, outputs: Any, batch: Any) -> int | None:
    """How many labels a function's mean is over."""
    labels = labels_of(batch)
    aligned = count_labels(batch)
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return aligned
    shifted = count_labels(batch, shift=True)
    if aligned == shifted:
        return aligned
    shift = function_shifts(function, outputs, batch)
    if shift is None:
        raise LossError(
            f"n_labels: whether the loss shifts the labels cannot be told ({aligned} or {shifted} "
            "count); give n_labels="
        )
    return shifted if shift else aligned


def sum_of(
    loss: Tensor,
    batch: Any,
    *,
    n_labels: int | None,
    reduction: str,
    touch: Tensor,
    shift: bool = False,
) -> SummedLoss:
    """Turns a scalar loss that somebody else reduced into the token-summed one.

    A mean is multiplied by its count *before* it is differentiated (``docs/math.md``, section 1).

    Args:
        loss: scalar, mean or sum over the labels that count.
        batch: where the labels are counted when ``n_labels`` is None.
        n_labels: the count, if the caller knows it.
        reduction: ``mean`` or ``sum``.
        touch: tensor of the graph from which the zero loss is made when there is no label.
        shift: whether the first label of each row does not count (causal).

    Raises:
        LossError: the loss is no scalar, the reduction has another name, or the count of a mean
            is not known.
    """
    if reduction not in ("mean", "sum"):
        raise LossError(f"loss_reduction: {reduction!r}; allowed: 'mean', 'sum'")
    if loss.dim() != 0:
        raise LossError(f"loss: shape {tuple(loss.shape)}; allowed: a scalar")
    count = n_labels if n_labels is not None else count_labels(batch, shift=shift)
    if count is None:
        raise LossError("n_labels: not given and the batch has no labels to count; give n_labels=")
    if count < 0:
        raise LossError(f"n_labels: {count}; allowed: 0 or more")
    if count == 0:
        return SummedLoss(touch.sum() * 0.0, 0)
    return SummedLoss(loss * count if reduction == "mean" else loss, count)

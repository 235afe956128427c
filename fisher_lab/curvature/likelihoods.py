"""Losses that are negative log-likelihoods, and what their Fisher matrices need of them.

A likelihood says which numbers of a model's output are compared with which targets, the loss of
each, how targets are drawn from the model's own distribution, and the Hessian of the loss by the
outputs, which is the expectation of the gradient's outer product over that distribution
(``docs/math.md``, section 1):

- :class:`CrossEntropy`: one of ``C`` classes; ``H = diag(p) - p p^T``;
- :class:`SquaredError`: ``(y - f)^2`` of each number, a normal distribution of variance 1/2 around
  it; ``H = 2 I``;
- :class:`BinaryCrossEntropy`: each number is the logit of a yes; ``H = diag(p (1 - p))``.

Shapes: ``M`` scored rows (labelled positions) of ``C`` numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.labels import IGNORE_INDEX, labels_of, logits_of, token_mask


@dataclass(frozen=True)
class Scored:
    """Logits and targets at the labelled positions of one batch.

    Attributes:
        logits: ``[M, C]``, with graph, own dtype of the model but at least float32; the predictions
            of a squared error.
        targets: ``[M]`` int64 classes, or ``[M, C]`` numbers.
        rows: ``[M]`` int64, index of the sequence (or example) in the batch.
        positions: ``[M]`` int64, index of the predicting position within it (0 where the model
            gives one prediction an example).
        likelihood: the loss of both.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    positions: Tensor
    likelihood: Likelihood

    @property
    def n_labels(self) -> int:
        """Number of labels that count, ``N``: of classes, else of numbers."""
        return self.targets.numel()


class Likelihood(ABC):
    """A loss of a model's outputs that is a negative log-likelihood of the targets.

    Called with outputs and batch, it returns the losses ``[M]``, unreduced, in nats.
    """

    name: ClassVar[str]

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """Returns the losses ``[M]`` of the labelled positions, in nats."""
        return self.losses(self.score(outputs, batch))

    @abstractmethod
    def score(self, outputs: Any, batch: Any) -> Scored:
        """Returns outputs and targets at the labelled positions.

        Args:
            outputs: a tensor, or an object with ``.logits``.
            batch: a mapping with ``labels``, or a pair (inputs, labels).

        Raises:
            LossError: there are no logits or no labels.
            BatchError: the shapes of outputs and labels do not fit.
        """

    @abstractmethod
    def losses(self, scored: Scored) -> Tensor:
        """Returns the losses ``[M]``, in nats, with graph."""

    @abstractmethod
    def total(self, scored: Scored) -> Tensor:
        """Returns their sum, a scalar with graph."""

    @abstractmethod
    def drawn(self, outputs: Tensor, generator: torch.Generator, n: int) -> Iterator[Tensor]:
        """Yields gradients ``[M, C]`` of the losses for targets drawn from the model.

        Args:
            outputs: ``[M, C]`` without graph.
            generator: of the draws, on the host.
            n: how many draws.
        """

    @abstractmethod
    def root(self, outputs: Tensor) -> Callable[[int], Tensor]:
        """Returns what gives column ``c`` of ``C`` of a root of the Hessians, ``[M, C]``.

        The outer products of a row's columns add up to the Hessian ``H`` of its loss.

        Args:
            outputs: ``[M, C]`` without graph.
        """

    def variances(self, outputs: Tensor) -> Tensor | None:
        """Returns the diagonal ``[M, C]`` of the Hessians where they are diagonal, else None.

        Args:
            outputs: ``[M, C]`` without graph.
        """
        return None


class CrossEntropy(Likelihood):
    """Cross-entropy of the logits against ``batch["labels"]``, unreduced.

    Logits are ``[B, C]`` or ``[B, S, C]`` for labels ``[B]`` or ``[B, S]``.

    Args:
        shift: whether position ``t`` predicts the label at ``t + 1`` (a causal language model).
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``. It is part of the data's loss; the
            model's own distribution, and with it ``mc`` and ``true``, do not change.
        ignore_index: labels with this value do not count; those with -100 never do.
        class_dim: -1, or 1 for logits ``[B, C, ...]``.
    """

    name = "cross-entropy"

    def __init__(
        self,
        shift: bool = False,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORE_INDEX,
        class_dim: int = -1,
    ) -> None:
        self.shift, self.label_smoothing = shift, label_smoothing
        self.ignore_index, self.class_dim = ignore_index, class_dim

    @override
    def score(self, outputs: Any, batch: Any) -> Scored:
        logits = logits_of(outputs)
        labels = _wanted(batch)
        if self.class_dim == 1 and logits.dim() > 2:
            logits = logits.movedim(1, -1)
        if logits.dim() - 1 != labels.dim() or logits.shape[:-1] != labels.shape:
            where = "last" if self.class_dim == -1 else "second"
            raise BatchError(
                f"labels: shape {tuple(labels.shape)} does not fit logits of shape "
                f"{tuple(logits_of(outputs).shape)}; allowed: the logits' shape without its "
                f"{where} dimension"
            )
        labels = labels.to(logits.device)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        keep = labels != IGNORE_INDEX
        if self.ignore_index != IGNORE_INDEX:
            keep = keep & (labels != self.ignore_index)
        rows, positions = _places(keep)
        return Scored(at_least_float32(logits[keep]), labels[keep], rows, positions, self)

    @override
    def losses(self, scored: Scored) -> Tensor:
        return self._reduced(scored, "none")

    @override
    def total(self, scored: Scored) -> Tensor:
        return self._reduced(scored, "sum")

    def _reduced(self, scored: Scored, reduction: str) -> Tensor:
        return F.cross_entropy(
            scored.logits,
            scored.targets,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    @override
    def drawn(self, outputs: Tensor, generator: torch.Generator, n: int) -> Iterator[Tensor]:
        probabilities = outputs.softmax(dim=-1)
        for _ in range(n):
            labels = torch.multinomial(probabilities.cpu().double(), 1, generator=generator)
            one = -torch.ones_like(probabilities[:, :1])
            yield probabilities.scatter_add(1, labels.to(probabilities.device), one)

    @override
    def root(self, outputs: Tensor) -> Callable[[int], Tensor]:
        probabilities = outputs.softmax(dim=-1)

        def column(c: int) -> Tensor:
            signal = probabilities.clone()
            signal[:, c] -= 1.0
            signal *= probabilities[:, c : c + 1].sqrt()
            return signal

        return column


class _OfNumbers(Likelihood):
    """A loss that adds up over the numbers of the output, whose Hessian is diagonal.

    Targets have the outputs' shape ``[B, ..., C]``; a last dimension of 1 may be missing on either
    side. Where the outputs have positions, ``[B, S, C]``, those that the batch's mask leaves out
    do not count.
    """

    @override
    def score(self, outputs: Any, batch: Any) -> Scored:
        given = logits_of(outputs)
        targets = _wanted(batch).to(given.device)
        predictions = given
        if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
            targets = targets[..., None]
        elif targets.dim() == predictions.dim() + 1 and targets.shape[-1] == 1:
            predictions = predictions[..., None]
        if targets.shape != predictions.shape or predictions.dim() == 0:
            raise BatchError(
                f"labels: shape {tuple(_wanted(batch).shape)} does not fit outputs of shape "
                f"{tuple(given.shape)}; allowed: the outputs' shape"
            )
        if predictions.dim() == 1:
            predictions, targets = predictions[:, None], targets[:, None]
        keep = torch.ones(predictions.shape[:-1], dtype=torch.bool, device=given.device)
        mask = token_mask(batch)
        if isinstance(mask, Tensor) and mask.dim() == 2 and keep.shape == mask.shape:
            keep = mask.to(keep.device) != 0
        rows, positions = _places(keep)
        chosen = at_least_float32(predictions[keep])
        return Scored(chosen, targets[keep].to(chosen.dtype), rows, positions, self)

    @override
    def losses(self, scored: Scored) -> Tensor:
        return self.by_number(scored.logits, scored.targets).sum(dim=1)

    @override
    def total(self, scored: Scored) -> Tensor:
        return self.by_number(scored.logits, scored.targets).sum()

    @override
    def root(self, outputs: Tensor) -> Callable[[int], Tensor]:
        roots = self.variances(outputs).sqrt()

        def column(c: int) -> Tensor:
            signal = torch.zeros_like(roots)
            signal[:, c] = roots[:, c]
            return signal

        return column

    @abstractmethod
    def by_number(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses ``[M, C]`` of outputs and targets, ``[M, C]`` each."""

    @override
    @abstractmethod
    def variances(self, outputs: Tensor) -> Tensor: ...


class SquaredError(_OfNumbers):
    """The squared error ``(y - f)^2`` of every number of the output, unreduced over rows.

    Up to a constant it is the negative log-likelihood of a normal distribution of variance 1/2
    around the output, so that ``H = 2 I``. ``N`` counts numbers, as the mean of
    ``torch.nn.MSELoss`` does.
    """

    name = "squared error"

    @override
    def by_number(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()

    @override
    def drawn(self, outputs: Tensor, generator: torch.Generator, n: int) -> Iterator[Tensor]:
        # The gradient 2 (f - y) at y = f + sqrt(1/2) e.
        for _ in range(n):
            noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
            yield -(2.0**0.5) * noise.to(outputs)

    @override
    def variances(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


class BinaryCrossEntropy(_OfNumbers):
    """The binary cross-entropy of every logit of the output, unreduced over rows.

    Targets lie in [0, 1]. ``N`` counts numbers, as the mean of ``torch.nn.BCEWithLogitsLoss`` does.
    """

    name = "binary cross-entropy"

    @override
    def by_number(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")

    @override
    def drawn(self, outputs: Tensor, generator: torch.Generator, n: int) -> Iterator[Tensor]:
        probabilities = outputs.sigmoid()
        for _ in range(n):
            draws = torch.bernoulli(probabilities.cpu().double(), generator=generator)
            yield probabilities - draws.to(probabilities)

    @override
    def variances(self, outputs: Tensor) -> Tensor:
        probabilities = outputs.sigmoid()
        return probabilities * (1.0 - probabilities)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns the tensor itself in float32 and float64, else a float32 copy of it."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def understood(loss: Any) -> Any:
    """Returns the likelihood behind a loss module of torch; anything else as it is.

    ``nn.CrossEntropyLoss``, ``nn.MSELoss`` and ``nn.BCEWithLogitsLoss`` compare the outputs with
    the batch's labels, in the shapes that torch allows. How they are reduced changes nothing: the
    differentiated loss is summed and ``N`` is what the module's mean divides by.

    Raises:
        LossError: a module whose loss is another one, or that weighs labels.
    """
    if not isinstance(loss, nn.modules.loss._Loss):
        return loss
    weights = [n for n in ("weight", "pos_weight") if getattr(loss, n, None) is not None]
    if weights:
        raise LossError(
            f"loss: {type(loss).__name__} with {weights[0]}, by which its labels do not count "
            f"alike; allowed: {weights[0]}=None, or a function of (outputs, batch)"
        )
    match loss:
        case nn.CrossEntropyLoss():
            return CrossEntropy(
                label_smoothing=loss.label_smoothing,
                ignore_index=loss.ignore_index,
                class_dim=1,
            )
        case nn.MSELoss():
            return SquaredError()
        case nn.BCEWithLogitsLoss():
            return BinaryCrossEntropy()
    raise LossError(
        f"loss: {type(loss).__name__}; allowed: nn.CrossEntropyLoss, nn.MSELoss, "
        "nn.BCEWithLogitsLoss, or a function of (outputs, batch)"
    )


def behind(outputs: Any, batch: Any, loss: Tensor, n_labels: int) -> Scored | None:
    """Returns outputs and targets where a model's own loss is the mean of a loss of numbers.

    Measured: of squared error and binary cross-entropy just one gives this loss of these outputs.

    Args:
        outputs: of the model.
        batch: with real-valued labels, else there is no such loss.
        loss: the model's mean loss, a scalar.
        n_labels: what it is a mean over.
    """
    labels = labels_of(batch)
    if labels is None or not labels.is_floating_point() or n_labels == 0:
        return None
    found = []
    for scored, total in of_numbers(outputs, batch):
        value = total / max(scored.n_labels, 1)
        near = abs(value - float(loss.detach())) <= 1e-4 * abs(value)
        found += [scored] if near and scored.n_labels == n_labels else []
    return found[0] if len(found) == 1 else None


def of_numbers(outputs: Any, batch: Any) -> Iterator[tuple[Scored, float]]:
    """Gives outputs and targets of each likelihood of numbers that takes them, with its sum."""
    for likelihood in (SquaredError(), BinaryCrossEntropy()):
        with suppress(BatchError, LossError):
            scored = likelihood.score(outputs, batch)
            yield scored, float(likelihood.total(scored).detach())


def _wanted(batch: Any) -> Tensor:
    labels = labels_of(batch)
    if labels is None:
        raise LossError("batch: no 'labels' in it, and the loss needs them")
    return labels


def _places(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Example and position within it of what is kept of ``[B]``, ``[B, S]``, ``[B, H, W]``."""
    where = keep.nonzero()
    rows = where[:, 0]
    positions = torch.zeros_like(rows)
    for d in range(1, keep.dim()):
        positions = positions * keep.shape[d] + where[:, d]
    return rows, positions

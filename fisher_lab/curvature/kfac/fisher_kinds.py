"""The Fisher kinds: where the labels come from whose gradients are sent back from the logits.

One backward pass each (``docs/math.md``, section 1). ``empirical`` sends the gradient of the data's
loss, ``mc`` that of labels drawn from the model. ``true`` sends, for each labelled position and
class ``c``, column ``c`` of a root of the Hessian (of a cross-entropy ``sqrt(p_c) (p - e_c)``):
summed over all of them the outer products are the expectation over the model's own distribution.

One pass a class over all positions at once would add cross terms between positions wherever
layers mix tokens (attention): for positions ``t`` and ``u`` it adds
``J_t^T (sum_c sqrt(p_tc p_uc) (p_t - e_c)(p_u - e_c)^T) J_u``, which does not vanish. Sequences
of a batch do not mix, so one pass serves the same position of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.losses import Scored, SummedLoss


@dataclass(frozen=True)
class BackwardPass:
    """From where a backward pass starts.

    Attributes:
        output: scalar loss, or logits.
        grad_output: gradient of the logits; None for a scalar.
        last: whether the graph can go afterwards.
    """

    output: Tensor
    grad_output: Tensor | None
    last: bool


def kind_in_use(settings: KFACSettings, n_classes: int | None) -> str:
    """Returns the kind that inner layers get: ``true`` becomes ``mc`` beyond the class limit."""
    if settings.fisher == "true" and (n_classes is None or n_classes > settings.true_max_classes):
        return "mc"
    return settings.fisher


def n_draws(kind: str, settings: KFACSettings) -> int:
    """Returns by how many draws of labels the sums are divided."""
    return settings.n_samples if kind == "mc" else 1


def backward_passes(
    loss: SummedLoss, settings: KFACSettings, generator: torch.Generator
) -> Iterator[BackwardPass]:
    """Yields the backward passes of one batch; ``generator`` is that of the drawn labels (host).

    Raises:
        SettingError: the kind needs logits and the loss has none.
    """
    scored = None if settings.fisher == "empirical" else scored_of(loss, settings.fisher)
    if scored is None or scored.n_labels == 0:
        yield BackwardPass(loss.loss, None, True)
        return
    outputs, likelihood = scored.logits.detach(), scored.likelihood
    if kind_in_use(settings, outputs.shape[1]) == "mc":
        signals = likelihood.drawn(outputs, generator, settings.n_samples)
        for k, signal in enumerate(signals):
            yield BackwardPass(scored.logits, signal, k == settings.n_samples - 1)
    else:
        yield from _expected(scored, likelihood.root(outputs))


def scored_of(loss: SummedLoss, kind: str) -> Scored:
    """Returns the logits behind a loss.

    Raises:
        SettingError: there are none.
    """
    if loss.scored is None:
        raise SettingError(
            f"fisher: {kind!r} needs the logits, and this loss is the caller's own; allowed: "
            "'empirical', or loss=CrossEntropy(...), SquaredError() or BinaryCrossEntropy() of "
            "fisher_lab.curvature.losses"
        )
    return loss.scored


def _expected(scored: Scored, root: Callable[[int], Tensor]) -> Iterator[BackwardPass]:
    positions = scored.positions.unique().tolist()
    n_columns = scored.logits.shape[1]
    for index, position in enumerate(positions):
        here = (scored.positions == position)[:, None]
        for c in range(n_columns):
            last = index == len(positions) - 1 and c == n_columns - 1
            yield BackwardPass(scored.logits, root(c) * here, last)

"""What K-FAC makes of a model, in one refresh that is compared with autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.refresh import Coverage, LabelCount
from fisher_lab.curvature.labels import IGNORE_INDEX, labels_of
from fisher_lab.curvature.losses import LossFunction


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check` found; printed, it is a few lines of text.

    Attributes:
        coverage: how much of the model the factors cover, and why not more.
        layers: layer name -> tokens that it saw.
        skipped: name of a layer without factors -> why.
        n_labels: labels that the loss counts.
        given: entries of the batch's ``labels`` that are not ignored; None where there are none.
        labelling: which of them count, and whose loss it is: ``shifted``, ``in place``.
    """

    coverage: Coverage
    layers: dict[str, int]
    skipped: dict[str, str] = field(repr=False)
    n_labels: int
    given: int | None
    labelling: str = ""

    def __str__(self) -> str:
        given = self.n_labels if self.given is None else self.given
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name or "(the model)")
        left = [f"  {len(names)} left out: {why} ({names[0]})" for why, names in reasons.items()]
        return "\n".join(
            [
                str(self.coverage),
                str(LabelCount(self.labelling, self.n_labels, given)),
                f"layers: {len(self.layers)}, whose tokens give the gradient that autograd gives",
                *left,
            ]
        )


def check(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None = None,
    *,
    n_labels: int | None = None,
    loss_reduction: str = "mean",
    **options: Any,
) -> ModelCheck:
    """Collects factors once, compares their gradient with autograd's, and says what they cover.

    The model and its gradients stay as they were; the factors are dropped. The two gradients must
    agree for every covered parameter to rounding (``docs/math.md``, section 1), which a layer that
    is taken for another one, padding among the tokens or labels that are miscounted do not
    survive.

    Args:
        model: any module with supported layers, in ``train()`` or ``eval()`` mode.
        batch: one batch, or several, as for
            :meth:`fisher_lab.KFACNaturalGradient.collect_kfac_factors`.
        loss: None for a Hugging Face model; else a function of (outputs, batch).
        n_labels: labels behind a mean loss, where the batch's ``labels`` do not say.
        loss_reduction: ``mean`` or ``sum``: how ``loss`` was reduced.
        **options: those of :class:`fisher_lab.KFACNaturalGradient`.

    Raises:
        LayerError: the gradients differ (names the parameters), or no layer is supported.
        CurvatureError: see its other subclasses.
    """
    batches = batch if isinstance(batch, list) else [batch]
    engine = KFACNaturalGradient(track_diagonal=False, **options)
    engine.collect_kfac_factors(
        model, batches, loss, n_labels=n_labels, loss_reduction=loss_reduction, verify=True
    )
    given = [labels for one in batches if (labels := labels_of(one)) is not None]
    return ModelCheck(
        coverage=engine.coverage,
        layers={name: factors.tokens for name, factors in engine.kfac_factors.items()},
        skipped=dict(engine.skipped),
        n_labels=max(factors.n_labels for factors in engine.kfac_factors.values()),
        given=sum(int((x != IGNORE_INDEX).sum()) for x in given) if given else None,
        labelling=engine.labels.labelling,
    )

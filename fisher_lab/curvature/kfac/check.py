"""What K-FAC makes of a model, in one refresh that is compared with autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fisher_lab.curvature.kfac.damping import mean_eigenvalue
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.policy import Cost, cost_a, cost_block, cost_g
from fisher_lab.curvature.kfac.refresh import Coverage, LabelCount
from fisher_lab.curvature.labels import IGNORE_INDEX, labels_of
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.results.notebook import html_table

RELATIVE_DAMPING = 0.1
"""Of the mean eigenvalue of each side: what the check proposes to begin with."""

PROBE = 384
"""Side of the matrix whose decomposition is timed, to say how long those of the layers take."""


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
        passes_s: seconds of the passes and sums, with the comparison.
        factor_s: seconds that the decompositions take, estimated from one that was timed.
        bytes: of the factors and their decompositions.
        mean_eigenvalues: side -> the smallest and the largest mean eigenvalue of a layer's factor.
    """

    coverage: Coverage
    layers: dict[str, int]
    skipped: dict[str, str] = field(repr=False)
    n_labels: int
    given: int | None
    labelling: str = ""
    passes_s: float = 0.0
    factor_s: float = 0.0
    bytes: int = 0
    mean_eigenvalues: dict[str, tuple[float, float]] = field(default_factory=dict)

    def _lines(self) -> Iterator[tuple[str, str]]:
        """What it is about, and what was found."""
        given = self.n_labels if self.given is None else self.given
        yield "coverage", str(self.coverage)
        yield "labels", str(LabelCount(self.labelling, self.n_labels, given)).partition(": ")[2]
        n = f"{len(self.layers)}, whose tokens give the gradient that autograd gives"
        yield "layers", n
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name or "(the model)")
        for why, names in reasons.items():
            yield "left out", f"{len(names)} {why} ({names[0]})"
        tokens = max(self.layers.values(), default=0)
        yield (
            "to expect",
            f"{self.bytes / 2**20:.1f} MiB; of these {tokens:,} tokens {self.passes_s:.2f} s for "
            f"passes and comparison, about {self.factor_s:.2g} s to decompose",
        )
        ends = ", ".join(
            f"{side} {RELATIVE_DAMPING * low:.1e} to {RELATIVE_DAMPING * high:.1e}"
            for side, (low, high) in self.mean_eigenvalues.items()
        )
        yield (
            "damping",
            f"damping_mode=relative damping={RELATIVE_DAMPING:g} to begin with, here {ends}; "
            "task.damping_scan chooses one by held-out loss",
        )

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self._lines())

    def _repr_html_(self) -> str:
        return html_table("K-FAC of this model", self._lines())


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
    began = perf_counter()
    engine.collect_kfac_factors(
        model, batches, loss, n_labels=n_labels, loss_reduction=loss_reduction, verify=True
    )
    passes_s = perf_counter() - began
    factors = engine.kfac_factors
    costs = [cost for one in factors.values() for cost in _costs(one)]
    given = [labels for one in batches if (labels := labels_of(one)) is not None]
    return ModelCheck(
        coverage=engine.coverage,
        layers={name: one.tokens for name, one in factors.items()},
        skipped=dict(engine.skipped),
        n_labels=max(one.n_labels for one in factors.values()),
        given=sum(int((x != IGNORE_INDEX).sum()) for x in given) if given else None,
        labelling=engine.labels.labelling,
        passes_s=passes_s,
        factor_s=_seconds_of(sum(cost.flops_factor for cost in costs)),
        bytes=sum(cost.bytes for cost in costs),
        mean_eigenvalues=_mean_eigenvalues(list(factors.values())),
    )


def _costs(factors: LayerFactors) -> tuple[Cost, ...]:
    """What both sides of a layer cost, with the tokens that it has."""
    layer, tokens = factors.layer, factors.tokens
    if layer.one_block:
        return (cost_block(layer, tokens),)
    return cost_a(layer, tokens), cost_g(layer, factors.method, tokens)


def _seconds_of(operations: float) -> float:
    """How long decompositions take on this machine, by one that is timed."""
    matrix = torch.randn(PROBE, PROBE, dtype=torch.float64, generator=torch.Generator())
    matrix = matrix @ matrix.T
    torch.linalg.eigh(matrix[:8, :8])  # loads what the first call loads
    began = perf_counter()
    torch.linalg.eigh(matrix)
    return (perf_counter() - began) * operations / (PROBE**3 / 3)


def _mean_eigenvalues(factors: list[LayerFactors]) -> dict[str, tuple[float, float]]:
    sides = {
        "A": [mean_eigenvalue(f.A) for f in factors if f.A is not None],
        "G": [mean_eigenvalue(f.G) for f in factors],
    }
    return {side: (min(values), max(values)) for side, values in sides.items() if values}

"""From the statistics of a refresh to the factors of every layer: divided, shared, pooled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.kfac.accumulators import BlockAccumulator, GradientAccumulator
from fisher_lab.curvature.kfac.damping import dampings
from fisher_lab.curvature.kfac.experts import pool_experts
from fisher_lab.curvature.kfac.factors import (
    DenseFactor,
    DiagonalFactor,
    Factor,
    WoodburyFactor,
)
from fisher_lab.curvature.kfac.fisher_kinds import n_draws
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Layer
from fisher_lab.curvature.kfac.layers_by_use import (
    LEFT_OUT_BY_CHOICE,
    NO_TOKEN,
    NOT_USED,
    UNREACHED,
)
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.parts import base_of, in_parts, value_of
from fisher_lab.curvature.kfac.policy import method, sharing_of, wants_sequences
from fisher_lab.curvature.kfac.statistics import LayerSums, Statistics
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.memory import on_device

log = logging.getLogger(__name__)

STORAGE_ERROR_WARNING = 1e-2
"""Relative error of the natural gradient past which rounding the columns is warned about."""

STORAGE_PROBES = 8
"""Columns on which that error is estimated."""


@dataclass(frozen=True)
class Coverage:
    """How many of a model's numbers K-FAC covers.

    Attributes:
        covered: in parameters of layers with factors.
        passed: in other trainable parameters, by the reason.
        frozen: in parameters that are not trained.
        by_parameter: name of a trainable parameter that is not covered, or not as a whole -> how
            many of its numbers are not, and the reason.
    """

    covered: int = 0
    passed: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    by_parameter: dict[str, tuple[int, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        trained: Mapping[str, Tensor],
        frozen: int,
        layers: Iterable[Layer],
        reasons: Mapping[str, str],
    ) -> Coverage:
        """Returns how much of a model some layers cover.

        Args:
            trained: the model's trainable parameters, by name.
            frozen: how many numbers the others have.
            layers: those that have factors, or would have.
            reasons: name of a parameter that no layer covers, or not alone -> why.
        """
        names = {name for x in layers for name in x.names}
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(base_of(name), []).append(name)
        missed: dict[str, tuple[int, str]] = {}
        passed: dict[str, int] = {}
        for name, parameter in trained.items():
            size = sum(value_of(trained, part).numel() for part in parts.get(name, ()))
            if size < parameter.numel():
                reason = reasons.get(name, NO_TOKEN if size else NOT_USED)
                missed[name] = parameter.numel() - size, reason
                passed[reason] = passed.get(reason, 0) + missed[name][0]
        total = sum(parameter.numel() for parameter in trained.values())
        return cls(total - sum(passed.values()), passed, frozen, missed)

    @classmethod
    def restored(cls, entry: Mapping[str, Any]) -> Coverage:
        """Returns what :func:`dataclasses.asdict` made plain, also by way of JSON."""
        missed = {name: (count, why) for name, (count, why) in entry["by_parameter"].items()}
        return cls(entry["covered"], dict(entry["passed"]), entry["frozen"], missed)

    def summed(self) -> dict[str, Any]:
        """Returns the numbers without the single parameters, for the record."""
        counts = {"covered": self.covered, "passed": self.passed, "frozen": self.frozen}
        return counts | {"unreached": self.unreached}

    @property
    def share(self) -> float:
        """The covered share of what is trained."""
        return self.covered / max(self.covered + sum(self.passed.values()), 1)

    @property
    def unreached(self) -> int:
        """Numbers of what is trained that have no part in the loss of these batches."""
        return sum(self.passed.get(reason, 0) for reason in UNREACHED)

    @property
    def share_of_reached(self) -> float:
        """The covered share of what the loss of these batches reaches."""
        total = self.covered + sum(self.passed.values())
        return self.covered / max(total - self.unreached, 1)

    @property
    def missed(self) -> float:
        """The share of what is trained that is not covered, and that nobody has left out."""
        chosen = sum(self.passed.get(reason, 0) for reason in LEFT_OUT_BY_CHOICE)
        total = self.covered + sum(self.passed.values())
        return (total - self.covered - chosen) / max(total, 1)

    def __str__(self) -> str:
        total = self.covered + sum(self.passed.values())
        text = f"K-FAC covers {self.share:.1%} of {total:,} trained parameters"
        if self.unreached:
            text += f", {self.share_of_reached:.1%} of those that these batches reach"
        largest = sorted(self.passed.items(), key=lambda item: -item[1])
        passed = "; ".join(f"{count / total:.1%} {reason}" for reason, count in largest)
        frozen = f" ({self.frozen:,} are frozen)" if self.frozen else ""
        return text + frozen + (f"; passed through: {passed}" if passed else "")


@dataclass(frozen=True)
class LabelCount:
    """How many labels the loss is a sum over.

    Attributes:
        labelling: which of them count, and whose loss it is.
        counted: ``N``.
        given: those of the caller's batches that are not -100.
    """

    labelling: str = ""
    counted: int = 0
    given: int = 0

    def __str__(self) -> str:
        words = f"{self.labelling}, " if self.labelling else ""
        return f"labels: {words}{self.counted:,} of {self.given:,}"


@dataclass(frozen=True)
class Refresh:
    """What a refresh ends in.

    Attributes:
        factors: by layer name.
        skipped: name of a supported layer without factors -> why.
        gradients: own mean gradients of the parameters that belong to no layer, where they were
            asked for.
        diagonal: diagonal Fisher of these, where it was asked for.
        coverage: how much of the model the factors cover.
        labels: how many labels the loss is a sum over, and which.
        fisher: kind of Fisher matrix that the inner layers got.
        rank_counts: tokens and labels of each rank.
    """

    factors: dict[str, LayerFactors] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    diagonal: dict[str, Tensor] = field(default_factory=dict)
    coverage: Coverage = Coverage()
    labels: LabelCount = LabelCount()
    fisher: str = "empirical"
    rank_counts: tuple[dict[str, int], ...] = ()

    def without_own_gradients(self) -> Refresh:
        """Returns the refresh without own gradients, whose memory is freed; the factors stay."""
        for factors in self.factors.values():
            factors.own = None
        return replace(self, gradients={})


@full_precision()
def refresh(sums: Statistics, rank_counts: Sequence[dict[str, int]]) -> Refresh:
    """Divides the statistics into factors; nothing can be added to the statistics after it.

    Args:
        sums: of all batches, and of all ranks.
        rank_counts: tokens and labels of each rank.

    Raises:
        BatchError: no label counted in any batch, or no batch came.
        LayerError: no layer had a gradient, or one that the user named was not used.
    """
    if sums.n_batches == 0:
        raise BatchError("batches: none given; allowed: at least one")
    if sums.n_labels == 0:
        raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")
    if sums.settings.experts == "pooled":
        pool_experts(sums)
    shared: dict[int, Factor] = {}
    factors: dict[str, LayerFactors] = {}
    for layer in sums.layers.layers.values():
        if layer.name not in sums.by_layer:
            sums.skipped.setdefault(layer.name, NO_TOKEN)
            continue
        factors[layer.name] = _layer_factors(sums, layer, shared)
    if not factors:
        why = {**sums.skipped, **sums.reasons} or {"its parameters": "frozen, or under no_grad"}
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:3])
        raise LayerError(f"model: no K-FAC layer has a gradient: {listed}")
    if sums.settings.include:
        _check_named(sums)
    scale = 1.0 / sums.n_labels
    parameters = [n for f in factors.values() for n in f.layer.names]
    covered = {base_of(n) for n in parameters if n is not None}
    tokens = most_rows(factors.values(), sums.settings.sharing).tokens
    rest, layers = sums.uncovered, sums.layers.layers
    untouched = {base_of(n) for name, x in layers.items() if name not in factors for n in x.names}
    return Refresh(
        factors=factors,
        skipped={name: why for name, why in sums.skipped.items() if name not in factors},
        gradients={n: g * scale for n, g in rest.gradients.items() if n not in covered},
        diagonal={n: d / tokens for n, d in rest.diagonal.items() if n not in covered},
        coverage=Coverage.of(
            rest.trained,
            rest.frozen,
            [f.layer for f in factors.values()],
            {**dict.fromkeys(untouched, NO_TOKEN), **sums.reasons},
        ),
        labels=LabelCount(sums.labelling, sums.n_labels, sums.labels_given),
        fisher=sums.fisher_kind,
        rank_counts=tuple(rank_counts),
    )


def most_rows(factors: Iterable[LayerFactors], sharing: str) -> LayerFactors:
    """Returns the factors by whose ``T`` the diagonal of what no layer covers is divided.

    They are those of a layer that has the rows which were asked for, tokens or examples (an
    embedding keeps its tokens under ``reduce``), and of these the most (``docs/math.md``, section
    1).

    Args:
        factors: of the layers.
        sharing: ``expand`` or ``reduce``.
    """
    return max(factors, key=lambda f: (f.sharing == sharing, f.tokens))


def _check_named(sums: Statistics) -> None:
    """Refuses layers that the user named in ``include`` and that no forward pass has used."""
    missing = [name for name in sums.promised.layers if name not in sums.layers.layers]
    if missing:
        reasons = "; ".join(f"{name}: {sums.skipped.get(name)}" for name in missing)
        raise LayerError(f"include: {reasons}; allowed: layers that the forward pass uses")


def _layer_factors(sums: Statistics, layer: Layer, shared: dict[int, Factor]) -> LayerFactors:
    """A layer's factors, pooled with those of its partner where it has one.

    ``shared`` holds the factors so far that layers may share; it takes the layer's own.
    """
    layer_sums = sums.by_layer[layer.name]
    count = n_draws(sums.fisher_kind, sums.settings)
    weight = 1.0 / (layer_sums.rows * count)
    own = _tied_own(sums, layer) if layer.tied else layer_sums.own
    own = None if own is None else own / sums.n_labels
    common: dict[str, Any] = {
        "layer": layer, "tokens": layer_sums.tokens, "n_labels": sums.n_labels,
        "n_draws": count, "fisher": sums.fisher_kind, "own": own,
        "sharing": sharing_of(sums.settings, layer),
    }  # fmt: skip
    if isinstance(layer_sums.g, BlockAccumulator):
        how = method(sums.settings, layer, None)
        return LayerFactors(A=None, G=_g_of(layer_sums, weight, shared), method=how, **common)
    if layer_sums.group not in shared:
        shared[layer_sums.group] = sums.inputs[layer_sums.group].factor()
    common["A"] = shared[layer_sums.group]
    if layer.name == sums.head.name:
        common["fisher"] = "true"
        g, how = sums.head.factor(layer_sums.tokens), "true_head"
    else:
        g = _g_of(layer_sums, weight, shared)
        how = "woodbury" if isinstance(g, WoodburyFactor) else "eig"
    factors = LayerFactors(G=g, method=how, **common)
    _keep_tokens(sums, factors, layer_sums)
    if layer.partner is not None and layer.partner.name in sums.by_layer:
        pool(factors, _layer_factors(sums, layer.partner, shared))
        factors.push = False
    elif layer_sums.pooled is None and how != "true_head":
        _measure_storage_error(factors, layer_sums.g.exact_factor(weight), sums.settings)
    return factors


def _g_of(layer_sums: LayerSums, weight: float, shared: dict[int, Factor]) -> Factor:
    """The factor of a G side, made once where layers have it together."""
    if layer_sums.pooled is None:
        return layer_sums.g.factor(weight)
    key = -1 - id(layer_sums.g)  # beside the groups of the A sides
    if key not in shared:
        shared[key] = layer_sums.g.factor(weight)
    return shared[key]


def _tied_own(sums: Statistics, layer: Layer) -> Tensor | None:
    gradients = sums.uncovered.gradients
    if base_of(layer.weight) not in gradients:
        return None
    named = in_parts(gradients, [layer])
    return layer.to_matrix(named, named[layer.weight].dtype)


def _keep_tokens(sums: Statistics, factors: LayerFactors, layer_sums: LayerSums) -> None:
    """Keeps the tokens that push-through and EKFAC need."""
    g, layer, settings = layer_sums.g, layer_sums.layer, sums.settings
    assert isinstance(g, GradientAccumulator)
    head = layer.name == sums.head.name
    factors.hessian = sums.head.hessian if head else ""
    in_order = g.tokens_in_order() and layer_sums.pooled is None and not head
    if in_order or settings.ekfac:
        what = f"layer {layer.name}: A side (in={layer.dim_a}, tokens={layer_sums.tokens})"
        factors.a, factors.spread = joined(layer_sums.inputs, what), layer_sums.spread
    empirical = sums.fisher_kind == "empirical"
    paired = factors.sharing == "expand"  # rows of examples do not give the gradient
    factors.push = in_order and empirical and paired and not layer.tied and settings.push_through
    if settings.ekfac:
        empty = torch.empty(0, layer.n_out, device=sums.device)
        factors.tokens_g = joined(layer_sums.tokens_g, g.label) if layer_sums.tokens_g else empty
        nowhere = torch.empty(0, dtype=torch.int64, device=sums.device)
        factors.order = torch.cat([nowhere, *layer_sums.order])
        if wants_sequences(settings, layer.kind) and not head:
            factors.sequences = torch.cat([nowhere, *layer_sums.sequences])


def joined(parts: Sequence[Tensor], what: str) -> Tensor:
    """Returns the parts one under the other, in host memory where the device is full."""

    def join(device: torch.device) -> Tensor:
        there = [part.to(device) for part in parts]
        return there[0] if len(there) == 1 else torch.cat(there)

    return on_device(join, parts[0].device, f"{what}, tokens kept")


def pool(head: LayerFactors, embedding: LayerFactors) -> None:
    """Pools the factors of an embedding with those of the head that has the same weight, in place.

    The embedding's A is a diagonal over the vocabulary, its G of the model's width. Its block and
    the head's add up; the product whose factors are the averages of theirs, weighted by the blocks'
    traces, has the trace of the sum (``docs/math.md``, section 1). A keeps the trace, and with it
    the unit, of the head's A.
    """
    a, g, counts, width = head.A, head.G, embedding.A, embedding.G
    assert a is not None
    assert isinstance(counts, DiagonalFactor)

    def both_to_host() -> None:
        a.to_host()
        width.to_host()

    sides = (a, g, counts, width)
    traces = {x: x.on_device("trace", x.trace, x.to_host) for x in sides}
    of_head = traces[g] * traces[a]
    of_embedding = traces[counts] * traces[width] * embedding.tokens / head.tokens
    both = of_head + of_embedding
    share, unit = (of_head / both if both else 1.0), traces[a] or 1.0

    def part(factor: Factor, weight: float) -> float:
        """What a factor is multiplied by: its weight over its trace."""
        return weight / traces[factor] if traces[factor] else 0.0

    # Products of a sharded factor are collective: then no rank repeats them by itself.
    guard = width if width.sharded else a
    weights = part(a, share * unit), part(width, (1 - share) * unit)
    head.A = guard.on_device("pooled", lambda: _sum_of(a, width, *weights), both_to_host)
    scale = both / unit
    more, kept = part(counts, (1 - share) * scale), part(g, share * scale)
    head.G = g.on_device("pooled", lambda: g.plus_diagonal(counts.diagonal * more, kept), g.to_host)
    head.A.label, head.G.label = a.label, g.label


def _sum_of(a: Factor, width: Factor, of_a: float, of_width: float) -> Factor:
    """``of_a`` times the head's A plus ``of_width`` times the embedding's G ``[n, n]``.

    A bias column of the head has no part in the embedding's.
    """
    total, n = a.to_dense() * of_a, width.dim
    total[:n, :n] += width.to_dense().to(total.device) * of_width
    return DenseFactor(total)


def _measure_storage_error(
    factors: LayerFactors, exact: WoodburyFactor | None, settings: EngineSettings
) -> None:
    """Finds the relative error of ``G^-1 dW`` on a layer's own gradient that rounding costs.

    Estimated on ``dW Z`` with a few seeded normal columns ``Z``: the whole of ``dW`` would
    cost as much as applying the inverse, twice. Past a limit it is warned about. ``exact`` is the
    same G with unrounded columns.
    """
    g = factors.G
    numerics, kappa = settings.numerics, settings.kappa_max
    if exact is None or factors.a is None or factors.layer.kind.looks_up:
        return
    lam = dampings(factors, settings)[1]
    if lam <= 0 or g.n_columns != factors.tokens:
        return
    a = factors.a.to(numerics.apply_dtype)
    generator = torch.Generator().manual_seed(0)
    probes = a @ torch.randn(a.shape[1], STORAGE_PROBES, generator=generator).to(a)
    if factors.spread is not None:
        probes = factors.spread.gather(probes)
    probes = probes.to(exact.device)
    dw = exact.columns.transposed_times(probes)
    reference = exact.damped(lam, kappa, numerics).power(dw, -1)
    stored = g.damped(lam, kappa, numerics).power(dw, -1)
    norm = float(reference.norm())
    factors.storage_error = float((stored - reference).norm()) / norm if norm else 0.0
    if factors.storage_error > STORAGE_ERROR_WARNING:
        log.warning(
            "layer %s: storing its columns in %s changes the natural gradient by %.1e "
            "(relative, at damping %g)",
            factors.layer.name, g.tensors()["columns"].dtype, factors.storage_error, lam,
        )  # fmt: skip

"""From the sums of a refresh to the factors of every layer: divided, shared, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.kfac.accumulators import GradientAccumulator, NormAccumulator
from fisher_lab.curvature.kfac.draws import n_draws
from fisher_lab.curvature.kfac.factors import (
    DenseFactor,
    DiagonalFactor,
    DiagonalLowRankFactor,
    Factor,
    GramFactor,
)
from fisher_lab.curvature.kfac.layer_factors import Built, LayerFactors
from fisher_lab.curvature.kfac.layers import Layer
from fisher_lab.curvature.kfac.statistics import Side, Sums
from fisher_lab.curvature.memory import HOST, on_host_if_full


def form(sums: Sums, rank_counts: Sequence[dict[str, int]]) -> Built:
    """Divides the sums and returns the factors; nothing can be added to the sums after it.

    Args:
        sums: of all batches, and of all ranks.
        rank_counts: tokens and labels of each rank.

    Raises:
        BatchError: no label counted in any batch, or no batch came.
        LayerError: no layer had a gradient.
    """
    if sums.n_batches == 0:
        raise BatchError("batches: none given; allowed: at least one")
    if sums.n_labels == 0:
        raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")
    forming = _Forming(sums)
    factors: dict[str, LayerFactors] = {}
    for layer in sums.layers.layers.values():
        if layer.name not in sums.sides:
            sums.skipped.setdefault(layer.name, "no gradient in this batch")
            continue
        factors[layer.name] = forming.layer(layer)
    if not factors:
        raise LayerError("model: no K-FAC layer has a gradient (frozen, or under no_grad?)")
    scale = 1.0 / sums.n_labels
    covered = {n for f in factors.values() for n in (f.layer.weight, f.layer.bias)}
    tokens = max(f.tokens for f in factors.values())
    rest = sums.uncovered
    return Built(
        factors=factors,
        skipped=dict(sums.skipped),
        gradients={n: g * scale for n, g in rest.gradients.items() if n not in covered},
        diagonal={n: d / tokens for n, d in rest.diagonal.items() if n not in covered},
        called=frozenset(sums.called),
        fisher=sums.fisher_kind,
        rank_counts=tuple(rank_counts),
    )


class _Forming:
    """Makes the layers' factors; layers that share a sum of inputs share its factor."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._made: dict[int, Factor] = {}

    def layer(self, layer: Layer) -> LayerFactors:
        """Returns a layer's factors, pooled with those of its partner where it has one."""
        sums = self.sums
        side = sums.sides[layer.name]
        count = n_draws(sums.fisher_kind, sums.settings)
        weight = 1.0 / (side.tokens * count)
        own = self._tied_own(layer) if layer.tied else side.own
        own = None if own is None else own / sums.n_labels
        common: dict[str, Any] = {
            "layer": layer, "tokens": side.tokens, "n_labels": sums.n_labels,
            "n_draws": count, "fisher": sums.fisher_kind, "own": own,
        }  # fmt: skip
        if isinstance(side.g, NormAccumulator):
            return LayerFactors(A=None, G=side.g.factor(weight), method="norm", **common)
        if layer.name == sums.head.name:
            common["fisher"] = "true"
            head = sums.head.factor(side.tokens)
            return LayerFactors(A=self._input(side), G=head, method="true_head", **common)
        g = side.g.factor(weight)
        g.label = side.g.what()
        factors = LayerFactors(
            A=self._input(side),
            G=g,
            method="woodbury" if isinstance(g, GramFactor) else "eig",
            **common,
        )
        self._keep_tokens(factors, side, weight)
        return factors if layer.partner is None else self._pooled(factors, layer.partner)

    def _tied_own(self, layer: Layer) -> Tensor | None:
        gradients = self.sums.uncovered.gradients
        weight = gradients.get(layer.weight)
        bias = gradients.get(layer.bias) if layer.bias is not None else None
        return None if weight is None else layer.to_matrix(weight, bias, weight.dtype)

    def _input(self, side: Side) -> Factor:
        if side.group not in self._made:
            self._made[side.group] = factor = self.sums.inputs[side.group].factor()
            factor.label = _input_label(side)
        return self._made[side.group]

    def _keep_tokens(self, factors: LayerFactors, side: Side, weight: float) -> None:
        """Keeps the tokens that push-through and EKFAC need, and the unrounded columns."""
        accumulator, settings = side.g, self.sums.settings
        assert isinstance(accumulator, GradientAccumulator)
        in_order = accumulator.tokens_in_order() and isinstance(factors.G, GramFactor)
        if in_order or settings.ekfac:
            factors.a = joined(side.inputs, _input_label(side))
            factors.spread = side.spread
        factors.push = (
            in_order
            and self.sums.fisher_kind == "empirical"
            and not side.layer.tied
            and settings.push_through
        )
        if settings.ekfac:
            device = self.sums.device
            empty = torch.empty(0, side.layer.n_out, device=device)
            factors.tokens_g = joined(side.last_g, accumulator.what()) if side.last_g else empty
            nowhere = torch.empty(0, dtype=torch.int64, device=device)
            factors.order = torch.cat([nowhere, *side.order])
        factors.exact = accumulator.exact_factor(weight)

    def _pooled(self, head: LayerFactors, partner: Layer) -> LayerFactors:
        """Both uses of a tied weight: vocabulary side ``G_head + A_emb``, width side the rest."""
        if partner.name not in self.sums.sides:
            return head
        pool(head, self.layer(partner), self.sums.settings.numerics.core_dtype)
        head.push, head.exact = False, None
        return head


def _input_label(side: Side) -> str:
    layer = side.layer
    return f"layer {layer.name}: A side (in={layer.dim_a}, tokens={side.tokens})"


def joined(parts: list[Tensor], what: str) -> Tensor:
    """Returns the parts one under the other, on the host where the device has no room for that.

    Args:
        parts: ``[n, ...]`` each; moved to the host where that is needed.
        what: layer, side and dimensions, for the log.
    """

    def retreat() -> bool:
        moved = any(part.device != HOST for part in parts) or not tried
        tried.append(None)
        parts[:] = [part.to(HOST) for part in parts]
        return moved

    tried: list[None] = []
    return on_host_if_full(
        lambda: parts[0] if len(parts) == 1 else torch.cat(parts), retreat, f"{what}, tokens kept"
    )


def pool(head: LayerFactors, embedding: LayerFactors, core_dtype: torch.dtype) -> None:
    """Adds the factors of an embedding to those of the head that has the same weight.

    Args:
        head: changed in place.
        embedding: its A is a diagonal over the vocabulary, its G of the model's width.
        core_dtype: of the sums.
    """
    counts, g = embedding.A, head.G
    assert isinstance(counts, DiagonalFactor)
    assert isinstance(head.A, DenseFactor)
    head.A = _pooled_width(head.A, embedding.G, embedding.layer.n_out)
    if isinstance(g, GramFactor):
        head.G = DiagonalLowRankFactor(counts.diagonal, g.columns, g.weight, 1, core_dtype)
    else:
        assert isinstance(g, DenseFactor)

        def dense() -> Tensor:
            matrix = g.matrix.clone()
            matrix.diagonal().add_(counts.diagonal.to(matrix))
            return matrix

        head.G = DenseFactor(on_host_if_full(dense, g.to_host, f"{g.label}, pooled"))
    head.G.label = g.label


def _pooled_width(a: DenseFactor, width: Factor, n: int) -> DenseFactor:
    """The head's A plus the embedding's G ``[n, n]``; a bias column of the head stays as it is."""

    def pooled() -> Tensor:
        total = a.matrix.clone()
        identity = torch.eye(n, dtype=total.dtype, device=total.device)
        total[:n, :n] += width.multiply(identity.to(width.device)).to(total.device)
        return total

    def retreat() -> bool:
        moved = width.to_host()
        return a.to_host() or moved

    result = DenseFactor(on_host_if_full(pooled, retreat, f"{a.label}, pooled"))
    result.label = a.label
    return result

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
    Factor,
)
from fisher_lab.curvature.kfac.layer_factors import Built, LayerFactors
from fisher_lab.curvature.kfac.layers import Layer
from fisher_lab.curvature.kfac.statistics import Side, Sums
from fisher_lab.curvature.memory import on_device


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
        factors = LayerFactors(
            A=self._input(side),
            G=g,
            method=g.method,
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
            self._made[side.group] = self.sums.inputs[side.group].factor()
        return self._made[side.group]

    def _keep_tokens(self, factors: LayerFactors, side: Side, weight: float) -> None:
        """Keeps the tokens that push-through and EKFAC need, and the unrounded columns."""
        accumulator, settings = side.g, self.sums.settings
        assert isinstance(accumulator, GradientAccumulator)
        in_order = accumulator.tokens_in_order()
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
            factors.tokens_g = joined(side.last_g, accumulator.label) if side.last_g else empty
            nowhere = torch.empty(0, dtype=torch.int64, device=device)
            factors.order = torch.cat([nowhere, *side.order])
        factors.exact = accumulator.exact_factor(weight)

    def _pooled(self, head: LayerFactors, partner: Layer) -> LayerFactors:
        """Both uses of a tied weight: vocabulary side ``G_head + A_emb``, width side the rest."""
        if partner.name not in self.sums.sides:
            return head
        pool(head, self.layer(partner))
        head.push, head.exact = False, None
        return head


def _input_label(side: Side) -> str:
    layer = side.layer
    return f"layer {layer.name}: A side (in={layer.dim_a}, tokens={side.tokens})"


def joined(parts: Sequence[Tensor], what: str) -> Tensor:
    """Returns the parts one under the other, in host memory where the device is full.

    Args:
        parts: ``[n, ...]`` each.
        what: layer, side and dimensions, for the log.
    """

    def join(device: torch.device) -> Tensor:
        there = [part.to(device) for part in parts]
        return there[0] if len(there) == 1 else torch.cat(there)

    return on_device(join, parts[0].device, f"{what}, tokens kept")


def pool(head: LayerFactors, embedding: LayerFactors) -> None:
    """Adds the factors of an embedding to those of the head that has the same weight.

    Args:
        head: changed in place.
        embedding: its A is a diagonal over the vocabulary, its G of the model's width.
    """
    a, g, counts, width = head.A, head.G, embedding.A, embedding.G
    assert a is not None
    assert isinstance(counts, DiagonalFactor)

    def both_to_host() -> None:
        a.to_host()
        width.to_host()

    # Products of a sharded factor are collective: then no rank repeats them by itself.
    guard = width if width.sharded else a
    head.A = guard.on_device("pooled", lambda: _sum_of(a, width), both_to_host)
    head.G = g.on_device("pooled", lambda: g.plus_diagonal(counts.diagonal), g.to_host)
    head.A.label, head.G.label = a.label, g.label


def _sum_of(a: Factor, width: Factor) -> Factor:
    """The head's A plus the embedding's G ``[n, n]``; a bias column of the head stays as it is."""
    total, n = a.to_dense().clone(), width.dim
    total[:n, :n] += width.to_dense().to(total.device)
    return DenseFactor(total)

"""Makes the statistics of this rank those of all ranks (``docs/math.md``, section 7).

Every rank has captured its own batches, and nothing has been exchanged so far. After
:func:`reduce` each rank has what one process would have summed over the batches of all
ranks: sums are added, token columns gathered (``gather``) or exchanged for rows (``gram``). The
tokens are those of rank 0, then those of rank 1, and so on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import (
    Communicator,
    Spread,
    chosen_rows,
    dtype_name,
    exchange_tokens_for_outputs,
    together,
)
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac.accumulators import GradientAccumulator, NormAccumulator
from fisher_lab.curvature.kfac.inverses import owners
from fisher_lab.curvature.kfac.layers import Kind, Layer
from fisher_lab.curvature.kfac.policy import wants_woodbury
from fisher_lab.curvature.kfac.statistics import InputSum, Side, Statistics
from fisher_lab.curvature.linalg import full_precision


@full_precision()
def reduce(sums: Statistics, communicator: Communicator) -> list[dict[str, int]]:
    """Makes the statistics of this rank those of all ranks; collective.

    Args:
        sums: of this rank, after its last batch.
        communicator: of the ranks.

    Returns:
        Tokens and labels of each rank.

    Raises:
        CurvatureError: the ranks have different models, layers or settings.
    """
    counts = communicator.all_gather_objects(sums.counts())
    if communicator.size > 1:
        _Reduction(sums, communicator).run()
    return counts


def _fingerprint(sums: Statistics) -> str:
    layers = [(x.name, x.n_in, x.n_out, x.bias) for x in sums.everyone()]
    text = f"{layers} {sums.settings} {sums.keep_gradient}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Reduction:
    def __init__(self, sums: Statistics, communicator: Communicator) -> None:
        self.sums, self.communicator = sums, communicator
        self.sharded = sums.settings.reduce == "gram"
        self.core = sums.settings.numerics.core_dtype
        self.device = sums.device
        self.summaries: list[dict[str, Any]] = []

    def run(self) -> None:
        """Reduces everything, in an order that is the same on all ranks."""
        self.summaries = self.communicator.all_gather_objects(self._summary())
        self._take_counts()
        present = [x for x in self.sums.everyone() if any(self._of(x.name, "tokens"))]
        groups = {x.name: self._of(x.name, "group", -1) for x in present}
        self._reduce_inputs(present, groups)
        for layer in present:
            self._reduce_layer(layer)
        self._decompose_matrices(present)
        self._reduce_head()
        self._reduce_named("gradients", self.sums.uncovered.gradients)
        self._reduce_named("diagonal", self.sums.uncovered.diagonal)

    # ---- what each rank knows of the others ------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        sums = self.sums
        return {
            "model": _fingerprint(sums),
            "n_labels": sums.n_labels,
            "n_batches": sums.n_batches,
            "fisher": sums.fisher_kind,
            "head": sums.head.name,
            "called": sorted(sums.called),
            "skipped": sums.skipped,
            "sides": {name: self._summary_of(name) for name in sums.sides},
            "inputs": {str(group): x.tokens for group, x in sums.inputs.items()},
            "gradients": sorted(sums.uncovered.gradients),
            "diagonal": sorted(sums.uncovered.diagonal),
            "rows": sum(len(p) for p in sums.head.parts),
            "logits": next((dtype_name(p.dtype) for p in sums.head.parts), None),
        }

    def _summary_of(self, name: str) -> dict[str, Any]:
        side = self.sums.sides[name]
        summary: dict[str, Any] = {"tokens": side.tokens, "group": side.group}
        if side.inputs:
            summary["a_dtype"] = dtype_name(side.inputs[0].dtype)
        if isinstance(side.g, GradientAccumulator):
            g = side.g
            summary |= {"seen": g.seen, "kept": g.kept, "matrix": g.total is not None}
            summary |= {"reduction": g.reduction, "lost": g.lost}
            summary["dtype"] = dtype_name(g.parts[0].dtype) if g.parts else None
        return summary

    def _of(self, name: str, key: str, missing: Any = 0) -> list[Any]:
        return [summary["sides"].get(name, {}).get(key, missing) for summary in self.summaries]

    def _dtype(self, name: str, key: str) -> torch.dtype:
        """The dtype of a piece, from the first rank that has it."""
        found = next((d for d in self._of(name, key, None) if d is not None), None)
        return self.core if found is None else getattr(torch, found)

    def _take_counts(self) -> None:
        sums, summaries = self.sums, self.summaries
        for rank, other in enumerate(summaries):
            if other["model"] != summaries[0]["model"]:
                raise CurvatureError(
                    f"rank {rank}: its covered layers, K-FAC settings or keep_gradient are not "
                    "those of rank 0; allowed: the same on all ranks"
                )
        sums.n_labels = sum(other["n_labels"] for other in summaries)
        sums.n_batches = sum(other["n_batches"] for other in summaries)
        sums.called = set().union(*(other["called"] for other in summaries))
        for other in summaries:
            sums.skipped = {**other["skipped"], **sums.skipped}
        seen = [other for other in summaries if other["n_batches"]]
        if seen:
            sums.fisher_kind = seen[0]["fisher"]
        sums.head.name = next(
            (other["head"] for other in summaries if other["head"] is not None), None
        )

    # ---- inputs ------------------------------------------------------------------------------

    def _reduce_inputs(self, present: Sequence[Layer], groups: Mapping[str, list[int]]) -> None:
        """Sums the A sides; layers share one where they do on every rank."""
        joined: dict[tuple[int, ...], int] = {}
        local = self.sums.inputs
        result: dict[int, InputSum] = {}
        uses = [key[self.communicator.rank] for key in {tuple(g) for g in groups.values()}]
        for layer in present:
            side = self.sums.side_of(layer)
            if layer.kind is Kind.NORM:
                continue
            key = tuple(groups[layer.name])
            if key not in joined:
                joined[key] = len(joined)
                own = key[self.communicator.rank]
                mine = local.get(own)
                if mine is None:
                    mine = self.sums.input_of(layer)
                elif uses.count(own) > 1:
                    mine = deepcopy(mine)
                tokens = sum(
                    summary["inputs"].get(str(group), 0)
                    for summary, group in zip(self.summaries, key, strict=True)
                )
                mine.reduce(self.communicator, tokens)
                result[joined[key]] = mine
            side.group = joined[key]
        self.sums.inputs = result

    # ---- a layer -----------------------------------------------------------------------------

    def _reduce_layer(self, layer: Layer) -> None:
        sums = self.sums
        side = sums.side_of(layer)
        rows = tuple(self._of(layer.name, "tokens"))
        side.tokens = sum(rows)
        if isinstance(side.g, NormAccumulator):
            side.g.total = self.communicator.all_reduce(side.g.total)
        elif layer.name != sums.head.name:
            self._reduce_gradients(layer, side.g)
            self._reduce_tokens(layer, side, side.g, rows)
        if sums.keep_gradient and not layer.tied:
            width = side.g.total.shape[0] if isinstance(side.g, NormAccumulator) else 0
            shape = (width, 1) if width else (layer.n_out, layer.dim_a)
            own = side.own
            if own is None:
                own = torch.zeros(shape, dtype=self.core, device=self.device)
            side.own = self.communicator.all_reduce(own.contiguous())

    def _reduce_tokens(
        self, layer: Layer, side: Side, g: GradientAccumulator, rows: tuple[int, ...]
    ) -> None:
        """Inputs and unreduced gradients of the tokens, where push-through or EKFAC want them."""
        ekfac = self.sums.settings.ekfac
        if not (ekfac or g.tokens_in_order()):
            side.inputs.clear()
            return
        if not side.inputs:
            shape = (0,) if layer.kind is Kind.EMBEDDING else (0, layer.n_in)
            dtype = self._dtype(layer.name, "a_dtype")
            side.inputs = [torch.empty(shape, dtype=dtype, device=self.device)]
        spread = Spread(self.communicator, rows)
        if self.sharded or ekfac:
            side.spread = spread
            return
        side.inputs = [spread.gather(torch.cat(side.inputs))]

    # ---- token gradients ---------------------------------------------------------------------

    def _reduce_gradients(self, layer: Layer, g: GradientAccumulator) -> None:
        name, settings = layer.name, g.settings
        kept, matrix = sum(self._of(name, "kept")), any(self._of(name, "matrix", False))
        g.seen = sum(self._of(name, "seen"))
        woodbury = wants_woodbury(settings, g.out, g.seen)
        wide = self.sharded and g.seen > g.out
        if g.dense_allowed and (matrix or not woodbury or wide or kept > settings.max_columns):
            g.reduction = "lossless" if woodbury else ""
            self._sum_matrix(g)
            return
        if not g.parts:
            dtype = self._dtype(name, "dtype")
            g.parts = [torch.empty(0, g.out, dtype=dtype, device=self.device)]
        rows = self._of(name, "kept")
        reduced = any(self._of(name, "reduction", ""))
        if settings.column_reduction == "subsample" and (kept > settings.max_columns or reduced):
            rows = g.subsample(rows, self.communicator)
        g.parts = [self._put_together(g.joined(), rows)]
        g.kept = sum(rows)
        if self.sharded:
            g.ranks = self.communicator
        if settings.column_reduction == "lowrank" and (kept > settings.max_columns or reduced):
            g.truncate(sum(self._of(name, "lost", 0.0)), self.communicator)

    def _sum_matrix(self, g: GradientAccumulator) -> None:
        if g.parts:
            g.to_matrix()
        total = g.total
        if total is None:
            total = torch.zeros(g.out, g.out, dtype=self.core, device=self.device)
        g.total = self.communicator.all_reduce(total)

    def _decompose_matrices(self, present: Sequence[Layer]) -> None:
        """Decomposes each matrix that stands for columns on one rank, for all of them."""
        every = [self.sums.side_of(layer).g for layer in present]
        summed = [g for g in every if isinstance(g, GradientAccumulator) and g.reduction]
        summed = [g for g in summed if g.total is not None]
        owner = owners([g.out for g in summed], self.communicator.size)

        def decompose_own() -> None:
            for g, rank in zip(summed, owner, strict=True):
                if rank == self.communicator.rank:
                    g.on_device(g.decomposed)

        together(self.communicator, decompose_own)
        for g, rank in zip(summed, owner, strict=True):
            assert g.total is not None
            mine = g.eigen or (g.total.new_empty(g.out), torch.empty_like(g.total))
            # Its owner too takes what was sent: libraries return columns, and rows arrive.
            values, vectors = (self.communicator.broadcast(x.contiguous(), rank) for x in mine)
            g.eigen = values, vectors

    def _put_together(self, columns: Tensor, rows: Sequence[int]) -> Tensor:
        """All tokens of all outputs (``gather``), or of this rank's slice of them (``gram``)."""
        if not self.sharded:
            return self.communicator.all_gather(columns, rows)
        return exchange_tokens_for_outputs(columns, rows, self.communicator)

    # ---- head, uncovered parameters ----------------------------------------------------------

    def _reduce_head(self) -> None:
        """Probabilities of the head's labelled tokens, subsampled before they are moved."""
        sums = self.sums
        rows = [summary["rows"] for summary in self.summaries]
        if sums.head.name is None or not any(rows):
            return
        classes = sums.head.classes
        named = next(
            summary["logits"] for summary in self.summaries if summary["logits"] is not None
        )
        parts = sums.head.parts
        device = parts[0].device if parts else self.device
        p = torch.cat([torch.empty(0, classes, dtype=getattr(torch, named), device=device), *parts])
        chosen = sums.head.chosen(sum(rows))
        if chosen is not None:
            sums.head.weight = sum(rows) / len(chosen)
            p, rows = chosen_rows(p, rows, chosen, self.communicator)
        sums.head.parts = [self._put_together(p, rows)]
        if self.sharded:
            sums.head.ranks = self.communicator

    def _reduce_named(self, key: str, sums: dict[str, Tensor]) -> None:
        """Sums over parameters that any rank has."""
        names = sorted(set().union(*(summary[key] for summary in self.summaries)))
        for name in names:
            mine = sums.get(name)
            if mine is None:
                shape = self.sums.uncovered.parameters[name].shape
                mine = torch.zeros(shape, dtype=self.core, device=self.device)
            sums[name] = self.communicator.all_reduce(mine)

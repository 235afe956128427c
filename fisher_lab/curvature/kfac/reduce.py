"""Makes the statistics of this rank those of all ranks (``docs/math.md``, section 7).

Every rank has captured its own batches, and nothing has been exchanged so far. After
:func:`reduce` each rank has what one process would have summed over the batches of all
ranks: sums are added, token columns gathered (``gather``) or exchanged for rows (``gram``). The
tokens are those of rank 0, then those of rank 1, and so on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from fisher_lab.curvature.errors import CurvatureError, LayerError
from fisher_lab.curvature.kfac.accumulators import BlockAccumulator, GradientAccumulator
from fisher_lab.curvature.kfac.inverses import owners
from fisher_lab.curvature.kfac.layers import Layer, layer_of, plain
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.parts import is_element
from fisher_lab.curvature.kfac.policy import wants_woodbury
from fisher_lab.curvature.kfac.statistics import InputSum, LayerSums, Statistics
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


class _Reduction:
    """Reduces everything, in an order that is the same on all ranks."""

    def __init__(self, sums: Statistics, communicator: Communicator) -> None:
        self.sums, self.communicator = sums, communicator
        self.sharded = sums.settings.reduce == "gram"
        self.core = sums.settings.numerics.core_dtype
        self.device = sums.device
        self.summaries: list[dict[str, Any]] = []

    def run(self) -> None:
        self.summaries = self.communicator.all_gather_objects(self._summary())
        self._take_counts()
        present = [x for x in self.sums.everyone() if any(self._of(x.name, "tokens"))]
        self._reduce_inputs(present)
        for layer in present:
            self._reduce_layer(layer)
        self._decompose_matrices(present)
        self._reduce_head()
        self._reduce_named("gradients", self.sums.uncovered.gradients)
        self._reduce_named("diagonal", self.sums.uncovered.diagonal)

    def _summary(self) -> dict[str, Any]:
        sums = self.sums
        layers = [(x.name, x.n_in, x.n_out, x.biases) for x in sums.promised.layers.values()]
        text = f"{layers} {sums.settings} {sums.keep_gradient}"
        return {
            "model": hashlib.sha256(text.encode()).hexdigest()[:16],
            "n_labels": sums.n_labels,
            "n_batches": sums.n_batches,
            "labels_given": sums.labels_given,
            "labelling": sums.labelling,
            "fisher": sums.fisher_kind,
            "head": sums.head.name,
            "observed": {name: plain(layer) for name, layer in sums.layers.layers.items()},
            "skipped": sums.skipped,
            "layers": {name: self._summary_of(found) for name, found in sums.by_layer.items()},
            "inputs": {str(group): x.tokens for group, x in sums.inputs.items()},
            "gradients": sorted(sums.uncovered.gradients),
            "diagonal": sorted(sums.uncovered.diagonal),
            "rows": sum(len(p) for p in sums.head.parts),
            "diagonal_head": sums.head.diagonal is not None,
            "hessian": sums.head.hessian,
            "logits": next((dtype_name(p.dtype) for p in sums.head.parts), None),
        }

    def _summary_of(self, layer_sums: LayerSums) -> dict[str, Any]:
        g, inputs = layer_sums.g, layer_sums.inputs
        summary: dict[str, Any] = {"tokens": layer_sums.tokens, "group": layer_sums.group}
        if inputs:
            summary["a_dtype"] = dtype_name(inputs[0].dtype)
        if isinstance(g, GradientAccumulator):
            summary |= {"seen": g.seen, "kept": g.kept, "matrix": g.total is not None}
            summary |= {"reduction": g.reduction, "lost": g.lost}
            summary["dtype"] = dtype_name(g.parts[0].dtype) if g.parts else None
        return summary

    def _of(self, name: str, key: str, missing: Any = 0) -> list[Any]:
        return [summary["layers"].get(name, {}).get(key, missing) for summary in self.summaries]

    def _no_rows(self, name: str, key: str, *shape: int) -> Tensor:
        """No rows ``[0, *shape]``, in the dtype of the first rank that has some."""
        found = next((d for d in self._of(name, key, None) if d is not None), None)
        dtype = self.core if found is None else getattr(torch, found)
        return torch.empty(0, *shape, dtype=dtype, device=self.device)

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
        sums.labels_given = sum(other["labels_given"] for other in summaries)
        sums.labelling = next((x["labelling"] for x in summaries if x["labelling"]), "")
        for other in summaries:
            observed = {name: layer_of(entry) for name, entry in other["observed"].items()}
            sums.take(Layers(observed, other["skipped"], frozenset()))
        kinds = [other["fisher"] for other in summaries if other["n_batches"]]
        sums.fisher_kind = next(iter(kinds), sums.fisher_kind)
        sums.head.name = next((x["head"] for x in summaries if x["head"] is not None), None)
        if sums.head.name is not None:
            sums.head.classes = sums.layers.layers[sums.head.name].n_out

    def _reduce_inputs(self, present: Sequence[Layer]) -> None:
        """Sums the A sides; layers share one where they do on every rank."""
        rank, groups = self.communicator.rank, dict[tuple[int, ...], list[Layer]]()
        for layer in present:
            if not layer.one_block:
                groups.setdefault(tuple(self._of(layer.name, "group", -1)), []).append(layer)
        uses = [key[rank] for key in groups]
        result: dict[int, InputSum] = {}
        for number, (key, layers) in enumerate(groups.items()):
            mine = self.sums.inputs.get(key[rank])
            if mine is None:
                mine = self.sums.input_of(layers[0])
            elif uses.count(key[rank]) > 1:
                mine = deepcopy(mine)
            tokens = [
                summary["inputs"].get(str(group), 0)
                for summary, group in zip(self.summaries, key, strict=True)
            ]
            mine.reduce(self.communicator, sum(tokens))
            result[number] = mine
            for layer in layers:
                self.sums.of(layer).group = number
        self.sums.inputs = result

    def _reduce_layer(self, layer: Layer) -> None:
        sums, layer_sums = self.sums, self.sums.of(layer)
        rows = tuple(self._of(layer.name, "tokens"))
        layer_sums.tokens = sum(rows)
        shape = (layer.n_out, layer.dim_a)
        if isinstance(layer_sums.g, BlockAccumulator):
            layer_sums.g.total = self.communicator.all_reduce(layer_sums.g.total)
            shape = (layer_sums.g.dim, 1)
        elif layer.name != sums.head.name:
            self._reduce_gradients(layer, layer_sums.g)
            self._reduce_tokens(layer_sums, layer_sums.g, rows)
        elif sums.settings.ekfac:
            self._reduce_tokens(layer_sums, layer_sums.g, rows)
        if sums.keep_gradient and not layer.tied:
            own = layer_sums.own
            if own is None:
                own = torch.zeros(shape, dtype=self.core, device=self.device)
            layer_sums.own = self.communicator.all_reduce(own.contiguous())

    def _reduce_tokens(
        self, layer_sums: LayerSums, g: GradientAccumulator, rows: tuple[int, ...]
    ) -> None:
        """Inputs and unreduced gradients of the tokens, where push-through or EKFAC want them."""
        layer, ekfac = layer_sums.layer, self.sums.settings.ekfac
        if not (ekfac or g.tokens_in_order()):
            layer_sums.inputs.clear()
            return
        if not layer_sums.inputs:
            shape = () if layer.kind.looks_up else (layer.width,)
            layer_sums.inputs = [self._no_rows(layer.name, "a_dtype", *shape)]
        spread = Spread(self.communicator, rows)
        if self.sharded or ekfac:
            layer_sums.spread = spread
        else:
            layer_sums.inputs = [spread.gather(torch.cat(layer_sums.inputs))]

    def _reduce_gradients(self, layer: Layer, g: GradientAccumulator) -> None:
        name, settings = layer.name, g.settings
        rows = self._of(name, "kept")
        g.seen = sum(self._of(name, "seen"))
        too_many = sum(rows) > settings.max_columns
        woodbury = wants_woodbury(settings, g.out, g.seen)
        if self.sharded and settings.experts == "pooled" and is_element(layer.weight):
            # Slices of some experts' columns do not add up with the matrices of others.
            if not g.dense_allowed:
                raise LayerError(
                    f"layer {name}: experts='pooled' with kfac_distributed_reduce='gram' adds up "
                    f"matrices of side {g.out}, beyond max_dense_dim={settings.max_dense_dim}; "
                    "allowed: gather, none, experts='each'"
                )
            woodbury = False
        dense = not woodbury or too_many or any(self._of(name, "matrix", False))
        if g.dense_allowed and (dense or (self.sharded and g.seen > g.out)):
            g.reduction = "lossless" if woodbury else ""
            if g.parts:
                g.to_matrix()
            if g.total is None:
                g.total = torch.zeros(g.out, g.out, dtype=self.core, device=self.device)
            g.total = self.communicator.all_reduce(g.total)
            return
        g.parts = g.parts or [self._no_rows(name, "dtype", g.out)]
        too_many = too_many or any(self._of(name, "reduction", ""))
        if too_many and settings.column_reduction == "subsample":
            rows = g.subsample(rows, self.communicator)
        g.parts = [self._put_together(g.joined(), rows)]
        g.kept = sum(rows)
        if self.sharded:
            g.ranks = self.communicator
        if too_many and settings.column_reduction == "lowrank":
            g.truncate(sum(self._of(name, "lost", 0.0)), self.communicator)

    def _decompose_matrices(self, present: Sequence[Layer]) -> None:
        """Decomposes each matrix that stands for columns on one rank, for all of them."""
        every = [self.sums.of(layer).g for layer in present]
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

    def _reduce_head(self) -> None:
        """Probabilities of the head's labelled tokens, subsampled before they are moved."""
        head, rows = self.sums.head, [summary["rows"] for summary in self.summaries]
        head.hessian = next((x["hessian"] for x in self.summaries if x["hessian"]), "")
        if head.hessian:
            side = head.classes
            nothing = torch.zeros(side, side, dtype=self.core, device=self.device)
            mine = nothing if head.matrix is None else head.matrix
            head.matrix = self.communicator.all_reduce(mine)
            return
        if any(summary["diagonal_head"] for summary in self.summaries):
            nothing = torch.zeros(head.classes, dtype=self.core, device=self.device)
            mine = nothing if head.diagonal is None else head.diagonal
            head.diagonal = self.communicator.all_reduce(mine)
            return
        if head.name is None or not any(rows):
            return
        dtype = next(x["logits"] for x in self.summaries if x["logits"] is not None)
        device = head.parts[0].device if head.parts else self.device
        nothing = torch.empty(0, head.classes, dtype=getattr(torch, dtype), device=device)
        p, chosen = torch.cat([nothing, *head.parts]), head.chosen(sum(rows))
        if chosen is not None:
            head.weight = sum(rows) / len(chosen)
            p, rows = chosen_rows(p, rows, chosen, self.communicator)
        head.parts = [self._put_together(p, rows)]
        if self.sharded:
            head.ranks = self.communicator

    def _reduce_named(self, key: str, found: dict[str, Tensor]) -> None:
        """Sums over parameters that any rank has."""
        for name in sorted(set().union(*(summary[key] for summary in self.summaries))):
            mine = found.get(name)
            if mine is None:
                shape = self.sums.uncovered.parameters[name].shape
                mine = torch.zeros(shape, dtype=self.core, device=self.device)
            found[name] = self.communicator.all_reduce(mine)

"""The sufficient statistics of a refresh: what lies between captured batches and factors.

:mod:`.collect` adds to them batch by batch, :mod:`.reduce` makes them those of all ranks, and
:mod:`.refresh` divides them into factors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Communicator, Spread, rank_seed
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.accumulators import (
    BlockAccumulator,
    ChannelAccumulator,
    CountAccumulator,
    GradientAccumulator,
    MomentAccumulator,
    NormAccumulator,
)
from fisher_lab.curvature.kfac.capture import HIDDEN, Call, Capture, edge_of
from fisher_lab.curvature.kfac.examples import NO_EXAMPLE
from fisher_lab.curvature.kfac.factors import (
    DenseFactor,
    DiagonalFactor,
    DiagonalLowRankFactor,
    Factor,
    ShardedColumns,
)
from fisher_lab.curvature.kfac.fisher_kinds import scored_of
from fisher_lab.curvature.kfac.layers import Kind, Layer, every_layer
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.parts import base_of, in_order, whole_again
from fisher_lab.curvature.kfac.policy import NORM_MAX_DIM, check, store_columns
from fisher_lab.curvature.linalg import add_second_moment, mirror
from fisher_lab.curvature.losses import SummedLoss, token_losses
from fisher_lab.curvature.memory import on_device

log = logging.getLogger(__name__)

UNLIKE = "its biases differ from batch to batch"
"""Why a layer is left out whose A would have other columns in another batch."""


class Uncovered:
    """Sums over the trainable parameters whose gradients do not come from the layers' tokens.

    Attributes:
        trained: every trainable parameter, by name.
        frozen: how many numbers the others have.
        parameters: by name.
        covered: the other trainable parameters, by name.
        gradients: sums of their gradients by name, in the core dtype.
        diagonal: sums of the squared gradients of each sequence's loss, the same.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        self._settings = settings
        self._dtype = settings.numerics.core_dtype
        named = dict(model.named_parameters())
        self.trained = {n: p for n, p in named.items() if p.requires_grad}
        self.frozen = sum(p.numel() for p in named.values() if not p.requires_grad)
        self.parameters: dict[str, nn.Parameter] = {}
        self.covered: dict[str, nn.Parameter] = {}
        self.gradients: dict[str, Tensor] = {}
        self.diagonal: dict[str, Tensor] = {}

    def leave(self, layers: Layers) -> None:
        """Says which layers there are; what they do not cover is summed here."""
        covered, mixed = (
            {
                base_of(name)
                for layer in layers.layers.values()
                if layer.tied is tied
                for name in layer.names
            }
            for tied in (False, True)
        )
        # A tied weight's own gradient comes from both uses: autograd adds them up.
        self._layers = layers
        self.parameters = {n: p for n, p in self.trained.items() if n not in covered - mixed}
        self.covered = {n: p for n, p in self.trained.items() if n not in self.parameters}

    @property
    def wants_diagonal(self) -> bool:
        """Whether the diagonal was asked for, of at least one parameter."""
        return self._settings.uncovered == "diagonal" and bool(self.parameters)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds gradients of a token-summed loss, of all :attr:`parameters` or of none."""
        for name, grad in zip(self.parameters, grads, strict=False):
            if grad is not None:
                self.add_one(name, grad)

    def add_one(self, name: str, grad: Tensor) -> None:
        """Adds the gradient of one parameter."""
        self._add_to(self.gradients, name, grad.to(self._dtype))

    def add_part(self, name: str, grad: Tensor) -> None:
        """Adds the gradient of a layer's weight, which may be a part of a parameter."""
        base = base_of(name)
        whole = {base: self.trained[base].shape}
        self.add_one(base, whole_again({name: grad}, whole)[base])

    def add_diagonal(self, loss: SummedLoss, capture: Capture) -> None:
        """Adds squared gradients of each sequence's token-summed loss.

        Raises:
            SettingError: the loss has no logits.
        """
        scored = scored_of(loss, "uncovered=diagonal")
        losses = token_losses(scored)
        tied = {base_of(layer.weight) for layer in self._layers.layers.values() if layer.tied}
        names = [name for name in self.parameters if name not in tied]
        parameters = capture.live([self.parameters[name] for name in names])
        for row in scored.rows.unique().tolist():
            total = losses[scored.rows == row].sum()
            grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    self._add_to(self.diagonal, name, grad.to(self._dtype).square())

    def _add_to(self, sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value


class TrueFisherHead:
    """Which layer gives the outputs of the loss, and what its exact Fisher factor is made from.

    Attributes:
        name: of the layer; None before the first batch, or where no such head is wanted.
        parts: probabilities ``[labels, classes]``, one tensor per batch; of a loss whose Hessian is
            diagonal none, and none where there is a matrix.
        diagonal: sum ``[classes]`` of the diagonals of such Hessians, in the core dtype.
        matrix: sum ``[classes, classes]`` of the Hessians, in the core dtype, where EKFAC needs the
            eigenvectors.
        hessian: ``softmax`` or ``diagonal``, what the Hessians are, where a batch has come.
        weight: labelled tokens that each kept one stands for.
        ranks: the ranks of which each holds a slice of the classes, where that is so.
    """

    def __init__(self, settings: EngineSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self.classes = 0
        self.name: str | None = None
        self.parts: list[Tensor] = []
        self.diagonal: Tensor | None = None
        self.matrix: Tensor | None = None
        self.hessian = ""
        self.weight = 1.0
        self.ranks: Communicator | None = None
        self._sought = False

    def find(
        self, loss: SummedLoss, layers: Sequence[Layer], calls: Mapping[str, list[Call]]
    ) -> None:
        """Finds the layer whose output *is* the logits, where the true-Fisher head is wanted.

        Where there is none and ``fisher=true``, all layers get what the inner ones get.

        Raises:
            SettingError: the loss has no logits.
            LayerError: no covered layer's output is the logits, and the head was asked for.
        """
        settings = self._settings
        if not (settings.true_fisher_head or settings.fisher == "true") or self._sought:
            return
        scored = scored_of(loss, "true")
        self._sought = True
        # By the graph's edge: an address may have been another tensor's before. A layer that is
        # used a second time has a gradient beside that of the logits.
        wanted = None if loss.logits is None else edge_of(loss.logits)
        for layer in layers:
            linear = layer.kind in (Kind.LINEAR, Kind.CONV1D)
            uses = calls.get(layer.name, ())
            found = [call.edge == wanted and call.use.gives is None for call in uses]
            if linear and found == [True] and layer.n_out == scored.logits.shape[1]:
                if self._fits(layer):
                    self.name, self.classes = layer.name, layer.n_out
                return
        if settings.true_fisher_head:
            raise LayerError(
                "true Fisher head: the output of no covered layer is the logits themselves; "
                "allowed: kfac_true_fisher_head=False, or a model whose head is covered and ends "
                "in the logits"
            )
        log.info(
            "the output of no covered layer is the logits: no layer is the head of fisher=true"
        )

    def _fits(self, layer: Layer) -> bool:
        """Whether the head's eigenvectors may be formed, where EKFAC needs them.

        Raises:
            LayerError: they may not, and the head was asked for.
        """
        settings = self._settings
        if not settings.ekfac or layer.n_out <= settings.max_dense_dim:
            return True
        text = (
            f"layer {layer.name}: EKFAC of a true-Fisher head needs its {layer.n_out} x "
            f"{layer.n_out} eigenvectors; allowed: out <= max_dense_dim = {settings.max_dense_dim}"
        )
        if settings.true_fisher_head:
            raise LayerError(f"{text}, or ekfac=False")
        log.warning("%s; the head gets the Fisher matrix of the inner layers", text)
        return False

    def expected(self, loss: SummedLoss) -> Tensor | None:
        """Returns what EKFAC's moments need of a batch's labelled tokens, ``[labels, classes]``.

        Probabilities, or the diagonals of Hessians; None where there is no head, or no label.
        """
        if self.name is None or loss.scored is None or loss.scored.n_labels == 0:
            return None
        logits = loss.scored.logits.detach()
        variances = loss.scored.likelihood.variances(logits)
        return logits.softmax(dim=-1) if variances is None else variances

    def _add_matrix(self, loss: SummedLoss) -> None:
        found = self.expected(loss)
        if found is None or loss.scored is None:
            return
        diagonal = loss.scored.likelihood.variances(loss.scored.logits.detach()) is not None
        self.hessian = "diagonal" if diagonal else "softmax"
        what = f"{self._label(len(found))}, Hessians"

        def there(device: torch.device) -> Tensor:
            core = self._settings.numerics.core_dtype
            total = torch.zeros(self.classes, self.classes, dtype=core, device=device)
            if self.hessian == "softmax":
                add_second_moment(total, found.to(device))
                mirror(total).neg_()
            total.diagonal().add_(found.to(device).sum(dim=0, dtype=core))
            return total if self.matrix is None else total.add_(self.matrix.to(device))

        self.matrix = on_device(there, self._device, what)

    def add(self, loss: SummedLoss) -> None:
        """Adds what a batch's labelled tokens give: probabilities, or diagonals of Hessians."""
        if self.name is None or loss.scored is None or loss.scored.n_labels == 0:
            return
        if self._settings.ekfac:
            self._add_matrix(loss)
            return
        logits = loss.scored.logits.detach()
        variances = loss.scored.likelihood.variances(logits)
        if variances is not None:
            total = variances.sum(dim=0, dtype=self._settings.numerics.core_dtype)
            self.diagonal = total if self.diagonal is None else self.diagonal + total
            return
        first = self.parts[0].device if self.parts else logits.device
        what = f"{self._label(len(logits))}, probabilities"
        p = on_device(lambda device: logits.to(device).softmax(dim=-1), first, what)
        self.parts = [*(part.to(p.device) for part in self.parts), p]

    def chosen(self, labels: int) -> Tensor | None:
        """Returns the indices, ascending, of the labelled tokens in use; None for all of them."""
        most = self._settings.max_columns
        if labels <= most:
            return None
        generator = torch.Generator().manual_seed(self._settings.seed)
        return torch.randperm(labels, generator=generator)[:most].sort().values

    def factor(self, tokens: int) -> Factor:
        """Returns the layer's G, whose ``T`` is ``tokens``."""
        if self.matrix is not None:
            return DenseFactor(self.matrix / tokens)
        if self.diagonal is not None:
            return DiagonalFactor(self.diagonal / tokens)
        rows = sum(len(part) for part in self.parts)
        weight, chosen = self.weight, self.chosen(rows)
        if chosen is not None:
            weight = rows / len(chosen)

        def some(device: torch.device) -> Tensor:
            self.parts = [part.to(device) for part in self.parts]
            p = torch.cat(self.parts)
            return p if chosen is None else p[chosen.to(device)]

        label = self._label(rows)
        p = on_device(some, self.parts[0].device, f"{label}, probabilities")
        name, core = self.name or "", self._settings.numerics.core_dtype
        stored = store_columns(p, self.classes, self._settings, core, name, self._device)
        if self.ranks is not None:
            stored = ShardedColumns(stored, self.classes, self.ranks)
        return DiagonalLowRankFactor.of_rows(stored, weight / tokens, core, label)

    def _label(self, rows: int) -> str:
        return f"layer {self.name}: G side (out={self.classes}, columns={rows})"


InputSum = MomentAccumulator | CountAccumulator
"""The sum of an A side."""


@dataclass
class LayerSums:
    """What is being summed for one layer.

    Attributes:
        layer: the layer.
        g: the sum of its G side (of its whole block, where it has no A).
        group: key of its A side in :attr:`Statistics.inputs`, which layers may share; -1 for none.
        inputs: its tokens ``[T, in]``, a batch each, as long as they may be wanted.
        own: ``sum_t g_t a_t^T``, ``[out, dim_a]`` in the core dtype, where it was asked for.
        tokens: ``T``.
        tokens_g: its token gradients ``[T, out]``, a draw each, where EKFAC needs them.
        order: which row of ``inputs`` each row of ``tokens_g`` belongs to, a draw each.
        sequences: numbers of the sequences, one a draw, that the rows of ``tokens_g`` belong to,
            where EKFAC's moments are those of sequences.
        n_sequences: how many numbers there are.
        spread: the other ranks' tokens, where ``inputs`` are this rank's own only.
        pooled: tokens behind ``g`` and the A side, where other layers have them too; else None.
    """

    layer: Layer
    g: GradientAccumulator | BlockAccumulator
    group: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    own: Tensor | None = None
    tokens: int = 0
    tokens_g: list[Tensor] = field(default_factory=list)
    order: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)
    n_sequences: int = 0
    spread: Spread | None = None
    pooled: int | None = None

    @property
    def rows(self) -> int:
        """Tokens that the factors are averages over."""
        return self.tokens if self.pooled is None else self.pooled


class Statistics:
    """The sums of one refresh: of this process, and after :mod:`.reduce` of all ranks.

    Args:
        model: the model, without its wrappers.
        layers: its K-FAC layers.
        settings: all choices.
        device: the model's.
        keep_gradient: whether the factors' own mean gradient is summed too.
        verify: whether autograd's gradient of the covered parameters is summed, to compare with it.
        rank: this rank, whose draws are its own.

    Attributes:
        n_labels: ``N``.
        labels_given: labels that the caller's batches hold, whether they count or not.
        labelling: which labels count, in words.
        n_batches: how many have come, those without a token included.
        promised: the layers that the model's modules promise.
        layers: those that the forward passes showed.
        skipped: layer name -> why it has no factors this time.
        reasons: name of a parameter that no layer covers, or not alone -> why.
        left_out: of these, the layers that one batch at least cannot be used for.
        by_layer: the sums of each layer, by name; layers without a gradient so far have none.
        inputs: the A sides, by :attr:`LayerSums.group`.
        fisher_kind: kind of Fisher matrix that the inner layers get.
        by_autograd: sums of the gradients of covered parameters, where they are to be verified.
        rounding: machine epsilon of the coarsest tokens that took part in these.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        settings: EngineSettings,
        device: torch.device,
        *,
        keep_gradient: bool = False,
        rank: int,
        verify: bool = False,
    ) -> None:
        self.promised, self.settings, self.keep_gradient = layers, settings, keep_gradient
        self.layers = Layers({}, {}, frozenset())
        self.device, self.verify = device, verify
        self.by_autograd: dict[str, Tensor] = {}
        self.rounding = 0.0
        self.seed = rank_seed(settings.seed, rank)
        self.n_labels = self.n_batches = self.labels_given = 0
        self.labelling = ""
        self.skipped: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.by_layer: dict[str, LayerSums] = {}
        self.inputs: dict[int, InputSum] = {}
        self.fisher_kind: str = settings.fisher
        self.head = TrueFisherHead(settings, device)
        self.uncovered = Uncovered(model, settings)
        self.uncovered.leave(self.layers)

    def take(self, found: Layers) -> None:
        """Takes the layers that a forward pass, or another rank, showed.

        Where another pass shows more uses of a weight, or one that cannot be used, its own gradient
        is autograd's from now on, and what its tokens have given so far is added to that.

        Raises:
            LayerError: factors of a new layer must not be formed.
        """
        layers = dict(self.layers.layers)
        for name, layer in found.layers.items():
            before = layers.get(name)
            if before is not None and before.biases != layer.biases:
                found.skipped[name] = UNLIKE
            if name in self.left_out or found.skipped.get(name) == UNLIKE:
                continue
            if before is None:
                check(self.settings, layer)
            elif layer.tied and not before.tied:
                self._hand_over(name)
            summed = {base_of(n) for n in layer.names} & set(self.uncovered.gradients)
            tied = layer.tied or bool(summed) or (before is not None and before.tied)
            layers[name] = replace(layer, tied=tied)
        for name, reason in found.skipped.items():
            if reason in (HIDDEN, NO_EXAMPLE, UNLIKE):
                self._hand_over(name)
                self.left_out[name] = reason
                self.by_layer.pop(name, None)
                layers.pop(name, None)
        self.skipped = {**found.skipped, **self.skipped, **self.left_out}
        self.reasons = {**found.reasons, **self.reasons}
        place = {name: n for n, name in enumerate(self.promised.layers)}
        order = sorted(layers, key=lambda name: (place.get(name, len(place)), in_order(name)))
        self.layers = Layers({name: layers[name] for name in order}, {}, frozenset())
        self.uncovered.leave(self.layers)

    def _hand_over(self, name: str) -> None:
        """Gives the own gradient of a layer's tokens to those that autograd sums."""
        sums = self.by_layer.get(name)
        if sums is None or sums.own is None:
            return
        for part, gradient in sums.layer.from_matrix(sums.own).items():
            self.uncovered.add_part(part, gradient)
        sums.own = None

    def own_gradients(self) -> dict[str, Tensor]:
        """Returns the sums of the layers' own gradients so far, by parameter."""
        found: dict[str, Tensor] = {}
        shapes = {name: p.shape for name, p in self.uncovered.covered.items()}
        for sums in self.by_layer.values():
            layer = sums.layer
            if sums.own is None or base_of(layer.weight) not in shapes:
                continue
            found |= layer.from_matrix(sums.own)
        return whole_again(found, shapes)

    def everyone(self) -> list[Layer]:
        """Returns all layers, tied partners too, in the model's order."""
        return every_layer(self.layers.layers.values())

    def of(self, layer: Layer) -> LayerSums:
        """Returns what is being summed for a layer; begins it where nothing is there yet."""
        if layer.name not in self.by_layer:
            self.by_layer[layer.name] = LayerSums(layer, self._output_of(layer))
        return self.by_layer[layer.name]

    def _output_of(self, layer: Layer) -> GradientAccumulator | BlockAccumulator:
        """An empty sum for a layer's G side."""
        n, shift = layer.n_out, layer.bias is not None
        core, label = self.settings.numerics.core_dtype, f"layer {layer.name}"
        match layer.kind:
            case Kind.NORM | Kind.BIAS:
                return NormAccumulator(n, shift, n <= NORM_MAX_DIM, core, self.device, label)
            case Kind.DEPTHWISE:
                return ChannelAccumulator(n, layer.n_in, shift, core, self.device, label)
            case _:
                return GradientAccumulator(layer.name, n, self.settings, self.seed)

    def input_of(self, layer: Layer) -> InputSum:
        """Returns an empty sum for a layer's A side."""
        dtype = self.settings.numerics.core_dtype
        if layer.kind.looks_up:
            return CountAccumulator(layer.n_in, dtype, self.device)
        side = f"layer {layer.name}: A side"
        return MomentAccumulator(layer.width, layer.augmented, dtype, self.device, side)

    def counts(self) -> dict[str, int]:
        """Returns tokens and labels that have been summed."""
        tokens = max((side.tokens for side in self.by_layer.values()), default=0)
        return {"tokens": tokens, "labels": self.n_labels}

"""The true-Fisher head: the layer whose output is the logits (``docs/math.md``, section 5).

Its G is the expectation over the model's own softmax: a diagonal less a product of the
probabilities' columns, so that these are all that has to be kept of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .accumulate import as_they_are
from .capture import Call
from .errors import LayerError
from .factors import Columns, DiagonalLowRankFactor
from .fisher import scored_of
from .layers import Kind, Layers, every_layer
from .losses import SummedLoss
from .retreat import HOST, on_host_if_full
from .settings import KFACSettings
from .storage import store_columns


class Head:
    """Which layer is the head, and the probabilities of its labelled tokens.

    Args:
        layers: the model's K-FAC layers.
        settings: all choices.
        device: the model's.

    Attributes:
        name: of the layer; None before the first batch, or where no such head is wanted.
        parts: probabilities ``[labels, classes]``, a batch each.
        share: labelled tokens for each one that is kept.
        spread: makes of stored columns those of several ranks, where a rank has its share only.
    """

    def __init__(self, layers: Layers, settings: KFACSettings, device: torch.device) -> None:
        self._layers, self._settings, self._device = layers, settings, device
        self.name: str | None = None
        self.parts: list[Tensor] = []
        self.share = 1.0
        self.spread: Callable[[Columns], Columns] = as_they_are
        self._hosted = False

    @property
    def classes(self) -> int:
        """Outputs of the layer, once it is found."""
        every = every_layer(self._layers.layers.values())
        return next(layer.n_out for layer in every if layer.name == self.name)

    def find(self, loss: SummedLoss, calls: Mapping[str, list[Call]]) -> None:
        """Finds the layer whose output *is* the logits, where the true-Fisher head is wanted.

        Args:
            loss: of a batch, with its logits.
            calls: of each layer in the batch's forward pass.

        Raises:
            SettingError: the loss has no logits.
            LayerError: no covered layer's output is the logits.
        """
        fisher = self._settings.fisher
        if not (fisher.true_head or fisher.kind == "true") or self.name is not None:
            return
        scored_of(loss, "true")
        # By the graph's edge: an address may have been another tensor's before.
        wanted = None if loss.logits is None else get_gradient_edge(loss.logits)
        for layer in self._layers.layers.values():
            linear = layer.kind in (Kind.LINEAR, Kind.CONV1D)
            if linear and any(c.edge == wanted for c in calls[layer.name]):
                self.name = layer.name
                return
        raise LayerError(
            "true Fisher head: the output of no covered layer is the logits themselves; allowed: "
            "kfac_true_fisher_head=False, or a model whose head is covered and ends in the logits"
        )

    def add(self, loss: SummedLoss) -> None:
        """Adds the probabilities of a batch's labelled tokens."""
        if self.name is None or loss.scored is None or loss.scored.n_labels == 0:
            return
        logits = [loss.scored.logits.detach()]

        def retreat() -> bool:
            logits.append(logits[-1].to(HOST))
            return len(logits) == 2

        what = f"{self._label(len(logits[0]))}, probabilities"
        p = on_host_if_full(lambda: logits[-1].softmax(dim=-1), retreat, what)
        parts = self.parts
        parts.append(p if all(part.device == p.device for part in parts) else p.to(HOST))
        if parts[-1].device != parts[0].device:
            self._to_host()

    def chosen(self, labels: int) -> Tensor | None:
        """Returns which labelled tokens the factor is made of; None for all of them.

        Args:
            labels: labelled tokens of all batches and ranks.

        Returns:
            ``[max_columns]`` their indices, ascending.
        """
        most = self._settings.policy.max_columns
        if labels <= most:
            return None
        generator = torch.Generator().manual_seed(self._settings.fisher.seed)
        return torch.randperm(labels, generator=generator)[:most].sort().values

    def factor(self, tokens: int) -> DiagonalLowRankFactor:
        """Returns the layer's G.

        Args:
            tokens: ``T`` of the layer.
        """
        rows = sum(len(part) for part in self.parts)
        share = self.share
        chosen = self.chosen(rows)
        if chosen is not None:
            share = rows / len(chosen)

        def some() -> Tensor:
            p = torch.cat(self.parts)
            return p if chosen is None else p[chosen.to(p.device)]

        label = self._label(rows)
        p = on_host_if_full(some, self._to_host, f"{label}, probabilities")
        name, core = self.name or "", self._settings.numerics.core_dtype
        stored = store_columns(p, self.classes, self._settings.storage, core, name, self._device)
        return DiagonalLowRankFactor.of_rows(self.spread(stored), share / tokens, core, label)

    def _label(self, rows: int) -> str:
        return f"layer {self.name}: G side (out={self.classes}, columns={rows})"

    def _to_host(self) -> bool:
        """Moves the probabilities; False where they are there already."""
        if self._hosted:
            return False
        self.parts = [part.to(HOST) for part in self.parts]
        self._hosted = True
        return True

"""What has been summed of a refresh's batches: the state between capture and factors.

:class:`~.build.FactorBuilder` adds to it batch by batch, :func:`~.join.join` makes it that of all
ranks, and :func:`~.forming.form` divides it into factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .accumulate import (
    CountAccumulator,
    GradientAccumulator,
    MomentAccumulator,
    NormAccumulator,
)
from .head import Head
from .layers import Kind, Layer, Layers, every_layer
from .settings import KFACSettings
from .spread import Spread, rank_seed
from .uncovered import Uncovered

InputSum = MomentAccumulator | CountAccumulator
"""The sum of an A side."""


@dataclass
class Side:
    """What is being summed for one layer.

    Attributes:
        layer: the layer.
        g: the sum of its G side (of its whole block, for a norm layer).
        group: key of its A side in :attr:`Sums.inputs`, which layers may share; -1 for none.
        inputs: its tokens ``[T, in]``, a batch each, as long as they may be wanted.
        own: ``sum_t g_t a_t^T``, ``[out, dim_a]`` in the core dtype, where it was asked for.
        tokens: ``T``.
        last_g: its token gradients ``[T, out]``, a draw each, where EKFAC needs them.
        order: which row of ``inputs`` each row of ``last_g`` belongs to, a draw each.
        spread: the other ranks' tokens, where ``inputs`` are this rank's own only.
    """

    layer: Layer
    g: GradientAccumulator | NormAccumulator
    group: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    own: Tensor | None = None
    tokens: int = 0
    last_g: list[Tensor] = field(default_factory=list)
    order: list[Tensor] = field(default_factory=list)
    spread: Spread | None = None


class Sums:
    """The sums of one refresh; of this process, and after :func:`~.join.join` of all ranks.

    Args:
        model: the model, without its wrappers.
        layers: its K-FAC layers.
        settings: all choices.
        device: the model's.
        keep_gradient: whether the factors' own mean gradient is summed too.
        rank: this rank, whose draws are its own.

    Attributes:
        n_labels: ``N``.
        n_batches: how many have come, those without a token included.
        called: names of the layers that were called.
        skipped: layer name -> why it has no factors this time.
        sides: by layer name; layers without a gradient so far have none.
        inputs: the A sides, by :attr:`Side.group`.
        fisher_kind: kind of Fisher matrix that the inner layers get.
        head: the true-Fisher head.
        uncovered: parameters that belong to no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        settings: KFACSettings,
        device: torch.device,
        *,
        keep_gradient: bool,
        rank: int,
    ) -> None:
        self.layers, self.settings, self.keep_gradient = layers, settings, keep_gradient
        self.device = device
        self.seed = rank_seed(settings.fisher.seed, rank)
        self.n_labels = 0
        self.n_batches = 0
        self.called: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.sides: dict[str, Side] = {}
        self.inputs: dict[int, InputSum] = {}
        self.fisher_kind: str = settings.fisher.kind
        self.head = Head(layers, settings, device)
        self.uncovered = Uncovered(model, layers, settings)

    def everyone(self) -> list[Layer]:
        """Returns all layers, tied partners too, in the model's order."""
        return every_layer(self.layers.layers.values())

    def side_of(self, layer: Layer) -> Side:
        """Returns what is being summed for a layer; begins it where nothing is there yet."""
        if layer.name not in self.sides:
            s = self.settings
            if layer.kind is Kind.NORM:
                shift = layer.bias is not None
                dense = layer.n_out <= s.coverage.norm_max_dim
                core, label = s.numerics.core_dtype, f"layer {layer.name}"
                g: Any = NormAccumulator(layer.n_out, shift, dense, core, self.device, label)
            else:
                g = GradientAccumulator(
                    layer.name, layer.n_out, s.policy, s.numerics, s.storage, self.seed
                )
            self.sides[layer.name] = Side(layer, g)
        return self.sides[layer.name]

    def input_of(self, layer: Layer) -> InputSum:
        """Returns an empty sum for a layer's A side."""
        dtype = self.settings.numerics.core_dtype
        if layer.kind is Kind.EMBEDDING:
            return CountAccumulator(layer.n_in, dtype, self.device)
        side = f"layer {layer.name}: A side"
        return MomentAccumulator(layer.n_in, layer.augmented, dtype, self.device, side)

    def counts(self) -> dict[str, int]:
        """Returns tokens and labels that have been summed."""
        tokens = max((side.tokens for side in self.sides.values()), default=0)
        return {"tokens": tokens, "labels": self.n_labels}

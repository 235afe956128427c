"""Gradients and diagonal Fisher of the parameters that no layer's tokens give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .capture import Capture
from .fisher import scored_of
from .layers import Layers
from .losses import SummedLoss, token_losses
from .settings import KFACSettings


class Uncovered:
    """Sums over the trainable parameters whose gradients do not come from the layers' tokens.

    Args:
        model: the model, without its wrappers.
        layers: its K-FAC layers.
        settings: all choices.

    Attributes:
        parameters: by name.
        gradients: sums of their gradients by name, in the core dtype.
        diagonal: sums of the squared gradients of each sequence's loss, the same.
    """

    def __init__(self, model: nn.Module, layers: Layers, settings: KFACSettings) -> None:
        self._layers, self._settings = layers, settings
        covered = set()
        for layer in layers.layers.values():
            # A tied weight's own gradient comes from both uses: autograd adds them up.
            if layer.name not in layers.candidates and not layer.tied:
                covered |= {layer.weight, layer.bias}
        named = dict(model.named_parameters())
        self.parameters = {n: p for n, p in named.items() if n not in covered and p.requires_grad}
        self.gradients: dict[str, Tensor] = {}
        self.diagonal: dict[str, Tensor] = {}

    @property
    def wants_diagonal(self) -> bool:
        """Whether the diagonal was asked for, of at least one parameter."""
        return self._settings.coverage.uncovered == "diagonal" and bool(self.parameters)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds gradients of a token-summed loss.

        Args:
            grads: in the order of :attr:`parameters`; empty where they were not asked for.
        """
        for name, grad in zip(self.parameters, grads, strict=False):
            if grad is not None:
                old = self.gradients.get(name)
                grad = grad.to(self._settings.numerics.core_dtype)
                self.gradients[name] = grad if old is None else old + grad

    def add_diagonal(self, loss: SummedLoss, capture: Capture) -> None:
        """Adds squared gradients of each sequence's token-summed loss.

        Args:
            loss: of the batch, with its logits.
            capture: of the batch's forward pass.

        Raises:
            SettingError: the loss has no logits.
        """
        scored = scored_of(loss, "uncovered=diagonal")
        losses = token_losses(scored)
        rows = scored.rows.unique().tolist()
        tied = {layer.weight for layer in self._layers.layers.values() if layer.tied}
        names = [name for name in self.parameters if name not in tied]
        parameters = capture.live([self.parameters[name] for name in names])
        for row in rows:
            grads = torch.autograd.grad(
                losses[scored.rows == row].sum(),
                parameters,
                retain_graph=True,
                allow_unused=True,
            )
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    square = grad.to(self._settings.numerics.core_dtype).square()
                    old = self.diagonal.get(name)
                    self.diagonal[name] = square if old is None else old + square

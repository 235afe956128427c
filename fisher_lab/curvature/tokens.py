"""The tokens of one captured batch, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .accumulate import Where
from .capture import Call, Capture, TokenMasks, is_token_call, share_key
from .layers import Kind, Layer, Layers, every_module
from .losses import SummedLoss


class BatchTokens:
    """Rows of activations and gradients that are tokens, of one backward pass.

    Layers that read the very same tensor share its selected rows.

    Args:
        capture: of the batch's forward pass.
        live: the calls of each layer that look at tokens, of :func:`token_calls`.
        masks: of the batch.
        batch: its index, for the errors.
    """

    def __init__(
        self, capture: Capture, live: Mapping[str, list[Call]], masks: TokenMasks, batch: int
    ) -> None:
        self.live = live
        self._every = capture.calls
        self._masks, self._batch = masks, batch
        self._selected: dict[tuple, Tensor] = {}

    def gradients(self, layer: Layer, given: Mapping[str, list[Tensor | None]]) -> Tensor | None:
        """Returns a layer's token gradients, ``[T, out]``; None where none reached it.

        Args:
            layer: the layer.
            given: by layer name, the gradient of each of its calls' outputs.

        Raises:
            LayerError: shapes and masks do not fit together.
        """
        pairs = zip(self._every[layer.name], given[layer.name], strict=True)
        every = {id(call): g for call, g in pairs}
        calls = self.live[layer.name]
        grads = [every[id(call)] for call in calls]
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None
        parts = []
        for call, g in zip(calls, grads, strict=True):
            g = like.new_zeros(call.output) if g is None else g
            parts.append(self._masks.select(g, call.origin, layer.name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def inputs(self, layer: Layer) -> Tensor:
        """Returns a layer's token inputs, ``[T, in]`` (``[T]`` indices for an embedding).

        Raises:
            LayerError: shapes and masks do not fit together.
            NonFiniteError: they are not finite.
        """
        trailing = 0 if layer.kind is Kind.EMBEDDING else 1
        parts = []
        for call in self.live[layer.name]:
            key = share_key(call, False)
            if key not in self._selected:
                x = self._masks.select(call.a, call.origin, layer.name, trailing=trailing)
                if trailing:
                    Where(layer.name, self._batch, "activations").check(x)
                self._selected[key] = x
            parts.append(self._selected[key])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def token_calls(capture: Capture, layers: Layers, masks: TokenMasks) -> dict[str, list[Call]]:
    """Returns the calls of each layer, tied partners too, that look at tokens.

    Args:
        capture: of the forward pass; with re-entrant checkpoints, after the backward pass.
        layers: the model's K-FAC layers.
        masks: of the batch.
    """
    live: dict[str, list[Call]] = {}
    for layer, _ in every_module(layers.layers.values()):
        confirmed = layer.name not in layers.candidates
        calls = capture.calls[layer.name]
        live[layer.name] = [c for c in calls if is_token_call(layer, c, masks, confirmed)]
    return live


def find_non_finite(
    capture: Capture, layers: Sequence[Layer], masks: TokenMasks, batch: int, loss: SummedLoss
) -> None:
    """Names the first layer whose input is not finite, else the one whose output is not.

    Args:
        capture: of the forward pass.
        layers: in the model's order.
        masks: of the batch.
        batch: its index.
        loss: of the batch.

    Raises:
        NonFiniteError: there is one.
    """
    for layer in layers:
        if layer.kind is Kind.EMBEDDING:
            continue
        for call in capture.calls[layer.name]:
            x = masks.select(call.a, call.origin, layer.name)
            Where(layer.name, batch, "activations").check(x)
    # What no layer reads: the logits, not finite by the weights of the layer that made them.
    if loss.scored is not None:
        logits = loss.logits
        traced = logits is not None and logits.requires_grad
        edge = get_gradient_edge(logits) if logits is not None and traced else None
        calls = [(name, call) for name, found in capture.calls.items() for call in found]
        same = [name for name, call in calls if edge is not None and call.edge == edge]
        head = same[0] if same else "of the logits"
        Where(head, batch, "outputs").check(loss.scored.logits.detach())

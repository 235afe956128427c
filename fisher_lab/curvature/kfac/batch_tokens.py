"""Which rows of a captured forward pass are tokens of the batch, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.kfac.accumulators import check_finite
from fisher_lab.curvature.kfac.capture import Call, Capture, edge_of
from fisher_lab.curvature.kfac.examples import NO_EXAMPLE, ByExample, Examples, joined
from fisher_lab.curvature.kfac.layers import Kind, Layer, every_layer
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.policy import sharing_of, wants_examples, wants_sequences
from fisher_lab.curvature.kfac.token_ids import Origin, Standing, ids_of
from fisher_lab.curvature.labels import position_mask, segments_of
from fisher_lab.curvature.losses import SummedLoss, labels_of

_MASKS = {"decoder": "decoder_attention_mask", "main": "attention_mask"}
"""Which mask of a batch says which positions are tokens, by the side of the model."""


class TokenMasks:
    """Which tokens of a batch count.

    Args:
        capture: of the batch's forward pass.
        batch: the prepared batch.

    Attributes:
        full: whether every position of the batch is a token.
        examples: of the tokens, where a layer has one row an example (K-FAC-reduce), or EKFAC's
            moments are those of sequences.

    Raises:
        BatchError: no position of the batch is active.
    """

    def __init__(self, capture: Capture, batch: Any) -> None:
        self._masks, self._capture = {**masks_of(batch), **capture.given.masks}, capture
        whole = all(bool(mask.all()) for mask in self._masks.values())
        self.full = whole and not capture.given.hidden
        self._found: dict[tuple, Tensor | None] = {}
        self.examples: Examples | None = None
        if any(wants_examples(capture.settings, kind) for kind in Kind):
            labels = labels_of(batch)
            size = None if labels is None else len(labels)
            self.examples = capture.examples(size, segments_of(batch))

    @cached_property
    def _table(self) -> Tensor:
        """The standing of every row by its id."""
        capture = self._capture
        masks = [
            (start, mask)
            for side, shape, start in capture.given.inputs
            if (mask := self._masks.get(side)) is not None and mask.shape == shape
        ]
        return capture.rows.standings(masks, capture.device)

    def _standing(self, ids: Tensor) -> Tensor | None:
        """The standing of rows; None where all of them are tokens."""
        key = (ids.data_ptr(), ids.shape, ids.stride())  # most layers share their ids
        if key not in self._found:
            standing = self._table[ids]
            self._found[key] = None if bool((standing == Standing.TOKEN).all()) else standing
        return self._found[key]

    def knows(self, origin: Origin, trailing: int) -> bool:
        """Says whether it can be told which rows of a tensor are padding.

        Args:
            origin: of the tensor.
            trailing: 1 where its last dimension holds features, else 0.
        """
        if self.full:
            return True
        ids = ids_of(origin, trailing)
        standing = None if ids is None else self._standing(ids)
        return ids is not None and (
            standing is None or not bool((standing == Standing.UNTOLD).any())
        )

    def undecided(self, calls: Iterable[Call]) -> bool:
        """Says whether some calls have rows that count only where a gradient reaches them."""
        return any(self._wait_for_gradient(call) is not None for call in calls)

    def settle(self, calls: Iterable[Call], grads: Mapping[int, Tensor | None]) -> None:
        """Finds which of these rows the gradient of the loss reaches.

        Args:
            calls: of the layers.
            grads: index of a call -> the gradient of its output.
        """
        for call in calls:
            waiting = self._wait_for_gradient(call)
            g = grads.get(call.index)
            if waiting is None or g is None:
                continue
            g = g if call.use.layout is None else call.use.layout.outputs(g)
            g = g if call.use.rows is None else g[call.use.rows]
            call.reached = waiting & (g != 0).any(dim=-1)

    def _wait_for_gradient(self, call: Call) -> Tensor | None:
        """Which rows count only where a gradient reaches them; None where none does."""
        standing = self._standing_of(call)
        if standing is None:
            return None
        waiting = standing == Standing.REACHED
        return waiting if bool(waiting.any()) else None

    def _standing_of(self, call: Call) -> Tensor | None:
        """The standing of a call's rows, in their shape; None where all are tokens, or none."""
        ids = ids_of(call.origin, call.trailing)
        standing = None if ids is None else self._standing(ids)
        if standing is None:
            return None
        shape = call.rows
        if call.use.rows is not None:
            standing = standing.expand(len(call.a), *standing.shape[1:])[call.use.rows]
            shape = torch.empty(shape, device="meta")[call.use.rows].shape
        return standing.expand(shape)

    def select(self, call: Call, x: Tensor, name: str, *, trailing: int = 1) -> Tensor:
        """Returns the rows of ``x`` that are tokens, ``[T, features]`` (``[T]`` for indices).

        Args:
            call: whose rows they are.
            x: what the call read or gave, ``[..., features]``.
            name: of the layer, for the error.
            trailing: 1 for vectors, 0 for indices.

        Raises:
            LayerError: it cannot be told which rows are tokens.
        """
        x = x if call.use.rows is None else x[call.use.rows]
        shape, features = x.shape[: x.dim() - trailing], x.shape[x.dim() - trailing :]
        keep = self._kept(call, shape, name)
        return x.reshape(-1, *features) if keep is None else x[keep]

    def count(self, call: Call, name: str) -> int:
        """Returns how many of a call's rows are tokens; arguments and errors as :meth:`select`."""
        shape = call.rows
        if call.use.rows is not None:
            shape = torch.empty(shape, device="meta")[call.use.rows].shape
        keep = self._kept(call, shape, name)
        return shape.numel() if keep is None else int(keep.sum())

    def _kept(self, call: Call, shape: torch.Size, name: str) -> Tensor | None:
        padding = call.use.padding
        keep = self._counting(call, shape, name)
        if padding is not None:  # autograd gives this row of the table no gradient
            looked_up = call.a != padding
            keep = looked_up if keep is None else keep & looked_up
        return keep

    def examples_of(self, call: Call, name: str) -> Tensor:
        """Returns the examples ``[T]`` of the rows that are tokens.

        Args:
            call: whose rows they are.
            name: of the layer, for the error.

        Raises:
            LayerError: they cannot be told.
        """
        assert self.examples is not None
        found = self.examples.of(call.origin, call.trailing)
        if found is None:
            raise LayerError(f"layer {name or '(the model)'}: {NO_EXAMPLE}; exclude the layer")
        examples = self.select(call, found.expand(call.rows), name, trailing=0)
        if bool((examples < 0).any()):
            raise LayerError(f"layer {name or '(the model)'}: {NO_EXAMPLE}; exclude the layer")
        return examples

    def _counting(self, call: Call, shape: torch.Size, name: str) -> Tensor | None:
        if not self.knows(call.origin, call.trailing):
            raise LayerError(
                f"layer {name or '(the model)'}: which of its rows {tuple(shape)} are padding "
                "cannot be told; exclude the layer, or give batches without padding"
            )
        standing = self._standing_of(call)
        if standing is None:
            return None
        counts = standing == Standing.TOKEN
        counts = counts | (standing == Standing.UNTOLD) if self.full else counts
        return counts if call.reached is None else counts | call.reached


def masks_of(batch: Any) -> dict[str, Tensor]:
    """Returns the masks of a prepared batch by the side of the model, as bool.

    Raises:
        BatchError: no position of one is active.
    """
    found: dict[str, Tensor] = {}
    for side, name in _MASKS.items():
        mask = position_mask(batch, name)
        if mask is not None:
            found[side] = mask != 0
            if not bool(found[side].any()):
                raise BatchError(f"{name}: no active token in a batch of {tuple(mask.shape)}")
    return found


def any_token(batch: Any) -> bool:
    """Says whether a prepared batch has an active token (a mask without one has not)."""
    masks = [position_mask(batch, name) for name in _MASKS.values()]
    return all(bool((m != 0).any()) for m in masks if m is not None)


def share_key(call: Call, augmented: bool) -> tuple:
    """Returns what two calls have in common exactly when they read the very same rows."""
    a = call.a
    return (
        a.untyped_storage().data_ptr(),
        a.storage_offset(),
        tuple(a.shape),
        a.stride(),
        a.dtype,
        str(call.use.rows),
        call.use.padding,
        call.use.layout,
        id(call.use.normalise),
        None if call.reached is None else call.reached.cpu().numpy().tobytes(),
        augmented,
    )


def count_tokens(capture: Capture, batch: Any) -> tuple[Layers, dict[str, int]]:
    """Returns the layers of a captured forward pass, and the tokens that each saw.

    Args:
        capture: of the pass.
        batch: the prepared batch.
    """
    masks = TokenMasks(capture, batch)
    layers = capture.observe(masks.knows, masks.examples)
    tokens = BatchTokens(capture, every_layer(layers.layers.values()), masks, 0)
    return layers, {name: tokens.count(layer) for name, layer in layers.layers.items()}


class BatchTokens:
    """Rows of activations and gradients that are tokens, of one backward pass.

    Layers that read the very same tensor share its selected rows.

    Args:
        capture: of the batch's forward pass; with re-entrant checkpoints, after the backward pass.
        layers: those wanted.
        masks: of the batch.
        batch: its index, for the errors.

    Attributes:
        calls: of each layer, those that look at tokens.
    """

    def __init__(
        self, capture: Capture, layers: Iterable[Layer], masks: TokenMasks, batch: int
    ) -> None:
        self.calls = {layer.name: capture.calls_of(layer) for layer in layers}
        self._masks, self._batch, self._settings = masks, batch, capture.settings
        self._bias_of = capture.bias_of
        self._selected: dict[tuple, Tensor] = {}
        self._examples: dict[tuple, ByExample] = {}

    def count(self, layer: Layer) -> int:
        """Returns how many rows a layer has: tokens, or examples (K-FAC-reduce)."""
        examples = self.examples(layer)
        if examples is not None:
            return len(examples)
        return sum(self._masks.count(call, layer.name) for call in self.calls[layer.name])

    def examples(self, layer: Layer) -> ByExample | None:
        """Returns the examples that a layer's tokens belong to; None where each has its own row.

        Raises:
            LayerError: they cannot be told.
        """
        if sharing_of(self._settings, layer) == "expand":
            return None
        return self._by_example(layer)

    def sequences(self, layer: Layer) -> ByExample | None:
        """Returns the sequences that a layer's rows belong to; None where they are not wanted.

        Raises:
            LayerError: they cannot be told.
        """
        return self._by_example(layer) if wants_sequences(self._settings, layer.kind) else None

    def _by_example(self, layer: Layer) -> ByExample | None:
        calls = self.calls[layer.name]
        if not calls:
            return None
        key = tuple(share_key(call, False) for call in calls)
        if key not in self._examples:
            parts = [self._masks.examples_of(call, layer.name) for call in calls]
            self._examples[key] = joined(parts)
        return self._examples[key]

    def places(self, layer: Layer, rows: Tensor) -> Tensor:
        """Returns which row of a layer's inputs belongs to each of some rows of its output.

        Args:
            layer: with one call.
            rows: ``[M]``, numbers of rows of what the call gave, which are tokens.

        Raises:
            LayerError: one of them is no token.
        """
        (call,) = self.calls[layer.name]
        numbers = torch.arange(call.rows.numel(), device=rows.device)
        tokens = self._masks.select(call, numbers.reshape(call.rows), layer.name, trailing=0)
        table = torch.full_like(numbers, -1)
        table[tokens] = torch.arange(len(tokens), device=rows.device)
        found = table[rows]
        if bool((found < 0).any()):
            raise LayerError(f"layer {layer.name}: labels at rows that are no tokens of its input")
        examples = self.examples(layer)
        return found if examples is None else examples.index[found]

    def gradients(self, layer: Layer, given: Mapping[int, Tensor | None]) -> Tensor | None:
        """Returns a layer's token gradients, ``[T, out]``; None where none reached it.

        Args:
            layer: the layer.
            given: index of a call -> the gradient of its output.

        Raises:
            LayerError: it cannot be told which rows are tokens.
        """
        calls = self.calls[layer.name]
        grads = [given.get(call.index) for call in calls]
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None
        parts = []
        for call, g in zip(calls, grads, strict=True):
            g = like.new_zeros(call.output) if g is None else g
            g = g if call.use.layout is None else call.use.layout.outputs(g)
            g = self._masks.select(call, g, layer.name)
            parts.append(g if call.use.gives is None else call.use.gives(g))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def inputs(self, layer: Layer) -> Tensor:
        """Returns a layer's token inputs, ``[T, width]`` (``[T]`` indices for an embedding).

        What a scale multiplies is normalised already; a convolution reads patches. Biases that only
        some of the rows have are columns of ones and zeros.

        Raises:
            LayerError: it cannot be told which rows are tokens.
            NonFiniteError: they are not finite.
        """
        parts = []
        for call in self.calls[layer.name]:
            x = self._rows(call, layer)
            if not layer.kind.looks_up:
                check_finite(x, layer.name, self._batch, "activations")
            x = x if call.use.normalise is None else call.use.normalise(x)
            if layer.marked:
                own = [float(name == self._bias_of(call.use)) for name in layer.marked]
                x = torch.cat([x, x.new_tensor(own).expand(len(x), -1)], dim=1)
            parts.append(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, call: Call, layer: Layer) -> Tensor:
        if call.use.layout is not None:  # patches take more room than what they are cut out of
            return self._masks.select(call, call.inputs(), layer.name)
        key = share_key(call, False)
        if key not in self._selected:
            trailing = int(not layer.kind.looks_up)
            rows = self._masks.select(call, call.a, layer.name, trailing=trailing)
            self._selected[key] = rows
        return self._selected[key]


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
        if layer.kind.looks_up:
            continue
        for call in capture.calls_of(layer):
            x = masks.select(call, call.inputs(), layer.name)
            check_finite(x, layer.name, batch, "activations")
    # What no layer reads: the logits, not finite by the weights of the layer that made them.
    if loss.scored is not None:
        logits = loss.logits
        edge = None if logits is None else edge_of(logits)
        calls = [(layer.name, call) for layer in layers for call in capture.calls_of(layer)]
        same = [name for name, call in calls if edge is not None and call.edge == edge]
        head = same[0] if same else "of the logits"
        check_finite(loss.scored.logits.detach(), head, batch, "outputs")

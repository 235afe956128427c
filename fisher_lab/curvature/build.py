"""From captured batches to factors: what is summed, divided and shared.

A :class:`FactorBuilder` takes one captured batch after the other and ends in a dictionary of
:class:`LayerFactors`. It changes nothing outside itself, so that a failed refresh leaves the
engine as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .accumulate import (
    CountAccumulator,
    GradientAccumulator,
    MomentAccumulator,
    NormAccumulator,
    Where,
    as_they_are,
    normalised,
)
from .capture import Call, Capture, TokenMasks, any_token, is_token_call, share_key
from .errors import BatchError, LayerError
from .factors import (
    DenseFactor,
    DiagonalFactor,
    DiagonalLowRankFactor,
    Factor,
    GramFactor,
)
from .fisher import Draw, draws, n_draws, resolve, scored_of
from .join import Spread, join, rank_seed
from .layers import Kind, Layer, Layers, every_module
from .linalg import full_precision
from .losses import SummedLoss, device_of, token_losses, unwrap
from .reduce import Alone, Communicator
from .retreat import HOST, on_host_if_full
from .settings import KFACSettings
from .storage import store_columns


@dataclass
class LayerFactors(Mapping[str, Any]):
    """The factors of one layer, with what they were made from.

    Also a mapping: ``G_type`` (``"woodbury"``, ``"eig"``, ``"true_head"`` or ``"norm"``),
    ``A_bias_augmented``, ``tokens``, ``n_labels``, ``A``, ``G``, ``columns``, ``reduction``,
    ``discarded``, ``storage_error``.

    Attributes:
        layer: the layer.
        A: input factor, or None for a norm layer (one block over scale and shift).
        G: output factor.
        method: structure of the G side.
        tokens: ``T``.
        n_labels: ``N``.
        n_draws: draws of Monte-Carlo labels.
        fisher: kind of Fisher matrix that this layer got.
        a: token inputs ``[T, in]`` for push-through and EKFAC, where they are kept.
        own: the factors' own mean gradient ``[out, in (+ 1)]``, where it was asked for.
        push: whether push-through holds for these factors.
        tokens_g: token gradients ``[T n, out]``, where EKFAC needs them.
        exact: the same G with unrounded columns, until the storage error is known.
        storage_error: relative error of ``G^-1 dW`` that rounding the columns costs.
        spread: the other ranks' ``a`` and ``tokens_g``, where these are this rank's own only.
        order: ``[T n]`` which row of ``a`` each row of ``tokens_g`` belongs to.
    """

    layer: Layer
    A: Factor | None
    G: Factor
    method: str
    tokens: int
    n_labels: int
    n_draws: int = 1
    fisher: str = "empirical"
    a: Tensor | None = field(default=None, repr=False)
    own: Tensor | None = field(default=None, repr=False)
    push: bool = False
    tokens_g: Tensor | None = field(default=None, repr=False)
    storage_error: float | None = None
    exact: GramFactor | None = field(default=None, repr=False)
    spread: Spread | None = field(default=None, repr=False)
    order: Tensor | None = field(default=None, repr=False)

    _KEYS = (
        "G_type", "A_bias_augmented", "tokens", "n_labels", "A", "G", "columns", "reduction",
        "discarded", "storage_error",
    )  # fmt: skip

    def __getitem__(self, key: str) -> Any:
        match key:
            case "G_type":
                return self.method
            case "A_bias_augmented":
                return self.layer.augmented
            case "tokens" | "n_labels" | "A" | "G" | "storage_error":
                return getattr(self, key)
            case "columns":
                return getattr(self.G, "n_columns", 0)
            case "reduction" | "discarded":
                return getattr(self.G, key, "" if key == "reduction" else 0.0)
            case _:
                raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._KEYS)

    def __len__(self) -> int:
        return len(self._KEYS)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def ratio(self) -> float:
        """``T / N``, by which products, traces and log-determinants are multiplied."""
        return self.tokens / self.n_labels

    def gathered(self, key: str) -> Tensor | None:
        """Returns ``a``, ``own``, ``tokens_g`` or ``order`` of all ranks; collective.

        Args:
            key: which of them.
        """
        value: Tensor | None = getattr(self, key)
        if value is None or self.spread is None or key == "own":
            return value
        if key == "a":
            return self.spread.gather(value)
        communicator = self.spread.communicator
        if key == "order":
            value = value + sum(self.spread.rows[: communicator.rank])
        return communicator.all_gather(value, communicator.share(len(value)))

    def stored(self) -> tuple[str, str]:
        """Returns dtype and device of what the G side is kept as: columns, else its matrix."""
        tensors = self.G.tensors()
        kept = tensors.get("columns", next(iter(tensors.values())))
        return str(kept.dtype).removeprefix("torch."), kept.device.type

    def nbytes(self) -> int:
        """Returns the bytes that both factors take."""
        return self.G.nbytes() + (0 if self.A is None else self.A.nbytes())


@dataclass(frozen=True)
class Built:
    """What a refresh ends in.

    Attributes:
        factors: by layer name.
        skipped: layer name -> why it has no factors this time.
        gradients: own mean gradients of uncovered parameters, where they were asked for.
        diagonal: diagonal Fisher of uncovered parameters, where it was asked for.
        n_labels: ``N``.
        called: names of the layers that were called.
        fisher: kind that the inner layers got.
        rank_counts: tokens and labels of each rank.
    """

    factors: dict[str, LayerFactors]
    skipped: dict[str, str]
    gradients: dict[str, Tensor]
    diagonal: dict[str, Tensor]
    n_labels: int
    called: frozenset[str]
    fisher: str
    rank_counts: tuple[dict[str, int], ...]


@dataclass
class _Side:
    """What is being summed for one layer."""

    layer: Layer
    g: GradientAccumulator | NormAccumulator
    group: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    own: Tensor | None = None
    tokens: int = 0
    last_g: list[Tensor] = field(default_factory=list)
    order: list[Tensor] = field(default_factory=list)
    spread: Spread | None = None


class FactorBuilder:
    """Sums captured batches into factors.

    Args:
        model: the model.
        layers: its K-FAC layers.
        settings: all choices.
        keep_gradient: also form the factors' own mean gradient.
        communicator: of the ranks that join their tokens; None for this process alone.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        settings: KFACSettings,
        *,
        keep_gradient: bool,
        communicator: Communicator | None = None,
    ) -> None:
        self.communicator = communicator or Alone()
        self.layers, self.settings, self.keep_gradient = layers, settings, keep_gradient
        self.device = device_of(model)
        self.model = unwrap(model)
        self.n_labels = 0
        self.n_batches = 0
        self.skipped: dict[str, str] = {}
        self.called: set[str] = set()
        self.sides: dict[str, _Side] = {}
        self.inputs: dict[int, MomentAccumulator | CountAccumulator] = {}
        self.fisher_kind = settings.fisher.kind
        self.head_name: str | None = None
        self.head: dict[str, Any] = {}
        self.seed = rank_seed(settings.fisher.seed, self.communicator.rank)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.uncovered = self._uncovered_parameters()
        self.gradients: dict[str, Tensor] = {}
        self.diagonal: dict[str, Tensor] = {}

    def _uncovered_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters whose gradients do not come from the layers' tokens."""
        covered = set()
        for layer in self.layers.layers.values():
            # A tied weight's own gradient comes from both uses: autograd adds them up.
            if layer.name not in self.layers.candidates and not layer.tied:
                covered |= {layer.weight, layer.bias}
        named = dict(self.model.named_parameters())
        return {n: p for n, p in named.items() if n not in covered and p.requires_grad}

    # ---- one batch ---------------------------------------------------------------------------

    def add(self, capture: Capture, batch: Any, loss: SummedLoss) -> None:
        """Adds one captured batch.

        Args:
            capture: of the batch's forward pass.
            batch: the prepared batch.
            loss: its token-summed loss.

        Raises:
            BatchError: the loss is not finite, or no token is active.
            NonFiniteError: activations or gradients are not finite.
        """
        if not bool(torch.isfinite(loss.loss.detach())):
            self._find_non_finite(capture, batch, loss)
            raise BatchError(
                f"batch {self.n_batches}: its loss is {float(loss.loss.detach())}, not finite"
            )
        self._calls = capture.calls
        if self.communicator.size > 1 and not any_token(self.model, batch):
            capture.gradients(loss.loss)  # other ranks may need it; nothing of it counts
            self.n_batches += 1
            return
        masks = TokenMasks.of(self.model, batch)
        if loss.scored is not None:
            self.fisher_kind = resolve(self.settings.fisher, loss.scored.logits.shape[1])
        want_own = self.keep_gradient and self.fisher_kind != "empirical"
        first, live = True, {}
        for draw in draws(loss, self.settings.fisher, self.generator):
            keep = not draw.last or want_own or self._wants_diagonal()
            grads, others = self._backward(capture, draw, keep, own=draw.grad_output is None)
            if first:  # a re-entrant checkpoint's calls are there only now
                live = self._live_calls(capture, masks)
                self._find_head(loss)
            self._add_draw(live, grads, masks, first=first, own=draw.grad_output is None)
            self._add_uncovered(others)
            first = False
        if want_own:
            last = Draw(loss.loss, None, not self._wants_diagonal())
            grads, others = self._backward(capture, last, not last.last, own=True)
            self._add_own(live, grads, masks)
            self._add_uncovered(others)
        if self._wants_diagonal():
            self._add_diagonal(loss, capture)
        self._add_head(loss)
        self.n_labels += loss.n_labels
        self.n_batches += 1

    def _backward(self, capture: Capture, draw: Draw, keep: bool, *, own: bool) -> Any:
        wanted = list(self.uncovered.values()) if own and self.keep_gradient else []
        return capture.gradients(
            draw.output, draw.grad_output, retain_graph=keep, parameters=wanted
        )

    def _live_calls(self, capture: Capture, masks: TokenMasks) -> dict[str, list[Call]]:
        """The calls of each layer that look at tokens."""
        live: dict[str, list[Call]] = {}
        for layer, _ in every_module(self.layers.layers.values()):
            calls = capture.calls[layer.name]
            if calls:
                self.called.add(layer.name)
            confirmed = layer.name not in self.layers.candidates
            live[layer.name] = [c for c in calls if is_token_call(layer, c, masks, confirmed)]
            if calls and not live[layer.name]:
                self.skipped[layer.name] = "not a look-up of tokens"
        return live

    def everyone(self) -> list[Layer]:
        """Returns all layers, tied partners too, in the model's order."""
        seen: dict[str, Layer] = {}
        for layer, _ in every_module(self.layers.layers.values()):
            seen[layer.name] = layer
        return list(seen.values())

    def _add_draw(
        self,
        live: dict[str, list[Call]],
        grads: dict[str, list[Tensor | None]],
        masks: TokenMasks,
        *,
        first: bool,
        own: bool,
    ) -> None:
        shared: dict[tuple, Tensor] = {}
        taking_part: list[tuple[Layer, list[Call]]] = []
        for layer in self.everyone():
            calls = live[layer.name]
            of_calls = self._grads_of(layer, calls, grads)
            if not any(g is not None for g in of_calls):
                continue
            side = self.side_of(layer)
            g = self._tokens_g(layer, calls, of_calls, masks)
            Where(layer.name, self.n_batches, "gradients").check(g)
            a = self._tokens_a(layer, calls, masks, shared)
            if first:
                side.tokens += a.shape[0]
                taking_part.append((layer, calls))
            self._add_g(side, a, g, first)
            if own and self.keep_gradient:
                self._own(side, a, g)
        if first:
            self._add_inputs(taking_part, masks, shared)

    def _grads_of(
        self, layer: Layer, calls: list[Call], grads: dict[str, list[Tensor | None]]
    ) -> list[Tensor | None]:
        """The gradients of those calls that look at tokens."""
        pairs = zip(self._calls[layer.name], grads[layer.name], strict=True)
        every = {id(call): g for call, g in pairs}
        return [every[id(call)] for call in calls]

    def _tokens_g(
        self, layer: Layer, calls: list[Call], grads: list[Tensor | None], masks: TokenMasks
    ) -> Tensor:
        parts = []
        for call, g in zip(calls, grads, strict=True):
            if g is None:
                like = next(x for x in grads if x is not None)
                g = like.new_zeros(call.output)
            parts.append(masks.select(g, call.origin, layer.name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tokens_a(
        self, layer: Layer, calls: list[Call], masks: TokenMasks, shared: dict[tuple, Tensor]
    ) -> Tensor:
        trailing = 0 if layer.kind is Kind.EMBEDDING else 1
        parts = []
        for call in calls:
            key = share_key(call, False)
            if key not in shared:
                x = masks.select(call.a, call.origin, layer.name, trailing=trailing)
                if trailing:
                    Where(layer.name, self.n_batches, "activations").check(x)
                shared[key] = x
            parts.append(shared[key])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ---- sums --------------------------------------------------------------------------------

    def side_of(self, layer: Layer) -> _Side:
        """Returns what is being summed for a layer; begins it where nothing is there yet."""
        if layer.name not in self.sides:
            s = self.settings
            if layer.kind is Kind.NORM:
                width = layer.n_out * (1 if layer.bias is None else 2)
                dense = layer.n_out <= s.coverage.norm_max_dim
                g: Any = NormAccumulator(width, dense, s.numerics.core_dtype, self.device)
            else:
                g = GradientAccumulator(
                    layer.name, layer.n_out, s.policy, s.numerics, s.storage, self.seed
                )
            self.sides[layer.name] = _Side(layer, g)
        return self.sides[layer.name]

    def _add_g(self, side: _Side, a: Tensor, g: Tensor, first: bool) -> None:
        if isinstance(side.g, NormAccumulator):
            side.g.add(self._norm_tokens(side.layer, a, g))
            return
        if side.layer.name == self.head_name:
            return
        side.g.add(g)
        if self.settings.ekfac:
            # Draws of one batch have the same inputs; batches may differ in their draws.
            start = sum(len(x) for x in side.inputs[: None if first else -1])
            side.order.append(torch.arange(start, start + len(g), device=g.device))
            side.last_g.append(g)
        if self.settings.ekfac or side.g.tokens_in_order():
            side.inputs += [a] if first else []
        else:
            side.inputs.clear()

    def _norm_tokens(self, layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        """Per-token gradients ``[g * xhat; g]`` of scale and shift, ``[T, n]`` or ``[T, 2n]``."""
        dtype = self.settings.numerics.core_dtype
        xhat, g = normalised(layer.modules[0], x).to(dtype), g.to(dtype)
        return g * xhat if layer.bias is None else torch.cat([g * xhat, g], dim=1)

    def _own(self, side: _Side, a: Tensor, g: Tensor) -> None:
        """Adds ``sum_t g_t a_t^T`` (with the bias column) in the core dtype."""
        dtype = self.settings.numerics.core_dtype
        layer = side.layer
        if layer.tied:
            return
        if layer.kind is Kind.NORM:
            part = self._norm_tokens(layer, a, g).sum(dim=0)[:, None]
        elif layer.kind is Kind.EMBEDDING:
            part = torch.zeros(layer.n_in, layer.n_out, dtype=dtype, device=g.device)
            part = part.index_add_(0, a, g.to(dtype)).T
        else:
            with full_precision():
                part = g.to(dtype).T @ a.to(dtype)
            if layer.augmented:
                part = torch.cat([part, g.sum(dim=0, dtype=dtype)[:, None]], dim=1)
        side.own = part if side.own is None else side.own + part

    def _add_own(self, live: Any, grads: Any, masks: TokenMasks) -> None:
        shared: dict[tuple, Tensor] = {}
        for name, side in self.sides.items():
            of_calls = self._grads_of(side.layer, live[name], grads)
            if any(g is not None for g in of_calls):
                g = self._tokens_g(side.layer, live[name], of_calls, masks)
                self._own(side, self._tokens_a(side.layer, live[name], masks, shared), g)

    def _add_inputs(
        self, taking_part: Sequence[tuple[Layer, list[Call]]], masks: TokenMasks, shared: dict
    ) -> None:
        """Adds to the A sides; layers that read the very same tensors share one sum."""
        here: dict[tuple, list[Layer]] = {}
        for layer, calls in taking_part:
            if layer.kind is Kind.NORM:
                continue
            keys = (layer.kind is Kind.EMBEDDING, layer.n_in)
            keys += tuple(share_key(c, layer.augmented) for c in calls)
            before = self.sides[layer.name].group
            here.setdefault((before, keys), []).append(layer)
        used: set[int] = set()
        for (before, _), layers in here.items():
            group = self._group(before, layers, before in used)
            used.add(group)
            calls = next(c for layer, c in taking_part if layer is layers[0])
            self.inputs[group].add(self._tokens_a(layers[0], calls, masks, shared))

    def _group(self, before: int, layers: list[Layer], taken: bool) -> int:
        """The group of layers that go on together: their old one, a copy of it, or a new one."""
        mates = [n for n, s in self.sides.items() if s.group == before and before >= 0]
        whole = before >= 0 and not taken and set(mates) == {x.name for x in layers}
        if whole:
            return before
        group = max(self.inputs, default=-1) + 1
        self.inputs[group] = (
            deepcopy(self.inputs[before]) if before >= 0 else self.input_of(layers[0])
        )
        for layer in layers:
            self.sides[layer.name].group = group
        return group

    def input_of(self, layer: Layer) -> MomentAccumulator | CountAccumulator:
        """Returns an empty sum for a layer's A side."""
        dtype = self.settings.numerics.core_dtype
        if layer.kind is Kind.EMBEDDING:
            return CountAccumulator(layer.n_in, dtype, self.device)
        side = f"layer {layer.name}: A side"
        return MomentAccumulator(layer.n_in, layer.augmented, dtype, self.device, side)

    # ---- uncovered parameters, head ----------------------------------------------------------

    def _wants_diagonal(self) -> bool:
        return self.settings.coverage.uncovered == "diagonal" and bool(self.uncovered)

    def _add_uncovered(self, others: list[Tensor | None]) -> None:
        for name, grad in zip(self.uncovered, others, strict=False):
            if grad is not None:
                old = self.gradients.get(name)
                grad = grad.to(self.settings.numerics.core_dtype)
                self.gradients[name] = grad if old is None else old + grad

    def _add_diagonal(self, loss: SummedLoss, capture: Capture) -> None:
        """Adds squared gradients of each sequence's token-summed loss."""
        scored = scored_of(loss, "uncovered=diagonal")
        losses = token_losses(scored)
        rows = scored.rows.unique().tolist()
        tied = {layer.weight for layer in self.layers.layers.values() if layer.tied}
        names = [name for name in self.uncovered if name not in tied]
        parameters = capture.live([self.uncovered[name] for name in names])
        for row in rows:
            grads = torch.autograd.grad(
                losses[scored.rows == row].sum(),
                parameters,
                retain_graph=True,
                allow_unused=True,
            )
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    square = grad.to(self.settings.numerics.core_dtype).square()
                    old = self.diagonal.get(name)
                    self.diagonal[name] = square if old is None else old + square

    def _find_head(self, loss: SummedLoss) -> None:
        """Finds the layer whose output *is* the logits, where the true-Fisher head is wanted."""
        fisher = self.settings.fisher
        if not (fisher.true_head or fisher.kind == "true") or self.head_name is not None:
            return
        scored_of(loss, "true")
        # By the graph's edge: an address may have been another tensor's before.
        wanted = None if loss.logits is None else get_gradient_edge(loss.logits)
        for layer in self.layers.layers.values():
            linear = layer.kind in (Kind.LINEAR, Kind.CONV1D)
            if linear and any(c.edge == wanted for c in self._calls[layer.name]):
                self.head_name = layer.name
                return
        raise LayerError(
            "true Fisher head: the output of no covered layer is the logits themselves; allowed: "
            "kfac_true_fisher_head=False, or a model whose head is covered and ends in the logits"
        )

    def _add_head(self, loss: SummedLoss) -> None:
        if self.head_name is None or loss.scored is None or loss.scored.n_labels == 0:
            return
        logits = [loss.scored.logits.detach()]

        def retreat() -> bool:
            logits.append(logits[-1].to(HOST))
            return len(logits) == 2

        what = f"{self._head_label(len(logits[0]))}, probabilities"
        p = on_host_if_full(lambda: logits[-1].softmax(dim=-1), retreat, what)
        parts = self.head.setdefault("parts", [])
        parts.append(p if all(part.device == p.device for part in parts) else p.to(HOST))
        if parts[-1].device != parts[0].device:
            self._head_to_host()

    def _head_label(self, rows: int) -> str:
        classes = next(x.n_out for x in self.everyone() if x.name == self.head_name)
        return f"layer {self.head_name}: G side (out={classes}, columns={rows})"

    def _head_to_host(self) -> bool:
        """Moves the head's probabilities; False where they are there already."""
        if self.head.get("hosted", False):
            return False
        self.head["parts"] = [part.to(HOST) for part in self.head["parts"]]
        self.head["hosted"] = True
        return True

    def _find_non_finite(self, capture: Capture, batch: Any, loss: SummedLoss) -> None:
        """Names the first layer whose input is not finite, else the one whose output is not."""
        masks = TokenMasks.of(self.model, batch)
        for layer in self.everyone():
            if layer.kind is Kind.EMBEDDING:
                continue
            for call in capture.calls[layer.name]:
                x = masks.select(call.a, call.origin, layer.name)
                Where(layer.name, self.n_batches, "activations").check(x)
        # What no layer reads: the logits, not finite by the weights of the layer that made them.
        if loss.scored is not None:
            logits = loss.logits
            traced = logits is not None and logits.requires_grad
            edge = get_gradient_edge(logits) if logits is not None and traced else None
            calls = [(name, call) for name, found in capture.calls.items() for call in found]
            same = [name for name, call in calls if edge is not None and call.edge == edge]
            head = same[0] if same else "of the logits"
            Where(head, self.n_batches, "outputs").check(loss.scored.logits.detach())

    # ---- the end -----------------------------------------------------------------------------

    @full_precision()
    def finish(self) -> Built:
        """Joins the ranks' sums, divides them and returns the factors.

        Raises:
            BatchError: no label counted in any batch, or no batch came.
            LayerError: no layer had a gradient.
            CurvatureError: the ranks do not fit together.
        """
        counts = [self._counts()]
        if self.communicator.size > 1:
            counts = self.communicator.share(self._counts())
            join(self, self.communicator)
        if self.n_batches == 0:
            raise BatchError("batches: none given; allowed: at least one")
        if self.n_labels == 0:
            raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")
        factors: dict[str, LayerFactors] = {}
        made: dict[int, Factor] = {}
        for layer in self.layers.layers.values():
            if layer.name not in self.sides:
                self.skipped.setdefault(layer.name, "no gradient in this batch")
                continue
            factors[layer.name] = self._layer_factors(layer, made)
        if not factors:
            raise LayerError("model: no K-FAC layer has a gradient (frozen, or under no_grad?)")
        scale = 1.0 / self.n_labels
        covered = {n for f in factors.values() for n in (f.layer.weight, f.layer.bias)}
        tokens = max(f.tokens for f in factors.values())
        return Built(
            factors=factors,
            skipped=dict(self.skipped),
            gradients={n: g * scale for n, g in self.gradients.items() if n not in covered},
            diagonal={n: d / tokens for n, d in self.diagonal.items() if n not in covered},
            n_labels=self.n_labels,
            called=frozenset(self.called),
            fisher=self.fisher_kind,
            rank_counts=tuple(counts),
        )

    def _counts(self) -> dict[str, int]:
        tokens = max((side.tokens for side in self.sides.values()), default=0)
        return {"tokens": tokens, "labels": self.n_labels}

    def _layer_factors(self, layer: Layer, made: dict[int, Factor]) -> LayerFactors:
        side = self.sides[layer.name]
        count = n_draws(self.fisher_kind, self.settings.fisher)
        weight = 1.0 / (side.tokens * count)
        own = self._tied_own(layer) if layer.tied else side.own
        own = None if own is None else own / self.n_labels
        common: dict[str, Any] = {
            "layer": layer, "tokens": side.tokens, "n_labels": self.n_labels,
            "n_draws": count, "fisher": self.fisher_kind, "own": own,
        }  # fmt: skip
        if isinstance(side.g, NormAccumulator):
            return LayerFactors(A=None, G=side.g.factor(weight), method="norm", **common)
        if layer.name == self.head_name:
            common["fisher"] = "true"
            head = self._head_factor(side.tokens)
            return LayerFactors(
                A=self._input_factor(side, made), G=head, method="true_head", **common
            )
        g = side.g.factor(weight)
        g.label = side.g.what()
        factors = LayerFactors(
            A=self._input_factor(side, made),
            G=g,
            method="woodbury" if isinstance(g, GramFactor) else "eig",
            **common,
        )
        self._keep_tokens(factors, side, weight)
        return factors if layer.partner is None else self._pooled(factors, layer.partner, made)

    def _tied_own(self, layer: Layer) -> Tensor | None:
        weight = self.gradients.get(layer.weight)
        bias = self.gradients.get(layer.bias) if layer.bias is not None else None
        return None if weight is None else layer.to_matrix(weight, bias, weight.dtype)

    def _keep_tokens(self, factors: LayerFactors, side: _Side, weight: float) -> None:
        accumulator = side.g
        assert isinstance(accumulator, GradientAccumulator)
        in_order = accumulator.tokens_in_order() and isinstance(factors.G, GramFactor)
        if in_order or self.settings.ekfac:
            n, tokens = side.layer.dim_a, side.tokens
            factors.a = _joined(
                side.inputs, f"layer {side.layer.name}: A side (in={n}, tokens={tokens})"
            )
            factors.spread = side.spread
        factors.push = (
            in_order
            and self.fisher_kind == "empirical"
            and not side.layer.tied
            and self.settings.numerics.push_through
        )
        if self.settings.ekfac:
            empty = torch.empty(0, side.layer.n_out, device=self.device)
            factors.tokens_g = _joined(side.last_g, accumulator.what()) if side.last_g else empty
            nowhere = torch.empty(0, dtype=torch.int64, device=self.device)
            factors.order = torch.cat([nowhere, *side.order])
        factors.exact = accumulator.exact_factor(weight)

    def _input_factor(self, side: _Side, made: dict[int, Factor]) -> Factor:
        if side.group not in made:
            made[side.group] = factor = self.inputs[side.group].factor()
            name, n, tokens = side.layer.name, side.layer.dim_a, side.tokens
            factor.label = f"layer {name}: A side (in={n}, tokens={tokens})"
        return made[side.group]

    def head_rows(self, labels: int) -> Tensor | None:
        """Returns which labelled tokens the head's factor is made of; None for all of them."""
        most = self.settings.policy.max_columns
        if labels <= most:
            return None
        generator = torch.Generator().manual_seed(self.settings.fisher.seed)
        return torch.randperm(labels, generator=generator)[:most].sort().values

    def _head_factor(self, tokens: int) -> DiagonalLowRankFactor:
        rows = sum(len(part) for part in self.head["parts"])
        numerics = self.settings.numerics
        share = self.head.get("share", 1.0)
        chosen = self.head_rows(rows)
        if chosen is not None:
            share = rows / len(chosen)

        def some() -> Tensor:
            p = torch.cat(self.head["parts"])
            return p if chosen is None else p[chosen.to(p.device)]

        label = self._head_label(rows)
        p = on_host_if_full(some, self._head_to_host, f"{label}, probabilities")
        weight = share / tokens
        name = self.head_name or ""
        classes = next(x.n_out for x in self.everyone() if x.name == name)
        core = numerics.core_dtype
        stored = store_columns(p, classes, self.settings.storage, core, name, self.device)
        stored = self.head.get("spread", as_they_are)(stored)
        return DiagonalLowRankFactor.of_rows(stored, weight, core, label)

    def _pooled(self, head: LayerFactors, partner: Layer, made: dict[int, Factor]) -> LayerFactors:
        """Both uses of a tied weight: vocabulary side ``G_head + A_emb``, width side the rest."""
        side = self.sides.get(partner.name)
        if side is None:
            return head
        self._pool(head, self._layer_factors(partner, made))
        head.push, head.exact = False, None
        return head

    def _pool(self, head: LayerFactors, embedding: LayerFactors) -> None:
        """Adds the embedding's factors to the head's."""
        counts, width = embedding.A, embedding.G
        assert isinstance(counts, DiagonalFactor)
        assert isinstance(head.A, DenseFactor)
        a, g, n = head.A, head.G, embedding.layer.n_out

        def pooled() -> Tensor:
            total = a.matrix.clone()
            identity = torch.eye(n, dtype=total.dtype, device=total.device)
            total[:n, :n] += width.multiply(identity.to(width.device)).to(total.device)
            return total

        def retreat() -> bool:
            moved = width.to_host()
            return a.to_host() or moved

        head.A = DenseFactor(on_host_if_full(pooled, retreat, f"{a.label}, pooled"))
        head.A.label = a.label
        if isinstance(g, GramFactor):
            head.G = DiagonalLowRankFactor(
                counts.diagonal, g.columns, g.weight, 1, self.settings.numerics.core_dtype
            )
        else:
            assert isinstance(g, DenseFactor)

            def dense() -> Tensor:
                matrix = g.matrix.clone()
                matrix.diagonal().add_(counts.diagonal.to(matrix))
                return matrix

            head.G = DenseFactor(on_host_if_full(dense, g.to_host, f"{g.label}, pooled"))
        head.G.label = g.label


def _joined(parts: list[Tensor], what: str) -> Tensor:
    """Returns the parts one under the other, on the host where the device has no room for that."""

    def retreat() -> bool:
        moved = any(part.device != HOST for part in parts) or not tried
        tried.append(None)
        parts[:] = [part.to(HOST) for part in parts]
        return moved

    tried: list[None] = []
    return on_host_if_full(
        lambda: parts[0] if len(parts) == 1 else torch.cat(parts), retreat, f"{what}, tokens kept"
    )

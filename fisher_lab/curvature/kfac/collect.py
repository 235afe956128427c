"""From captured batches to factors.

A :class:`FactorBuilder` takes one captured batch after the other and ends in a dictionary of
:class:`~.layer_factors.LayerFactors`. It changes nothing outside itself, so that a failed refresh
leaves the engine as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.kfac.accumulators import (
    NormAccumulator,
    Where,
    norm_gradients,
    normalised,
)
from fisher_lab.curvature.kfac.capture import (
    BatchTokens,
    Call,
    Capture,
    TokenMasks,
    any_token,
    find_non_finite,
    share_key,
    token_calls,
)
from fisher_lab.curvature.kfac.draws import Draw, draws, resolve
from fisher_lab.curvature.kfac.layer_factors import Built
from fisher_lab.curvature.kfac.layers import Kind, Layer, Layers
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.reduce import join
from fisher_lab.curvature.kfac.refresh import form
from fisher_lab.curvature.kfac.statistics import Side, Sums
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.losses import (
    IGNORE_INDEX,
    CrossEntropy,
    LossFunction,
    SummedLoss,
    compute_loss,
    labels_of,
    logits_of,
    prepare,
    scorer,
    shift_of,
    sum_of,
)
from fisher_lab.curvature.wrappers import device_of, unwrap


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
        settings: EngineSettings,
        *,
        keep_gradient: bool,
        communicator: Communicator | None = None,
    ) -> None:
        self.communicator = communicator or Alone()
        self.settings, self.keep_gradient = settings, keep_gradient
        self.model = unwrap(model)
        self.sums = Sums(
            self.model,
            layers,
            settings,
            device_of(model),
            keep_gradient=keep_gradient,
            rank=self.communicator.rank,
        )
        self._generator = torch.Generator().manual_seed(self.sums.seed)

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
        sums = self.sums
        if not bool(torch.isfinite(loss.loss.detach())):
            masks = TokenMasks.of(self.model, batch)
            find_non_finite(capture, sums.everyone(), masks, sums.n_batches, loss)
            raise BatchError(
                f"batch {sums.n_batches}: its loss is {float(loss.loss.detach())}, not finite"
            )
        if self.communicator.size > 1 and not any_token(self.model, batch):
            capture.gradients(loss.loss)  # other ranks may need it; nothing of it counts
            sums.n_batches += 1
            return
        masks = TokenMasks.of(self.model, batch)
        if loss.scored is not None:
            sums.fisher_kind = resolve(self.settings, loss.scored.logits.shape[1])
        self._add_draws(capture, masks, loss)
        if sums.uncovered.wants_diagonal:
            sums.uncovered.add_diagonal(loss, capture)
        sums.head.add(loss)
        sums.n_labels += loss.n_labels
        sums.n_batches += 1

    def _add_draws(self, capture: Capture, masks: TokenMasks, loss: SummedLoss) -> None:
        """Adds every draw of a batch, and its own gradient where no draw is that."""
        sums = self.sums
        want_own = self.keep_gradient and sums.fisher_kind != "empirical"
        diagonal = sums.uncovered.wants_diagonal
        first, live = True, {}
        for draw in draws(loss, self.settings, self._generator):
            keep = not draw.last or want_own or diagonal
            own = draw.grad_output is None
            grads, others = self._backward(capture, draw, keep, own=own)
            if first:  # a re-entrant checkpoint's calls are there only now
                live = self._live_calls(capture, masks)
                sums.head.find(loss, capture.calls)
            tokens = BatchTokens(capture, live, masks, sums.n_batches)
            self._add_draw(tokens, grads, first=first, own=own)
            sums.uncovered.add(others)
            first = False
        if want_own:
            last = Draw(loss.loss, None, not diagonal)
            grads, others = self._backward(capture, last, not last.last, own=True)
            self._add_own(BatchTokens(capture, live, masks, sums.n_batches), grads)
            sums.uncovered.add(others)

    def _backward(self, capture: Capture, draw: Draw, keep: bool, *, own: bool) -> Any:
        parameters = self.sums.uncovered.parameters
        wanted = list(parameters.values()) if own and self.keep_gradient else []
        return capture.gradients(
            draw.output, draw.grad_output, retain_graph=keep, parameters=wanted
        )

    def _live_calls(self, capture: Capture, masks: TokenMasks) -> dict[str, list[Call]]:
        """The calls of each layer that look at tokens; notes which layers were called at all."""
        live = token_calls(capture, self.sums.layers, masks)
        for name, calls in live.items():
            if capture.calls[name]:
                self.sums.called.add(name)
                if not calls:
                    self.sums.skipped[name] = "not a look-up of tokens"
        return live

    def _add_draw(
        self,
        tokens: BatchTokens,
        grads: Mapping[str, list[Tensor | None]],
        *,
        first: bool,
        own: bool,
    ) -> None:
        taking_part: list[Layer] = []
        for layer in self.sums.everyone():
            g = tokens.gradients(layer, grads)
            if g is None:
                continue
            side = self.sums.side_of(layer)
            Where(layer.name, self.sums.n_batches, "gradients").check(g)
            a = tokens.inputs(layer)
            if first:
                side.tokens += a.shape[0]
                taking_part.append(layer)
            self._add_g(side, a, g, first)
            if own and self.keep_gradient:
                self._own(side, a, g)
        if first:
            self._add_inputs(taking_part, tokens)

    # ---- the G sides -------------------------------------------------------------------------

    def _add_g(self, side: Side, a: Tensor, g: Tensor, first: bool) -> None:
        if isinstance(side.g, NormAccumulator):
            side.g.add(normalised(side.layer.modules[0], a), g)
            return
        if side.layer.name == self.sums.head.name:
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

    # ---- the own gradient --------------------------------------------------------------------

    def _add_own(self, tokens: BatchTokens, grads: Mapping[str, list[Tensor | None]]) -> None:
        for side in self.sums.sides.values():
            g = tokens.gradients(side.layer, grads)
            if g is not None:
                self._own(side, tokens.inputs(side.layer), g)

    def _own(self, side: Side, a: Tensor, g: Tensor) -> None:
        """Adds ``sum_t g_t a_t^T`` (with the bias column) in the core dtype."""
        dtype = self.settings.numerics.core_dtype
        layer = side.layer
        if layer.tied:
            return
        if layer.kind is Kind.NORM:
            xhat, shift = normalised(layer.modules[0], a), layer.bias is not None
            part = norm_gradients(xhat, g, shift, dtype).sum(dim=0)[:, None]
        elif layer.kind is Kind.EMBEDDING:
            part = torch.zeros(layer.n_in, layer.n_out, dtype=dtype, device=g.device)
            part = part.index_add_(0, a, g.to(dtype)).T
        else:
            with full_precision():
                part = g.to(dtype).T @ a.to(dtype)
            if layer.augmented:
                part = torch.cat([part, g.sum(dim=0, dtype=dtype)[:, None]], dim=1)
        side.own = part if side.own is None else side.own + part

    # ---- the A sides -------------------------------------------------------------------------

    def _add_inputs(self, taking_part: Sequence[Layer], tokens: BatchTokens) -> None:
        """Adds to the A sides; layers that read the very same tensors share one sum."""
        sums = self.sums
        here: dict[tuple, list[Layer]] = {}
        for layer in taking_part:
            if layer.kind is Kind.NORM:
                continue
            keys = (layer.kind is Kind.EMBEDDING, layer.n_in)
            keys += tuple(share_key(c, layer.augmented) for c in tokens.live[layer.name])
            before = sums.sides[layer.name].group
            here.setdefault((before, keys), []).append(layer)
        used: set[int] = set()
        for (before, _), layers in here.items():
            group = self._group(before, layers, before in used)
            used.add(group)
            sums.inputs[group].add(tokens.inputs(layers[0]))

    def _group(self, before: int, layers: list[Layer], taken: bool) -> int:
        """The group of layers that go on together: their old one, a copy of it, or a new one."""
        sums = self.sums
        mates = [n for n, s in sums.sides.items() if s.group == before and before >= 0]
        whole = before >= 0 and not taken and set(mates) == {x.name for x in layers}
        if whole:
            return before
        group = max(sums.inputs, default=-1) + 1
        sums.inputs[group] = (
            deepcopy(sums.inputs[before]) if before >= 0 else sums.input_of(layers[0])
        )
        for layer in layers:
            sums.sides[layer.name].group = group
        return group

    # ---- the end -----------------------------------------------------------------------------

    @full_precision()
    def finish(self) -> Built:
        """Joins the ranks' sums, divides them and returns the factors.

        Raises:
            BatchError: no label counted in any batch, or no batch came.
            LayerError: no layer had a gradient.
            CurvatureError: the ranks do not fit together.
        """
        counts = [self.sums.counts()]
        if self.communicator.size > 1:
            counts = self.communicator.all_gather_objects(self.sums.counts())
            join(self.sums, self.communicator)
        return form(self.sums, counts)


@dataclass(frozen=True)
class GivenLoss:
    """What the caller says of the loss of a refresh.

    Attributes:
        tensor: the loss of a captured forward pass, where the caller ran the model.
        function: computes a loss; None takes the model's own.
        captured: the pass behind ``tensor``.
        n_labels: labels behind a mean loss that the caller reduced.
        reduction: ``mean`` or ``sum``: how the caller reduced it.
    """

    tensor: Tensor | None
    function: LossFunction | None
    captured: Capture | None
    n_labels: int | None
    reduction: str

    @classmethod
    def of(
        cls,
        loss: Tensor | LossFunction | None,
        captured: Capture | None,
        n_labels: int | None,
        reduction: str,
    ) -> GivenLoss:
        """Tells a tensor from a function.

        Args:
            loss: one of them, or None.
            captured: a forward pass that was captured before, if there is one.
            n_labels: see above.
            reduction: see above.

        Raises:
            LossError: a tensor without a captured pass.
        """
        if not isinstance(loss, Tensor):
            return cls(None, loss, None, n_labels, reduction)
        if captured is None:
            raise LossError(
                "loss: a tensor was given but no forward pass was captured; run it inside "
                "'with kfac.capture(model):', or give a loss function"
            )
        return cls(loss, None, captured, n_labels, reduction)


def add_batches(
    builder: FactorBuilder,
    model: nn.Module,
    batches: Iterable[Any],
    given: GivenLoss,
    shown: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Adds every batch of a refresh to a builder, by this rank alone.

    Args:
        builder: of the refresh.
        model: the model, in its wrappers or without.
        batches: the batches; one where the caller ran the model.
        given: what the caller says of the loss.
        shown: yields the batches and shows how far it is.

    Raises:
        LossError: a loss tensor for several batches, or for several forward passes.
        CurvatureError: see the subclasses.
    """
    ran = given.tensor is not None
    if not ran and builder.communicator.size == 1 and given.n_labels is None:
        _check_labels(model, batches, given.function)
    for index, batch in enumerate(shown(batches)):
        prepared = prepare(model, batch)
        if not ran:
            _add(builder, prepared, given)
            continue
        if index > 0:
            raise LossError("loss: one tensor for several batches; allowed: one batch")
        assert given.captured is not None
        summed = _summed(model, given, batch)
        summed = _with_logits(summed, model, given.captured, prepared)
        builder.add(given.captured, prepared, summed)


def _add(builder: FactorBuilder, batch: Any, given: GivenLoss) -> None:
    """Runs the model on a prepared batch and adds what was captured."""
    inner = builder.model
    if builder.communicator.size == 1:
        TokenMasks.of(inner, batch)  # refused before a pass is spent on it
    recording = Capture(inner, builder.sums.layers)
    with torch.enable_grad(), uncompiled(inner), recording:
        summed = compute_loss(
            inner, batch, given.function, n_labels=given.n_labels, reduction=given.reduction
        )
    try:
        builder.add(recording, batch, summed)
    finally:
        recording.close()


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled blocks run as they were written, so that hooks on what is inside them are called.

    Args:
        model: whose forward pass is about to run.
    """
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    # Only then: the import of the compiler takes two seconds.
    if compiled and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _check_labels(model: nn.Module, batches: Iterable[Any], function: LossFunction | None) -> None:
    """Refuses batches of which the labels alone say that none counts, before a pass.

    Raises:
        BatchError: no label of any batch counts, or one has no active token.
    """
    if not isinstance(batches, list | tuple) or not batches:
        return  # an iterator can be read once only
    if isinstance(function, CrossEntropy):
        shift: bool | None = function.shift
    else:
        shift = shift_of(model) if function is None else None
    if shift is None:
        return
    for batch in batches:
        batch = prepare(model, batch)
        TokenMasks.of(unwrap(model), batch)
        labels = labels_of(batch)
        if labels is None or labels.dim() not in (1, 2):
            return
        labels = labels[:, 1:] if shift and labels.dim() == 2 else labels
        if bool((labels != IGNORE_INDEX).any()):
            return
    raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")


def _summed(model: nn.Module, given: GivenLoss, batch: Any) -> SummedLoss:
    """The token-summed loss behind a tensor that the caller computed from the batch's labels."""
    loss, captured = given.tensor, given.captured
    assert loss is not None
    assert captured is not None
    if len(captured.outputs) != 1:
        raise LossError(
            f"capture: {len(captured.outputs)} forward passes of the model in the 'with' block; "
            "allowed: one (of a compiled model, run the uncompiled one: model._orig_mod)"
        )
    return sum_of(
        loss,
        batch,
        n_labels=given.n_labels,
        reduction=given.reduction,
        touch=loss,
        shift=bool(shift_of(model)),
    )


def _with_logits(summed: SummedLoss, model: nn.Module, captured: Capture, batch: Any) -> SummedLoss:
    """Adds the logits of the captured pass, where the model's labelling is known."""
    if shift_of(model) is None or labels_of(batch) is None:
        return summed
    output = captured.outputs[0]
    return replace(summed, scored=scorer(model).score(output, batch), logits=logits_of(output))

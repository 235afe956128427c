"""From batches to the statistics of a refresh, on this rank.

Every batch is captured (:mod:`.capture`) and its token inputs and token gradients are added to the
:class:`~.statistics.Statistics` of their layers. Nothing outside them changes, so that a refresh
that fails leaves the engine as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Communicator, Progress, together
from fisher_lab.curvature.errors import BatchError, LayerError, LossError
from fisher_lab.curvature.evaluation_mode import buffers_kept
from fisher_lab.curvature.kfac.accumulators import BlockAccumulator, check_finite
from fisher_lab.curvature.kfac.batch_tokens import (
    BatchTokens,
    TokenMasks,
    any_token,
    find_non_finite,
    masks_of,
    share_key,
)
from fisher_lab.curvature.kfac.capture import Call, Capture
from fisher_lab.curvature.kfac.examples import by_example, lie_along_the_second
from fisher_lab.curvature.kfac.fisher_kinds import BackwardPass, backward_passes, kind_in_use
from fisher_lab.curvature.kfac.layers import Layer, every_layer
from fisher_lab.curvature.kfac.statistics import LayerSums, Statistics
from fisher_lab.curvature.labelling import Labelling, is_certain
from fisher_lab.curvature.labels import segments_of
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.losses import (
    CrossEntropy,
    LossFunction,
    SummedLoss,
    compute_loss,
    count_labels,
    labels_of,
    logits_of,
    prepare,
    shift_of,
    sum_of,
    understood,
)
from fisher_lab.curvature.measurement import tensor_shifts
from fisher_lab.curvature.preparation import agreed
from fisher_lab.curvature.wrappers import uncompiled, unwrap


def collect(
    sums: Statistics,
    model: nn.Module,
    batch: Any,
    loss: Tensor | LossFunction | None,
    captured: Capture | None,
    communicator: Communicator,
    progress: Progress,
    *,
    n_labels: int | None = None,
    reduction: str = "mean",
) -> None:
    """Adds every batch of a refresh to its statistics; an error of one rank is raised on all.

    Args:
        sums: the statistics, still empty.
        model: the model, in its wrappers or without.
        batch: one batch, or an iterable of them.
        loss: of a captured forward pass, or what computes it; None takes the model's own.
        captured: the pass behind a loss tensor.
        communicator: of the ranks that collect together.
        progress: shows how far it is.
        n_labels: labels behind a mean loss that the caller reduced.
        reduction: ``mean`` or ``sum``: how the caller reduced it.

    Raises:
        LossError: a loss tensor for several batches, or for several forward passes.
        CurvatureError: see the subclasses.
    """
    collector = _Collector(unwrap(model), sums, communicator.size)
    batches, total = _batches(batch)
    loss = understood(loss)

    batches = agreed(model, batches, communicator, loss)

    def add_all() -> None:
        if not isinstance(loss, Tensor) and communicator.size == 1 and n_labels is None:
            _check_labels(model, batches, loss)
        for index, one in enumerate(progress(batches, "K-FAC factors", total)):
            prepared = prepare(model, one, loss, measure=communicator.size == 1)
            before, given = sums.n_labels, count_labels(one)
            if not isinstance(loss, Tensor):
                collector.run(prepared, loss, n_labels, reduction)
            elif index > 0:
                raise LossError("loss: one tensor for several batches; allowed: one batch")
            else:
                assert captured is not None
                summed = _captured_loss(model, loss, captured, one, prepared, n_labels, reduction)
                collector.add(captured, prepared, summed)
            counted = sums.n_labels - before
            sums.labels_given += counted if given is None else given
        if sums.verify:
            compare_gradients(sums.own_gradients(), sums.by_autograd, sums.rounding)

    together(communicator, add_all)


def _batches(batch: Any) -> tuple[Iterable[Any], int | None]:
    """One batch or an iterable of batches -> an iterable, and its length where it is known."""
    if isinstance(batch, Tensor | Mapping):
        return [batch], 1
    if isinstance(batch, list | tuple):
        if batch and all(isinstance(x, Tensor) for x in batch):
            return [tuple(batch)], 1
        return batch, len(batch)
    return batch, None


VERIFY_ROUNDINGS = {False: (1e4, 100), True: (16, 1)}
"""Whether the numbers have 16 bits -> roundings of a parameter's gradient, and of that of the whole
model, by which the gradient of a parameter's tokens may be off autograd's."""


def compare_gradients(
    own: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float = 0.0
) -> None:
    """Compares the gradients that the layers' tokens give with autograd's of the same loss.

    Both are sums over the same tokens, so they differ by rounding only; where they do not, the
    model uses a parameter in a way that its captured tokens do not show, or lets padding into its
    loss, and its factors would be wrong.

    Args:
        own: by parameter; what is missing counts as zero.
        expected: autograd's, by parameter, in the parameter's dtype.
        rounding: machine epsilon of the tokens, where it may be larger (autocast).

    Raises:
        LayerError: they differ; names the layers' parameters and by how much.
    """
    size = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    wrong = {}
    for name, gradient in expected.items():
        difference, eps = gradient.double(), max(rounding, torch.finfo(gradient.dtype).eps)
        relative, absolute = VERIFY_ROUNDINGS[eps > 1e-4]
        difference = difference - own[name].double() if name in own else difference
        error, norm = float(difference.norm()), float(gradient.double().norm())
        if error > eps * (relative * norm + absolute * size):
            wrong[name] = error / norm if norm else float("inf")
    if wrong:
        worst = sorted(wrong, key=lambda name: -wrong[name])[:5]
        listed = ", ".join(
            f"{name} (off by {f'{wrong[name]:.1%}' if wrong[name] < 10 else 'more than 1000%'})"
            for name in worst
        )
        more = f" and {len(wrong) - len(worst)} more" if len(wrong) > len(worst) else ""
        raise LayerError(
            f"verify: the gradient of the captured tokens is not autograd's for {listed}{more}; "
            "exclude these layers, or give batches whose padding does not reach the loss"
        )


def add_own_pass(
    sums: Statistics,
    model: nn.Module,
    capture: Capture,
    batch: Any,
    loss: SummedLoss,
    grads: Mapping[int, Tensor],
    n_ranks: int,
) -> None:
    """Adds a batch whose backward pass the caller has made; ``fisher=empirical`` alone.

    Args:
        sums: the statistics of the refresh.
        model: the model, in its wrappers or without.
        capture: of the forward pass.
        batch: the prepared batch.
        loss: the token-summed loss of the pass, with or without a graph.
        grads: index of a call -> the gradient of its output, of that loss.
        n_ranks: number of ranks that collect together.

    Raises:
        CurvatureError: see the subclasses.
    """
    capture.check_unchanged()
    before, given = sums.n_labels, count_labels(batch)
    _Collector(unwrap(model), sums, n_ranks).add(capture, batch, loss, grads)
    sums.labels_given += sums.n_labels - before if given is None else given


class _Collector:
    """Adds captured batches to the statistics of a model without its wrappers."""

    def __init__(self, model: nn.Module, sums: Statistics, n_ranks: int) -> None:
        self.model, self.sums, self.settings, self.n_ranks = model, sums, sums.settings, n_ranks
        self._generator = torch.Generator().manual_seed(sums.seed)

    def run(
        self, batch: Any, function: LossFunction | None, n_labels: int | None, reduction: str
    ) -> None:
        """Runs the model on a prepared batch and adds what was captured."""
        if self.n_ranks == 1:
            masks_of(batch)  # refused before a pass is spent on it
        recording = Capture(self.model, self.sums.promised, self.settings)
        with buffers_kept(self.model):
            with torch.enable_grad(), uncompiled(self.model), recording:
                summed = compute_loss(
                    self.model, batch, function, n_labels=n_labels, reduction=reduction
                )
            self._add(recording, batch, summed)

    def add(
        self,
        capture: Capture,
        batch: Any,
        loss: SummedLoss,
        grads: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Adds one captured, prepared batch; what its pass left in the buffers is the caller's."""
        with buffers_kept(self.model):  # a re-entrant checkpoint runs parts of the pass once more
            self._add(capture, batch, loss, grads)

    def _add(
        self,
        capture: Capture,
        batch: Any,
        loss: SummedLoss,
        own: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Adds a batch; ``own`` are the gradients of a backward pass that has been made already."""
        sums = self.sums
        if not bool(torch.isfinite(loss.loss.detach())):
            masks = TokenMasks(capture, batch)
            layers = every_layer(capture.observe(masks.knows, masks.examples).layers.values())
            find_non_finite(capture, layers, masks, sums.n_batches, loss)
            raise BatchError(
                f"batch {sums.n_batches}: its loss is {float(loss.loss.detach())}, not finite"
            )
        if self.n_ranks > 1 and not any_token(batch):
            if own is None:
                capture.gradients(loss.loss)  # other ranks may need it; nothing of it counts
            sums.n_batches += 1
            return
        masks = TokenMasks(capture, batch)
        if own is None:
            self._check_dimensions(capture, loss)
        given, loss = loss, by_example(loss, capture.rows, capture.examples)
        sums.take(capture.observe(masks.knows, masks.examples, loss.loss))
        if loss.scored is not None:
            sums.fisher_kind = kind_in_use(self.settings, loss.scored.logits.shape[1])
        tokens = self._add_passes(capture, masks, loss, own)
        if sums.uncovered.wants_diagonal:
            segments = segments_of(batch)
            known = partial(capture.examples, segments=segments)
            apart = loss if segments is None else by_example(loss, capture.rows, known, dims=3)
            sums.uncovered.add_diagonal(apart, capture)
        sums.head.add(loss)
        if self.settings.ekfac and tokens is not None:
            self._keep_head(tokens, given)
        sums.n_labels += loss.n_labels
        sums.labelling = loss.labelling
        sums.n_batches += 1

    def _check_dimensions(self, capture: Capture, loss: SummedLoss) -> None:
        """Refuses a first batch whose examples lie along the second dimension, where it matters.

        Raises:
            BatchError: they do.
        """
        sums, settings = self.sums, self.settings
        classes = None if loss.scored is None else loss.scored.logits.shape[1]
        matters = {
            "sharing=reduce": settings.sharing == "reduce",
            "fisher=true": kind_in_use(settings, classes) == "true",
            "uncovered=diagonal": settings.uncovered == "diagonal",
        }
        what = [name for name, does in matters.items() if does]
        if not what or sums.n_batches > 0 or capture.replays:
            return
        places = capture.examples(), capture.examples(axis=1)
        if lie_along_the_second(loss, places, capture.reached):
            raise BatchError(
                f"batch: its examples lie along the second dimension (the loss at one index of the "
                f"first reaches others); allowed with {', '.join(what)}: examples first, in inputs "
                "and labels"
            )

    def _keep_head(self, tokens: BatchTokens, loss: SummedLoss) -> None:
        """Keeps what EKFAC needs of the labelled tokens of a true-Fisher head."""
        sums = self.sums
        expected = sums.head.expected(loss)
        if sums.head.name is None or expected is None:
            return
        assert loss.scored is not None
        assert loss.logits is not None
        layer_sums = sums.by_layer[sums.head.name]
        (call,) = tokens.calls[sums.head.name]
        each = call.rows.numel() // len(loss.logits)
        places = tokens.places(layer_sums.layer, loss.scored.rows * each + loss.scored.positions)
        start = sum(len(x) for x in layer_sums.inputs[:-1])
        layer_sums.order.append(places + start)
        layer_sums.tokens_g.append(expected)

    def _add_passes(
        self,
        capture: Capture,
        masks: TokenMasks,
        loss: SummedLoss,
        made: Mapping[int, Tensor] | None,
    ) -> BatchTokens | None:
        """Adds every backward pass of a batch, and its own gradient where none of them is that."""
        sums = self.sums
        want_own = sums.keep_gradient and sums.fisher_kind != "empirical"
        diagonal = sums.uncovered.wants_diagonal
        first, tokens, decided = True, None, self._decided(capture, masks, loss)
        for one in backward_passes(loss, self.settings, self._generator):
            keep = not one.last or want_own or diagonal
            grads = self._backward(capture, one, keep) if made is None else made
            if first:  # a re-entrant checkpoint's calls are there only now
                masks.settle(self._calls(capture), grads if decided is None else decided)
                tokens = BatchTokens(capture, sums.everyone(), masks, sums.n_batches)
                sums.head.find(loss, list(sums.layers.layers.values()), tokens.calls)
            assert tokens is not None
            self._add_pass(tokens, grads, first=first, own=one.grad_output is None)
            first = False
        if want_own and tokens is not None:
            grads = self._backward(capture, BackwardPass(loss.loss, None, not diagonal), diagonal)
            for layer_sums in sums.by_layer.values():
                g = tokens.gradients(layer_sums.layer, grads)
                if g is not None and len(g) > 0:
                    self._own(layer_sums, tokens.inputs(layer_sums.layer), g)
        return tokens

    def _decided(
        self, capture: Capture, masks: TokenMasks, loss: SummedLoss
    ) -> Mapping[int, Tensor | None] | None:
        """The gradient of the loss, where rows depend on it that the first pass does not reach."""
        by_position = self.sums.fisher_kind == "true"
        if not by_position or not masks.undecided(self._calls(capture)):
            return None
        return capture.gradients(loss.loss, retain_graph=True)[0]

    def _calls(self, capture: Capture) -> list[Call]:
        return [call for layer in self.sums.everyone() for call in capture.calls_of(layer)]

    def _backward(
        self, capture: Capture, one: BackwardPass, keep: bool
    ) -> Mapping[int, Tensor | None]:
        """The gradients of the layers' outputs; adds those of parameters that are wanted."""
        uncovered, sums = self.sums.uncovered, self.sums
        own = one.grad_output is None and self.sums.keep_gradient
        wanted = list(uncovered.parameters.values()) if own else []
        checked = uncovered.covered if own and self.sums.verify else {}
        grads, others = capture.gradients(
            one.output,
            one.grad_output,
            retain_graph=keep,
            parameters=[*wanted, *checked.values()],
        )
        uncovered.add(others)
        if checked:
            dtypes = {grad.dtype for grad in grads.values() if grad is not None}
            sums.rounding = max([sums.rounding, *(torch.finfo(dtype).eps for dtype in dtypes)])
        for name, grad in zip(checked, others[len(wanted) :], strict=True):
            if grad is not None:
                found = sums.by_autograd.get(name)
                sums.by_autograd[name] = grad if found is None else found + grad
        return grads

    def _add_pass(
        self,
        tokens: BatchTokens,
        grads: Mapping[int, Tensor | None],
        *,
        first: bool,
        own: bool,
    ) -> None:
        taking_part: list[Layer] = []
        for layer in self.sums.everyone():
            g = tokens.gradients(layer, grads)
            if g is None or len(g) == 0:
                continue
            layer_sums = self.sums.of(layer)
            check_finite(g, layer.name, self.sums.n_batches, "gradients")
            a = tokens.inputs(layer)
            if own and self.sums.keep_gradient:
                self._own(layer_sums, a, g)
            if first:
                layer_sums.tokens += tokens.count(layer)
                taking_part.append(layer)
            self._add_g(layer_sums, a, g, tokens, first)
        if first:
            self._add_inputs(taking_part, tokens)

    def _add_g(
        self,
        layer_sums: LayerSums,
        a: Tensor,
        g: Tensor,
        tokens: BatchTokens,
        first: bool,
    ) -> None:
        """Adds tokens, or one row for each of their examples."""
        layer = layer_sums.layer
        examples = tokens.examples(layer)
        if isinstance(layer_sums.g, BlockAccumulator):
            layer_sums.g.add(a, g, examples)
            return
        if examples is not None:
            a, g = examples.means(a), examples.sums(g)
        if layer.name == self.sums.head.name:  # its G, and EKFAC's moments, have no draws
            layer_sums.inputs += [a] if first and self.settings.ekfac else []
            return
        layer_sums.g.add(g, expected=self.sums.fisher_kind == "true")
        if self.settings.ekfac:
            # Draws of one batch have the same inputs; batches may differ in their draws.
            start = sum(len(x) for x in layer_sums.inputs[: None if first else -1])
            layer_sums.order.append(torch.arange(start, start + len(g), device=g.device))
            layer_sums.tokens_g.append(g)
            sequences = tokens.sequences(layer)
            if sequences is not None:
                layer_sums.sequences.append(sequences.index + layer_sums.n_sequences)
                layer_sums.n_sequences += len(sequences)
        if self.settings.ekfac or layer_sums.g.tokens_in_order():
            layer_sums.inputs += [a] if first else []
        else:
            layer_sums.inputs.clear()

    def _own(self, layer_sums: LayerSums, a: Tensor, g: Tensor) -> None:
        """Adds ``sum_t g_t a_t^T`` (with the bias column) in the core dtype."""
        dtype = self.settings.numerics.core_dtype
        layer = layer_sums.layer
        if layer.tied:
            return
        if isinstance(layer_sums.g, BlockAccumulator):
            part = layer_sums.g.own(a, g)
        elif layer.kind.looks_up:
            part = torch.zeros(layer.n_in, layer.n_out, dtype=dtype, device=g.device)
            part = part.index_add_(0, a, g.to(dtype)).T
        else:
            with full_precision():
                part = g.to(dtype).T @ a.to(dtype)
            if layer.augmented:
                part = torch.cat([part, g.sum(dim=0, dtype=dtype)[:, None]], dim=1)
        layer_sums.own = part if layer_sums.own is None else layer_sums.own + part

    def _add_inputs(self, taking_part: Sequence[Layer], tokens: BatchTokens) -> None:
        """Adds to the A sides; layers that read the very same tensors share one sum."""
        sums = self.sums
        here: dict[tuple, list[Layer]] = {}
        for layer in taking_part:
            if layer.one_block:
                continue
            keys = (layer.kind.looks_up, layer.n_in, layer.name if layer.marked else None)
            keys += tuple(share_key(c, layer.augmented) for c in tokens.calls[layer.name])
            before = sums.by_layer[layer.name].group
            here.setdefault((before, keys), []).append(layer)
        used: set[int] = set()
        for (before, _), layers in here.items():
            group = self._group(before, layers, before in used)
            used.add(group)
            a, examples = tokens.inputs(layers[0]), tokens.examples(layers[0])
            sums.inputs[group].add(a if examples is None else examples.means(a))

    def _group(self, before: int, layers: list[Layer], taken: bool) -> int:
        """The group of layers that go on together: their old one, a copy of it, or a new one."""
        sums = self.sums
        mates = [n for n, s in sums.by_layer.items() if s.group == before and before >= 0]
        whole = before >= 0 and not taken and set(mates) == {x.name for x in layers}
        if whole:
            return before
        group = max(sums.inputs, default=-1) + 1
        sums.inputs[group] = (
            deepcopy(sums.inputs[before]) if before >= 0 else sums.input_of(layers[0])
        )
        for layer in layers:
            sums.by_layer[layer.name].group = group
        return group


def _check_labels(model: nn.Module, batches: Iterable[Any], function: LossFunction | None) -> None:
    """Refuses batches of which masks and labels alone say that nothing counts, before a pass."""
    if not isinstance(batches, list | tuple) or not batches:
        return  # an iterator can be read once only
    if function is not None and not isinstance(function, CrossEntropy):
        return
    for batch in batches:
        prepared = prepare(model, batch, function)
        shift = shift_of(model, prepared) if function is None else function.shift
        masks_of(prepared)
        if shift is None or count_labels(prepared, shift=shift) != 0:
            return
    raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")


def _captured_loss(
    model: nn.Module,
    loss: Tensor,
    captured: Capture,
    batch: Any,
    prepared: Any,
    n_labels: int | None,
    reduction: str,
) -> SummedLoss:
    """The token-summed loss behind a tensor that the caller computed from the batch's labels.

    The logits of the captured pass come with it where the model's labelling is known.
    """
    if len(captured.outputs) != 1:
        raise LossError(
            f"capture: {len(captured.outputs)} forward passes of the model in the 'with' block; "
            "allowed: one (of a compiled model, run the uncompiled one: model._orig_mod)"
        )
    output = captured.outputs[0]
    shift = shift_of(model, prepared)
    if not is_certain(model, prepared) and reduction == "mean":
        found = tensor_shifts(loss, output, batch)
        shift = shift if found is None else found
    if n_labels is None and shift is None:
        aligned, shifted = count_labels(batch), count_labels(batch, shift=True)
        if aligned != shifted:
            raise LossError(
                "n_labels: whether the loss shifts the labels cannot be told "
                f"({aligned} or {shifted} count); give n_labels="
            )
    summed = sum_of(
        loss, batch, n_labels=n_labels, reduction=reduction, touch=loss, shift=bool(shift)
    )
    if shift is None or labels_of(prepared) is None:
        return replace(summed, labelling="by the caller's loss")
    scored = CrossEntropy(shift).score(output, prepared)
    about = str(Labelling(shift, scored=True))
    return replace(summed, scored=scored, logits=logits_of(output), labelling=about)

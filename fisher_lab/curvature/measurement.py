"""Asks a model, or a loss function, how its loss treats the labels of a batch.

A class of Hugging Face's that hands its labels on as they are says it itself (:mod:`.labelling`);
everything else is asked once for each kind of batch (``docs/math.md``, section 1):

1. the loss is compared with the mean cross-entropy of the logits, with the labels shifted and in
   place, in two passes: one with the labels as they are, one with them in another order;
2. where it is neither (smoothed labels, a fused loss without logits), two parts of the labels are
   given one after the other: a mean over ``n`` labels has ``n L = n_1 L_1 + n_2 L_2``, for the
   right ``n`` alone;
3. where there are no labels to leave out, two parts of the batch are;
4. of rows of real-valued labels, whether the loss takes their numbers together.

What fits nothing is not guessed: its count has to be given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab.curvature.errors import LossError
from fisher_lab.curvature.evaluation_mode import buffers_kept, seed_generators
from fisher_lab.curvature.labelling import (
    MEASURED,
    UNKNOWN,
    Labelling,
    certain_of,
    hf_model,
    kind_of,
)
from fisher_lab.curvature.labels import (
    IGNORE_INDEX,
    NEED_LABELS,
    count_labels,
    example_count,
    forward,
    labels_of,
    logits_of,
    loss_of,
    map_tensors,
    named_outputs,
    with_labels,
)
from fisher_lab.curvature.likelihoods import of_numbers
from fisher_lab.curvature.wrappers import group_of_passes, uncompiled, unwrap

_ROUNDING = 1e-5
"""Relative difference of two losses that are the same; Hugging Face computes in float32."""


_FUNCTIONS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Loss function -> whether it shifts the labels."""


def measure_labelling(model: nn.Module, batch: Any) -> None:
    """Measures, once for a kind of batch whose labelling the class leaves open, how it is.

    The passes are without dropout and a graph; modes, buffers and random state are put back. Where
    the batch shows nothing (no label, a head that gives every class the same), the next one is
    asked.

    Args:
        model: any module; one whose passes are for all ranks is left alone (:func:`agreed`).
        batch: with the caller's own labels, on the model's device.
    """
    inner = unwrap(model)
    if not is_open(inner, batch) or group_of_passes(inner) is not None:
        return
    found = found_in(inner, batch)
    if found is not None:
        MEASURED.setdefault(inner, {})[kind_of(batch)] = found


def is_open(model: nn.Module, batch: Any) -> bool:
    """Whether a model has a loss of its own that has to be asked about this kind of batch."""
    if not isinstance(batch, Mapping) or kind_of(batch) in MEASURED.get(model, {}):
        return False
    parameters = inspect.signature(model.forward).parameters
    labels = labels_of(batch)
    takes = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or "labels" in parameters
    if labels is not None and (not takes or labels.numel() == 0):
        return False
    return certain_of(model, batch) is None


def found_in(model: nn.Module, batch: Any) -> Labelling | None:
    """What the model's own loss of a batch shows; None: nothing yet."""
    ask, labels = _Asked(model, batch), labels_of(batch)
    with untouched(model):
        outputs = ask.outputs(batch)
        loss = loss_of(outputs)
        if loss is None:
            return None if labels is None else UNKNOWN
        if labels is None or labels.is_floating_point():
            whole = ask.by_examples()
            several = labels is not None and labels.dim() > 1 and labels.shape[-1] > 1
            return ask.by_numbers(whole.summed) if several and whole.count is not None else whole
        if not bool((labels != IGNORE_INDEX).any()):
            return None
        fits = ask.by_logits(outputs)
        if fits and ask.unlabelled is None:
            NEED_LABELS.add(model)
        if len(fits) == 1:
            return fits[0]
        if labels.dim() == 1:
            return ask.by_examples()
        means = ask.by_labels()
        if fits:  # logits that give every class the same fit both
            return next((x for x in fits if [x.shift] == means), None)
        if means and len(means) == 1 and ask.holds_for_examples(means[0]):
            return Labelling(means[0], count="labels")
        return UNKNOWN if means else ask.by_examples()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Without dropout, graph and compiler; modes, buffers and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncompiled(model))
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        model.eval()
        yield


class _Asked:
    """A model whose own loss is asked, with other labels or with parts of a batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch

    def outputs(self, batch: Any) -> Any:
        """The output with labels, None where the model does not take them."""
        seed_generators(0)  # a loss that draws is asked with the same draws
        try:
            return forward(self.model, batch, with_labels=True)
        except (TypeError, ValueError, NotImplementedError):
            return None

    def loss(self, batch: Any) -> float:
        found = loss_of(self.outputs(batch))
        return float("nan") if found is None else float(found.double().mean())

    def by_logits(self, outputs: Any) -> list[Labelling]:
        """The ways in which the loss is the cross-entropy of the logits, for two orders of labels.

        Logits that come with the loss spare a pass without labels, unless labels change them.

        Args:
            outputs: of the pass with the labels as they are.
        """
        labels, model = labels_of(self.batch), self.model
        assert labels is not None
        logits, wrapper = _logits_in(outputs), not hasattr(type(model), "loss_function")
        fits = _as_cross_entropy(model, self.batch, outputs, logits)
        if not fits and (logits is None or wrapper):
            logits = self.unlabelled
            fits = _as_cross_entropy(model, self.batch, outputs, logits)
        if not fits:
            return []
        other = with_labels(self.batch, _in_another_order(labels))
        second = self.outputs(other)
        moved = _logits_in(second)
        if moved is not None and logits is not None and not torch.equal(moved, logits):
            logits = self.unlabelled
            fits = _as_cross_entropy(model, self.batch, outputs, logits)
        # A coincidence is none twice.
        return [x for x in fits if x in _as_cross_entropy(model, other, second, logits)]

    @cached_property
    def unlabelled(self) -> Tensor | None:
        """The logits of a pass without labels; None: it fails without them."""
        seed_generators(0)
        try:
            return _logits_in(forward(self.model, self.batch))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model's own code meets where there are none
            return None

    def by_labels(self) -> list[bool] | None:
        """The shifts for which the loss is a mean over the labels that count."""
        return means_over_labels(
            labels_of(self.batch), lambda labels: self.loss(with_labels(self.batch, labels))
        )

    def by_examples(self) -> Labelling:
        """Asks with parts of the batch whether the loss is over labels or examples.

        Examples with as many labels each would not tell: then the last one loses some of its own.
        """
        labels, parts = labels_of(self.batch), self._halves()
        if parts is None:
            return UNKNOWN
        one_each = labels is not None and (labels.is_floating_point() or labels.dim() == 1)
        if labels is not None and not one_each and _alike(parts):
            parts = _Asked(self.model, with_labels(self.batch, _uneven(labels)))._halves()
            if parts is None or _alike(parts):
                return UNKNOWN
        sizes = [example_count(part) or 0 for part in parts]
        try:
            losses = [self.loss(part) for part in parts]
        except (IndexError, KeyError):  # -100 is a label like others
            return UNKNOWN
        if one_each:
            counts = [count_labels(part) or 0 for part in parts]
            summed = _same(losses[0], losses[1] + losses[2])
            means = summed or _additive(losses, counts)
            return Labelling(count="labels", summed=summed) if means else UNKNOWN
        if _same(losses[0], losses[1] + losses[2]):
            return Labelling(count="examples", summed=True)
        return Labelling(count="examples") if _additive(losses, sizes) else UNKNOWN

    def by_numbers(self, summed: bool) -> Labelling:
        """Asks whether a loss of rows of real-valued labels is a mean over numbers or over rows.

        Where the logits of a row are compared together, as with a distribution over classes, the
        row is the label; where each is by itself, the loss is that of a likelihood of numbers as
        a mean over the numbers, the rows, or the examples, or else some loss of numbers.
        """
        labels = labels_of(self.batch)
        assert labels is not None
        with torch.enable_grad():
            outputs = self.outputs(self.batch)
            loss, logits = loss_of(outputs), _logits_in(outputs)
            together = None if loss is None or logits is None else _together(loss, logits)
        if loss is None or together is None:
            return UNKNOWN
        if together or summed:
            return Labelling(count="rows" if together else "labels", summed=summed)
        counts = {"labels": labels.numel(), "rows": labels[..., 0].numel(), "examples": len(labels)}
        for _, total in of_numbers(outputs, self.batch):
            for count, n in counts.items():
                if _same(total / n, float(loss)):
                    return Labelling(count=count)
        return Labelling(count="labels")

    def holds_for_examples(self, shift: bool) -> bool:
        """Whether parts of the batch add up too; another loss beside that of the labels does not.

        A batch that cannot be cut shows nothing against it.
        """
        parts = self._halves(shift)
        if parts is None:
            return True
        counts = [count_labels(part, shift=shift) or 0 for part in parts]
        return _additive([self.loss(part) for part in parts], counts)

    def _halves(self, shift: bool = False) -> list[Any] | None:
        """The batch and two parts of it with labels each; None where it cannot be cut."""
        size, labels = example_count(self.batch), labels_of(self.batch)
        for k in range(1, size or 1):
            cuts = (slice(None), slice(k), slice(k, None))
            parts = [map_tensors(lambda x, cut=cut: x[cut], self.batch) for cut in cuts]
            if labels is None or all(count_labels(part, shift=shift) for part in parts):
                return parts
        return None


def means_over_labels(labels: Any, loss: Callable[[Tensor], float]) -> list[bool] | None:
    """Returns the shifts for which a loss is a mean over the labels that count; None: not shown.

    Args:
        labels: ``[B, S, ...]``.
        loss: of labels of which some are -100.
    """
    given = labels != IGNORE_INDEX
    if labels.shape[1] < 3 or not bool(given.any()) or not _may_ignore(labels):
        return None
    first = labels.clone()
    first[:, 0] = torch.where(given[:, 0], labels[:, 0], labels[given][0])
    places = (first != IGNORE_INDEX).movedim(1, 0).flatten(1).any(dim=1).nonzero()[:, 0]
    middle = max(2, int(places[len(places) // 2]))
    parts = [first, first.clone(), first.clone()]
    parts[1][:, middle:] = IGNORE_INDEX
    parts[2][:, :middle] = IGNORE_INDEX
    try:
        values = [loss(part) for part in parts]
    except (IndexError, ValueError, KeyError):  # -100 is a label like others
        return None
    if _same(values[1], values[2]):
        return None
    counts = {
        shift: [count_labels({"labels": part}, shift=shift) or 0 for part in parts]
        for shift in (False, True)
    }
    return [shift for shift, n in counts.items() if _additive(values, n)]


def _may_ignore(labels: Tensor) -> bool:
    """Whether a label may become -100: on CUDA a wrong class ends the process."""
    return labels.dim() == 2 or not labels.is_cuda or bool((labels == IGNORE_INDEX).any())


def _alike(parts: list[Any]) -> bool:
    """Whether two parts of a batch have as many labels for each example, shifted or in place."""
    sizes = [example_count(part) or 0 for part in parts]
    counts = [[count_labels(p, shift=shift) or 0 for p in parts] for shift in (False, True)]
    return any(n[1] * sizes[2] == n[2] * sizes[1] for n in counts)


def _uneven(labels: Tensor) -> Tensor:
    """Labels of which the last example has lost the second half of its own."""
    found = labels.clone()
    if not _may_ignore(labels):
        return found
    places = (labels[-1] != IGNORE_INDEX).reshape(labels.shape[1], -1).any(1).nonzero()[:, 0]
    if len(places) > 1:
        found[-1, int(places[len(places) // 2]) :] = IGNORE_INDEX
    return found


def _together(loss: Tensor, logits: Tensor) -> bool | None:
    """Whether a number of the logits changes what the loss is by another one of its row.

    None: the loss is not computed from the logits.
    """
    if not (loss.requires_grad and logits.requires_grad):
        return None
    (slope,) = torch.autograd.grad(loss.sum(), logits, create_graph=True, allow_unused=True)
    if slope is None:
        return None
    if not slope.requires_grad:
        return False
    (bend,) = torch.autograd.grad(slope[..., 0].sum(), logits, allow_unused=True)
    return bend is not None and bool((bend[..., 1:] != 0).any())


def _additive(losses: list[float], counts: list[int]) -> bool:
    """Whether ``n L = n_1 L_1 + n_2 L_2``."""
    if min(counts) == 0:
        return False
    whole, *parts = [n * value for n, value in zip(counts, losses, strict=True)]
    return _same(whole, sum(parts))


def _same(one: float, other: float, rounding: float = _ROUNDING) -> bool:
    return abs(one - other) <= rounding * max(abs(one), abs(other))


def _in_another_order(labels: Tensor) -> Tensor:
    found, given = labels.clone(), labels != IGNORE_INDEX
    found[given] = labels[given].flip(0)
    return found


def _as_cross_entropy(
    model: nn.Module, batch: Any, outputs: Any, logits: Tensor | None
) -> list[Labelling]:
    """The ways in which the loss is the cross-entropy of the logits, by a factor at most."""
    labels, loss = labels_of(batch), loss_of(outputs)
    if (
        logits is None
        or labels is None
        or loss is None
        or loss.dim() > 0
        or logits.shape[:-1] != labels.shape
    ):
        return []
    rounding = max(_ROUNDING, 4 * torch.finfo(loss.dtype).eps)
    value, found = float(loss), []
    for shift in (False, True)[: labels.dim()]:
        count = count_labels(batch, shift=shift) or 0
        summed = _cross_entropy(logits, labels, shift)
        factors = [1.0 / n for n in (count, 1, len(labels), labels.numel()) if n > 0]
        if any(_same(summed * factor, value, rounding) for factor in factors):
            found.append(Labelling(shift, scored=True))
        elif name := _addend(model, outputs, value, value - summed / max(count, 1)):
            found.append(Labelling(shift, scored=True, besides=name))
    return found


def _logits_in(outputs: Any) -> Tensor | None:
    """The logits of a pass; None where it keeps them."""
    try:
        return logits_of(outputs)
    except LossError:
        return None


def _cross_entropy(logits: Tensor, labels: Tensor, shift: bool) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORE_INDEX
    chosen, wanted = logits[keep], labels[keep]
    if not len(wanted) or int(wanted.max()) >= chosen.shape[-1] or int(wanted.min()) < 0:
        return float("nan")
    precise = chosen if chosen.dtype == torch.float64 else chosen.float()
    return float(F.cross_entropy(precise, wanted, reduction="none").double().sum())


def _addend(model: nn.Module, outputs: Any, loss: float, rest: float) -> str | None:
    """The name of the output's scalar that, by a factor of the configuration, is the rest."""
    config = getattr(hf_model(model), "config", None)
    configs = [] if config is None else [config, config.get_text_config()]
    factors = {v for one in configs for v in vars(one).values() if isinstance(v, float)} | {1.0}
    for name, value in named_outputs(outputs).items():
        if isinstance(value, Tensor) and value.dim() == 0 and name != "loss":
            parts = [float(value) * factor for factor in factors]
            if any(part and abs(part - rest) <= _ROUNDING * abs(loss) for part in parts):
                return str(name)
    return None


def function_shifts(function: Callable[..., Tensor], outputs: Any, batch: Any) -> bool | None:
    """Says whether a loss function that returns a mean shifts the labels; None: not known.

    Where the first labels do not count in either way there is nothing to tell. Else the function is
    asked twice more with a part of the labels, once in its life.

    Args:
        function: ``loss_fn(outputs, batch)``.
        outputs: of the model, for the batch.
        batch: with integer labels ``[B, S]``.
    """
    try:
        if function in _FUNCTIONS:
            return _FUNCTIONS[function]
    except TypeError:  # it cannot be kept
        pass

    def loss(labels: Tensor) -> float:
        with torch.no_grad():
            return float(function(outputs, with_labels(batch, labels)))

    means = means_over_labels(labels_of(batch), loss)
    if means is None or len(means) != 1:
        return None
    with suppress(TypeError):
        _FUNCTIONS[function] = means[0]
    return means[0]


def tensor_shifts(loss: Tensor, outputs: Any, batch: Any) -> bool | None:
    """Says whether a mean loss that the caller computed shifts the labels; None: not known.

    Args:
        loss: the caller's.
        outputs: of the captured pass.
        batch: with the labels that it was computed from.
    """
    labels = labels_of(batch)
    try:
        logits = logits_of(outputs).detach()
    except LossError:
        return None
    if labels is None or logits.shape[:-1] != labels.shape or loss.dim() > 0:
        return None
    rounding, fits = max(_ROUNDING, 4 * torch.finfo(loss.dtype).eps), []
    for shift in (False, True)[: labels.dim()]:
        count = count_labels(batch, shift=shift) or 0
        mean = _cross_entropy(logits, labels.to(logits.device), shift) / max(count, 1)
        fits += [shift] if _same(mean, float(loss.detach()), rounding) else []
    return fits[0] if len(fits) == 1 else None

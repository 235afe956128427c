"""Runs the model for a refresh, or takes the pass that the caller made, and adds it up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .build import FactorBuilder
from .capture import Capture, TokenMasks
from .errors import BatchError, LossError
from .losses import (
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
    unwrap,
)


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

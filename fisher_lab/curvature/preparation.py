"""A batch as the engines need it: on the model's device, with its labels masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import (
    Communicator,
    TorchCommunicator,
    dtype_name,
    together,
)
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.labelling import (
    MEASURED,
    Labelling,
    declared_of,
    has_decoder,
    hf_model,
    kind_of,
    labelling_of,
    source_of,
)
from fisher_lab.curvature.labels import (
    TOKEN_MASKS,
    count_labels,
    forward,
    map_tensors,
    masked_labels,
    masks_ids,
    tokens_of_attention,
)
from fisher_lab.curvature.likelihoods import understood
from fisher_lab.curvature.measurement import found_in, is_open, measure_labelling, untouched
from fisher_lab.curvature.wrappers import device_of, group_of_passes, unwrap


def prepare(model: nn.Module, batch: Any, loss_fn: Any = None, *, measure: bool = True) -> Any:
    """Returns a copy of the batch, on the model's device, with the labels masked.

    An encoder-decoder model's decoder inputs are made from the caller's labels first, as the model
    itself would, so that masking the labels does not change what the decoder sees. A mask that says
    who attends to whom gets one of the tokens beside it.

    Args:
        model: any module.
        batch: the caller's; it is not changed.
        loss_fn: the caller's loss; None for the model's own.
        measure: whether the model may be asked about its loss.

    Raises:
        BatchError: a mask does not say which positions are padding.
    """
    batch = with_inputs(model, batch)
    if not isinstance(batch, dict):
        return batch
    if measure and loss_fn is None:
        measure_labelling(model, batch)
    if batch.get("labels") is None:
        return batch
    shift = getattr(understood(loss_fn), "shift", None)
    if not isinstance(shift, bool):
        found = labelling_of(model, batch)
        if loss_fn is None and found.count == "examples":
            return batch  # a transcription has no place among the positions
        shift = bool(found.shift)
    batch["labels"] = masked_labels(batch, shift=shift, encoder_decoder=has_decoder(model))
    return batch


def agreed(
    model: nn.Module, batches: Iterable[Any], communicator: Communicator, loss_fn: Any = None
) -> Iterable[Any]:
    """Measures the kind of the first batch on all ranks, which then agree on it; collective.

    What a rank cannot measure is as another has measured it; what no rank can is as the class says.
    Where a pass is one of all ranks (FSDP2), they make the same ones, with the batch of one rank.

    Args:
        model: any module.
        batches: this rank's own; none at all is allowed.
        communicator: of the ranks.
        loss_fn: the caller's loss on this rank; then there is nothing to measure.

    Returns:
        The batches.

    Raises:
        CurvatureError: ranks have measured different things.
        RankError: another rank has an error.
    """
    inner, first, found = unwrap(model), list[Any](), list[Labelling | None]()
    group = group_of_passes(inner)
    if group is not None and communicator.size == 1:  # factors are each rank's own, passes are not
        communicator = TorchCommunicator(group)
    if communicator.size == 1:
        return batches
    rest = batches if isinstance(batches, list | tuple) else iter(batches)
    together(communicator, lambda: first.extend(islice(rest, 1)))
    batches = rest if isinstance(rest, list | tuple) else chain(first, rest)
    asks = loss_fn is None and any(is_open(inner, one) for one in first)
    all_ask = communicator.all_gather_objects(asks)
    if not any(all_ask):
        return batches
    own: list[Any] = []
    together(communicator, lambda: own.extend(with_inputs(model, one) for one in first if asks))
    asked = own
    if group is not None:
        asked = _of_one_rank(own, device_of(model), communicator)
    together(
        communicator,
        lambda: found.append(found_in(inner, asked[0]) if asked else None),
    )
    every = communicator.all_gather_objects([None if x is None else vars(x) for x in found])
    known = {rank: Labelling(**x) for rank, (x,) in enumerate(every) if x is not None}
    if len(set(known.values())) > 1:
        said = "; ".join(f"rank {rank}: {one}" for rank, one in known.items())
        raise CurvatureError(f"labels: {said}; give loss=CrossEntropy(shift=...) or n_labels=")
    if asks:
        decided = next(iter(known.values()), None) or declared_of(inner)
        MEASURED.setdefault(inner, {})[kind_of(first[0])] = decided
    return batches


def _of_one_rank(own: list[Any], device: torch.device, communicator: Communicator) -> list[Any]:
    """The batch of the rank with the most labels, on all ranks; none where none can be sent.

    Args:
        own: this rank's batch, or nothing.
        device: where the batch is wanted.
        communicator: of the ranks.
    """
    about = [_entries(batch) for batch in own]
    n_labels = [count_labels(batch) or 0 for batch in own]
    every = communicator.all_gather_objects([about, n_labels])
    able = {rank: n[0] for rank, (entries, n) in enumerate(every) if any(entries)}
    if not able:
        return []
    source = max(able, key=lambda rank: (able[rank], -rank))
    batch = {}
    for name, dtype, given in every[source][0][0]:
        value = own[0].get(name) if source == communicator.rank else given
        if dtype is not None:
            here = source == communicator.rank
            value = value if here else torch.empty(given, dtype=getattr(torch, dtype)).to(device)
            value = communicator.broadcast(value, source)
        batch[name] = value
    return [batch]


def _entries(batch: Any) -> list[tuple[str, str | None, Any]]:
    """Name, dtype and shape of a batch's tensors, other values; empty: it cannot be sent."""
    found: list[tuple[str, str | None, Any]] = []
    for name, value in batch.items() if isinstance(batch, dict) else ():
        if isinstance(value, Tensor):
            found.append((name, dtype_name(value.dtype), list(value.shape)))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, None, value))
        else:
            return []
    return found


def with_inputs(model: nn.Module, batch: Any) -> Any:
    """A copy on the model's device, with what the model would make of the labels and the mask."""
    device = device_of(model)
    batch = map_tensors(lambda x: x.to(device), batch)
    if not isinstance(batch, dict):
        return batch
    for name, ours in TOKEN_MASKS.items():
        mask = batch.get(name)
        if isinstance(mask, Mapping):  # one for each kind of attention; all hide the padding
            mask = next((one for one in mask.values() if one is not None), None)
        if mask is None or ours in batch:
            continue
        if not isinstance(mask, Tensor):
            raise BatchError(
                f"{name}: a {type(mask).__name__} does not say which positions are padding; "
                f"allowed: {ours!r} [B, S] beside it (0 at padding)"
            )
        if mask.dim() > 2 and not masks_ids(batch, name):
            batch[ours] = tokens_of_attention(mask, name)
    labels = batch.get("labels")
    given = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    if labels is None or given or labels.is_floating_point() or not has_decoder(model):
        return batch
    base: Any = hf_model(model)
    shift_right: Any = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    # FSMT has the method as well, and makes its inputs of something else.
    says = _FROM_LABELS.search(source_of(type(base).forward))
    made = shift_right(labels=labels) if shift_right and says else _of_labels(model, batch)
    if made is not None:
        batch["decoder_input_ids"] = made
    return batch


_FROM_LABELS = re.compile(r"decoder_input_ids = [\w.]*shift\w*\(labels")
"""In the source of a forward pass: the decoder's inputs are the labels, moved to the right."""


class _Made(Exception):
    """The decoder's inputs, as the model has made them; the pass ends there."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


def _of_labels(model: nn.Module, batch: Any) -> Tensor | None:
    """The decoder's inputs where they change with the labels: it may be given the words instead."""
    made, labels = _decoder_inputs(model, batch), batch["labels"]
    if made is None:
        return None
    other = _decoder_inputs(model, {**batch, "labels": labels.clamp(max=0)})
    return None if other is not None and torch.equal(made, other) else made


def _decoder_inputs(model: nn.Module, batch: Any) -> Tensor | None:
    """What a model makes of the labels for its decoder, where it has no method that says so."""
    inner = unwrap(model)
    base: Any = hf_model(model)
    if batch["labels"].dim() != 2 or group_of_passes(inner) is not None:
        return None
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("decoder_input_ids")
        if module is decoder:
            ids = kwargs.get("input_ids", kwargs.get("input_values", args[0] if args else None))
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            raise _Made(ids)

    with ExitStack() as stack:
        stack.enter_context(untouched(inner))
        for module in inner.modules():
            handle = module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            forward(inner, batch, with_labels=True)
        except _Made as made:
            return made.ids
    return None

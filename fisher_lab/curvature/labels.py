"""Which labels of a batch count, and how a model is called with it.

What this module fixes (``docs/math.md``, section 1):

- labels at masked positions become ``IGNORE_INDEX`` on a *copy* of the batch; in a causal model
  also where the predicting position is padding or belongs to another sequence (Hugging Face's own
  loss ignores the mask);
- masks say which positions are tokens, and of which sequence where one row holds several.

How a model aligns labels with its logits is the business of :mod:`.labelling`.

Shapes: ``B`` sequences of ``S`` positions, ``C`` classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.wrappers import unwrap

IGNORE_INDEX = -100
"""Labels with this value do not count (the value that Hugging Face uses)."""

TOKEN_MASKS = {"attention_mask": "token_mask", "decoder_attention_mask": "decoder_token_mask"}
"""A mask that says who attends to whom -> that of the tokens, which the model is not given."""

_CLOSED = -5e3
"""What is added to attention scores below this closes a position."""


def named_outputs(outputs: Any) -> dict[Any, Any]:
    """Returns the entries of a model's output, by name or by place."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, list | tuple):
        return dict(enumerate(outputs))
    return {} if isinstance(outputs, Tensor) else dict(getattr(outputs, "__dict__", {}))


def logits_of(outputs: Any) -> Tensor:
    """Returns the logits in a model's output: its ``logits``, or the first tensor of a tuple.

    Raises:
        LossError: the output is no tensor, and there is none in it that could be the logits.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", None) if logits is None else logits
    if isinstance(outputs, list | tuple) and logits is None:
        logits = next((x for x in outputs if isinstance(x, Tensor) and x.dim() > 1), None)
    if not isinstance(logits, Tensor):
        raise LossError(
            f"model output: no logits in a {type(outputs).__name__}; "
            "give loss=<function of (outputs, batch)>"
        )
    return logits


def loss_of(outputs: Any) -> Tensor | None:
    """Returns the loss in a model's output: its ``loss``, or the only scalar of a tuple."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    loss = getattr(outputs, "loss", None) if loss is None else loss
    if loss is None and isinstance(outputs, list | tuple):
        tensors = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
        scalars = [x for x in tensors if x.dim() == 0]
        loss = scalars[0] if len(scalars) == 1 else None
    return loss if isinstance(loss, Tensor) else None


def labels_of(batch: Any) -> Tensor | None:
    """Returns the labels of a batch: its ``labels`` entry, or the second of a pair."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def with_labels(batch: Any, labels: Tensor) -> Any:
    """Returns a copy of the batch with other labels."""
    if isinstance(batch, Mapping):
        return {**batch, "labels": labels}
    return type(batch)((batch[0], labels))


def is_empty(batch: Any) -> bool:
    """Says whether a batch has labels, but of no example: many models cannot run on that."""
    labels = labels_of(batch)
    return labels is not None and labels.numel() == 0


def count_labels(batch: Any, *, shift: bool = False) -> int | None:
    """Returns how many labels of a batch count, or None where it has none to look at.

    Every number of real-valued labels is a label.

    Args:
        batch: whose labels are counted.
        shift: whether the first label of each row does not count (causal).
    """
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        return None if labels is None else labels.numel()
    return int((_predicted(labels, shift) != IGNORE_INDEX).sum())


def _predicted(labels: Tensor, shift: bool) -> Tensor:
    """The labels that some position predicts."""
    return labels[:, 1:] if shift and labels.dim() > 1 else labels


def example_count(batch: Any) -> int | None:
    """Returns the number of examples: the first dimension, if all tensors of a batch share it."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    map_tensors(note, batch)
    sizes = {shape[0] if shape else 0 for shape in shapes}
    return next(iter(sizes)) if len(sizes) == 1 else None


# ---- masks ---------------------------------------------------------------------------------------


def token_mask(batch: Any, name: str = "attention_mask") -> Tensor | None:
    """Returns which positions ``[B, S]`` are tokens: zero at padding, else of which sequence.

    Args:
        batch: a batch, prepared where its mask is a matrix for each sequence.
        name: of the attention mask.
    """
    if not isinstance(batch, Mapping):
        return None
    for key in (TOKEN_MASKS[name], name):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
    return None


def position_mask(batch: Any, name: str = "attention_mask") -> Tensor | None:
    """Returns which positions are tokens, as :func:`token_mask` or in the shape of the ids.

    A batch of several texts for each example (``[B, C, S]``) has a mask of that shape.
    """
    mask = token_mask(batch, name)
    return batch[name] if mask is None and masks_ids(batch, name) else mask


def masks_ids(batch: Any, name: str) -> bool:
    """Says whether a mask has a flag for each of the ids that it belongs to."""
    if not isinstance(batch, Mapping):
        return False
    mask, ids = batch.get(name), batch.get(name.replace("attention_mask", "input_ids"))
    return isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape == ids.shape


def tokens_of_attention(mask: Tensor, name: str) -> Tensor:
    """Returns which positions are tokens ``[B, S]``, of a mask that says who attends to whom.

    A position to which nobody attends is padding. Where a token does not attend to the one before
    it, another sequence starts: the numbers of the sequences are returned, and 0 for padding.

    Args:
        mask: ``[B, H, S, S]`` or ``[B, S, S]``: bool, 0 and 1, or what is added to the scores.
        name: of the mask, for the error.

    Raises:
        BatchError: it cannot be told, since a position that others do not see attends, or nobody
            but itself sees it.
    """
    ask = f"allowed: such a mask with {TOKEN_MASKS[name]!r} [B, S] beside it (0 at padding)"
    if mask.dim() not in (3, 4) or mask.shape[-1] != mask.shape[-2]:
        raise BatchError(f"{name}: shape {tuple(mask.shape)} does not say what is padding; {ask}")
    added = mask.is_floating_point() and bool((mask <= 0).all()) and bool((mask < 0).any())
    attends = mask > _CLOSED if added else mask != 0
    attends = attends if mask.dim() == 3 else attends.any(dim=1)
    own = attends.diagonal(dim1=-2, dim2=-1)
    others = attends & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    seen, sees = others.any(dim=-2), others.any(dim=-1)
    lonely = own & ~seen & ~sees & (mask.shape[-1] > 1)
    if bool((seen & ~own).any()) or bool(lonely.any()):
        raise BatchError(f"{name}: which positions are padding cannot be told from it; {ask}")
    starts = own.clone()
    starts[:, 1:] &= ~attends.diagonal(-1, dim1=-2, dim2=-1)
    return starts.cumsum(dim=1) * own


def _packed(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Sequences of rows that hold several, as ``position_ids`` or ``cu_seq_lens_q`` say."""
    positions, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(positions, Tensor) and positions.shape == shape:
        return (positions == 0).cumsum(dim=1)
    if isinstance(ends, Tensor) and shape[0] == 1:
        starts = torch.zeros(shape, dtype=torch.int64, device=ends.device)
        inside = ends[(ends >= 0) & (ends < shape[1])].long()
        starts[0, inside] = 1
        return starts.cumsum(dim=1)
    return None


def segments_of(batch: Any) -> Tensor | None:
    """Returns of which sequence of its row each position is, ``[B, S]``; None: rows hold one each.

    Args:
        batch: a prepared batch.
    """
    if not isinstance(batch, Mapping):
        return None
    found = token_mask(batch)
    if found is None:
        ids = next(
            (x for k in ("input_ids", "inputs_embeds") if (x := batch.get(k)) is not None), None
        )
        found = _packed(batch, ids.shape[:2]) if isinstance(ids, Tensor) else None
    return found if found is not None and found.numel() and int(found.max()) > 1 else None


def masked_labels(batch: Mapping[str, Any], *, shift: bool, encoder_decoder: bool) -> Tensor | None:
    """Returns a copy of the labels with -100 wherever padding predicts or is predicted.

    With a causal ``shift``, labels whose predicting position is padding, or of another sequence,
    go as well; in an encoder-decoder model labels and mask are the decoder's.
    """
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        return labels
    mask = token_mask(batch, "decoder_attention_mask" if encoder_decoder else "attention_mask")
    if mask is None and shift and not encoder_decoder:
        mask = _packed(batch, labels.shape)
        mask = None if mask is None else mask + 1  # there is no padding
    if mask is None or mask.shape != labels.shape:
        return labels
    mask = mask.to(labels.device)
    active = mask != 0
    if shift:
        active = active.clone()
        active[:, 1:] &= mask[:, :-1] == mask[:, 1:]
    return labels.masked_fill(~active, IGNORE_INDEX)


# ---- calling a model -----------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Returns the batch with a function of its tensors; containers are copied, never changed."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


_OURS = {"num_items_in_batch", *TOKEN_MASKS.values()}
"""Entries of a batch that no model needs: its own loss is a mean then."""

NEED_LABELS: WeakSet[nn.Module] = WeakSet()
"""Models whose pass without labels fails, as was measured."""


def forward(model: nn.Module, batch: Any, *, with_labels: bool = False) -> Any:
    """Calls the model on a prepared batch, with its ``labels`` where its own loss is wanted.

    A model that cannot run without labels has them too.

    The batch is a tensor, a sequence of positional arguments, or a mapping. Of a mapping, the
    entries that ``forward`` names are passed by keyword; where it names none, the first tensor is
    passed by position (a bare ``nn.Linear``). ``num_items_in_batch`` is passed only where it has
    to be.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if not isinstance(batch, Mapping):
        return model(batch[0]) if labels_of(batch) is not None else model(*batch)
    parameters = inspect.signature(unwrap(model).forward).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    needed = {k for k, p in parameters.items() if p.default is p.empty}
    with_labels |= "labels" in needed or unwrap(model) in NEED_LABELS
    inputs = {k: v for k, v in batch.items() if with_labels or k != "labels"}
    inputs = {k: v for k, v in inputs.items() if k not in _OURS or k in needed}
    accepted = {k: v for k, v in inputs.items() if every or k in parameters}
    if not accepted:
        tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
        if not tensors:
            raise BatchError(f"batch: no tensor in it; keys {sorted(map(str, batch))}")
        return model(tensors[0])
    if "use_cache" in parameters and "use_cache" not in accepted:
        accepted["use_cache"] = False
    return model(**accepted)

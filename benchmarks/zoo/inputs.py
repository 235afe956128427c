"""Batches for tiny models, padded on a side, and their examples without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, CLASSES, HEADS = 53, 3, 4
PAD, START, END = 0, 1, 2


@dataclass(frozen=True)
class Shape:
    """How many real positions each example has, and the side of the padding."""

    side: str
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """``left-4x4``: side, examples, positions."""
        return f"{self.side}-{len(self.lengths)}x{max(self.lengths)}"

    def full(self) -> Shape:
        """The same shape without padding."""
        return Shape(self.side, (max(self.lengths),) * len(self.lengths))

    def mask(self, side: str | None = None) -> Tensor:
        """Which positions are real, ``[B, S]``."""
        positions = torch.arange(max(self.lengths))
        mask = (positions < torch.tensor(self.lengths)[:, None]).long()
        return mask if (side or self.side) == "right" else mask.flip(1)


# As many examples as positions as heads, and longer sequences.
SHAPES = tuple(Shape(side, n) for n in ((4, 2, 2, 4), (6, 8, 4)) for side in ("right", "left"))
WINDOWS = tuple(Shape(side, n) for n in ((4, 4, 4, 4), (4, 8, 4)) for side in ("right", "left"))
"""For models that fill up their inputs to whole windows of four."""


@dataclass(frozen=True)
class Batch:
    """What a model is given.

    Attributes:
        values: by name of the argument, examples in the first dimension.
        masks: name of an argument with positions in the second dimension -> name of its mask.
        n_labels: what the loss is a mean over, as many for each example, where nothing but the
            caller knows (CTC).
    """

    values: dict[str, Tensor]
    masks: Mapping[str, str] = field(default_factory=dict)
    n_labels: int | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def alone(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Yields every example as a batch of its own, without its padding, with its labels' number.

        The alternatives of an example, in a dimension before the positions, are as long.
        """
        for row in range(len(self)):
            single = {}
            for name, value in self.values.items():
                mask, one = self.masks.get(name), value[row]
                if mask is not None and self.values[mask].dim() == 3:
                    one = one[:, self.values[mask][row, 0].bool()]
                elif mask is not None:
                    one = one[self.values[mask][row].bool()]
                single[name] = one[None]
            if self.n_labels is not None:
                yield single, self.n_labels // len(self)
            else:
                yield single, int((single["labels"] != -100).sum())

    @property
    def padded(self) -> bool:
        """Whether a mask hides a position."""
        return any(not bool(self.values[m].bool().all()) for m in set(self.masks.values()))


Builder = Callable[[nn.Module, Shape], Batch]
"""Makes the batch of a model."""


def takes(model: nn.Module) -> set[str]:
    """The names of the arguments of a model's forward pass."""
    base: Any = getattr(model, "get_base_model", lambda: model)
    inside = base()
    return set(inspect.signature(inside.forward).parameters)


def _draw(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def sequences(model: nn.Module, shape: Shape) -> Batch:
    """Ids with their mask, and their positions where the padding is on the left.

    Words that stand somewhere on a page have a box there.
    """
    mask = shape.mask()
    values = {"input_ids": _draw(3, VOCAB, tuple(mask.shape), 1) * mask, "attention_mask": mask}
    if shape.side == "left" and "position_ids" in takes(model):
        values["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    for name in {"input_shape_ids", "input_pronunciation_ids"} & takes(model):  # of characters
        values[name] = _draw(3, VOCAB, tuple(mask.shape), len(name)) * mask
    if "bbox" in takes(model):
        corner = _draw(0, 5, (*mask.shape, 2), 3)
        values["bbox"] = torch.cat([corner, corner + 2], dim=2) * mask[..., None]
    return Batch(values, dict.fromkeys(values, "attention_mask"))


def every_position(model: nn.Module, shape: Shape) -> Batch:
    """A word for every real position but the first of each example.

    An encoder-decoder gets other lengths on its decoder's side, whose padding is on the right.
    """
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        return _with_decoder(model, sequences(model, shape), shape)
    return _labelled(model, shape, VOCAB)


def tagged(model: nn.Module, shape: Shape) -> Batch:
    """A class for every real position but the first of each example."""
    return _labelled(model, shape, CLASSES)


def _labelled(model: nn.Module, shape: Shape, classes: int) -> Batch:
    """Labels at all real positions but the first, so that a shift changes no count."""
    batch = sequences(model, shape)
    mask = batch.values["attention_mask"]
    counts = mask * mask.roll(1, 1)
    counts[:, 0] = 0
    labels = _draw(0, classes, tuple(mask.shape), 2).masked_fill(counts == 0, -100)
    return Batch({**batch.values, "labels": labels}, {**batch.masks, "labels": "attention_mask"})


def _with_decoder(model: nn.Module, batch: Batch, shape: Shape) -> Batch:
    """Labels for a decoder with its mask, or, where no decoder is padded, the labels alone."""
    longest = max(shape.lengths)
    square = len(shape.lengths) == longest
    lengths = (longest,) * len(shape.lengths) if square else (4, 2, 6)
    lengths = (6, 6, 6) if shape == shape.full() and not square else lengths
    mask = Shape("right", lengths).mask()
    labels = _draw(3, VOCAB, tuple(mask.shape), 2).masked_fill(mask == 0, -100)
    values, masks = {**batch.values, "labels": labels}, dict(batch.masks)
    if not square:
        values["decoder_attention_mask"] = mask
        masks |= {"labels": "decoder_attention_mask"}
        masks |= {"decoder_attention_mask": "decoder_attention_mask"}
    return Batch(values, masks)


def classified(model: nn.Module, shape: Shape) -> Batch:
    """A class for every example, whose last real position is the end of a text."""
    batch = sequences(model, shape)
    ids, mask = batch.values["input_ids"], batch.values["attention_mask"]
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    end = getattr(model.config, "eos_token_id", None) or END
    ids[torch.arange(len(ids)), last] = end if isinstance(end, int) else end[0]
    values, masks = {**batch.values, "labels": _draw(0, CLASSES, (len(ids),), 2)}, batch.masks
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_attention_mask" in takes(
        model
    ):
        values["decoder_attention_mask"] = mask
        masks = {**masks, "decoder_attention_mask": "attention_mask"}
    return Batch(values, masks)


def answers(model: nn.Module, shape: Shape) -> Batch:
    """Where in a text an answer starts and ends: the mean of two losses for each example."""
    batch = sequences(model, shape)
    ends = _draw(0, min(shape.lengths), (2, len(shape.lengths)), 2).sort(0).values
    values = {**batch.values, "start_positions": ends[0], "end_positions": ends[1]}
    return Batch(values, batch.masks, n_labels=len(shape.lengths))


def choices(model: nn.Module, shape: Shape) -> Batch:
    """Two texts of the same length for each example, and which is right."""
    batch = sequences(model, shape)
    values = {name: torch.stack([value, value], dim=1) for name, value in batch.values.items()}
    other = _draw(3, VOCAB, tuple(values["input_ids"].shape), 5)
    values["input_ids"][:, 1] = (other * values["attention_mask"])[:, 1]
    return Batch({**values, "labels": _draw(0, 2, (len(shape.lengths),), 2)}, batch.masks)


def paired(model: nn.Module, shape: Shape) -> Batch:
    """Whether the second half of a text follows the first, for every example."""
    batch = sequences(model, shape)
    return Batch({**batch.values, "labels": _draw(0, 2, (len(shape.lengths),), 2)}, batch.masks)


def pretrained(model: nn.Module, shape: Shape) -> Batch:
    """A word for every position and a label for each example, or, without one, yes or no for each.

    The loss is a sum of two means; of as many words each, that of a batch is the examples' mean.
    """
    batch = sequences(model, shape.full())
    n, ids = len(shape.lengths), batch.values["input_ids"]
    names = {"next_sentence_label", "sentence_order_label"} & takes(model)
    labels = _draw(3, VOCAB, tuple(ids.shape), 2) if names else _draw(0, 2, tuple(ids.shape), 2)
    more = {name: _draw(0, 2, (n,), 2) for name in names}
    values = {**batch.values, "labels": labels, **more}
    return Batch(values, {**batch.masks, "labels": "attention_mask"}, n_labels=n)

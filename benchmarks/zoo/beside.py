"""Texts with pictures beside them, for tiny models that read both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from benchmarks.zoo.inputs import VOCAB, Batch, Shape, every_position, takes
from benchmarks.zoo.perception import first_that_runs, noise
from benchmarks.zoo.tiny import settle_decoder

SPECIAL = 8
"""So many ids at the end of the vocabulary stand for something else than words."""
SIDE = 16
PICTURES = ("image_token_id", "image_token_index", "media_token_id", "im_patch_id")


def settle_beside(config: PretrainedConfig) -> None:
    """Asks for small pictures, and for ids within the vocabulary that stand for them."""
    settle_decoder(config)
    names = [n for n in vars(config) if re.fullmatch(r"\w*token_(id|index)|im_patch_id", n)]
    wide = [n for n in sorted(names) if isinstance(getattr(config, n), int)]
    for place, name in enumerate(n for n in wide if getattr(config, n) >= VOCAB - SPECIAL):
        setattr(config, name, VOCAB - 1 - place % SPECIAL)
    vision: Any = getattr(config, "vision_config", None)
    if isinstance(getattr(vision, "image_size", None), int):
        vision.image_size = SIDE


def pictured(model: nn.Module, shape: Shape) -> Batch:
    """A text after a picture, where the model takes one in a form that is known here; else a text.

    A picture is as many ids at the start of the text as the model makes features of it.
    """
    text = _words(every_position(model, shape))
    if "pixel_values" not in takes(model):
        return text
    found = [b for b in _with_pictures(model, shape) if b is not None]
    return first_that_runs(model, [*found, text])


def _words(batch: Batch) -> Batch:
    """The same with words in place of ids that stand for something else."""
    ids = batch.values["input_ids"]
    words = ids.where(ids < VOCAB - SPECIAL, ids - 2 * SPECIAL)
    return Batch({**batch.values, "input_ids": words}, batch.masks)


def _with_pictures(model: nn.Module, shape: Shape) -> Iterator[Batch | None]:
    config: Any = model.config
    n = len(shape.lengths)
    token = next((getattr(config, name) for name in PICTURES if hasattr(config, name)), None)
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    for size in ((n, channels, SIDE, SIDE), (n, 1, channels, SIDE, SIDE)):
        pixels = noise(*size)
        yield None if token is None else _counted(model, shape, pixels, token)


def _counted(model: nn.Module, shape: Shape, pixels: torch.Tensor, token: int) -> Batch | None:
    """The text with as many ids for the picture as the model says that it has features."""
    count = 1
    for _ in range(2):
        batch = _after(model, shape, pixels, token, count)
        try:
            with torch.no_grad():
                model(**{k: v for k, v in batch.values.items() if k in takes(model)})
            return batch
        except Exception as error:
            features = re.search(r"features:? (\d+)", str(error))
            if features is None:
                return None
            count = int(features[1]) // len(pixels)
    return None


def _after(model: nn.Module, shape: Shape, pixels: torch.Tensor, token: int, count: int) -> Batch:
    longer = Shape(shape.side, tuple(n + count for n in shape.lengths))
    batch = _words(every_position(model, longer))
    mask = batch.values["attention_mask"]
    first = (mask.cumsum(1) <= count) & mask.bool()
    values = dict(batch.values)
    values["input_ids"] = values["input_ids"].masked_fill(first, token)
    with suppress(RuntimeError):  # a decoder's labels are of another length
        values["labels"] = values["labels"].masked_fill(first, -100)
    kinds = {"token_type_ids": first.long(), "mm_token_type_ids": first.long()}
    more = {k: v for k, v in kinds.items() if k in takes(model)}
    masks = {**batch.masks, **dict.fromkeys(more, "attention_mask")}
    return Batch({**values, **more, "pixel_values": pixels}, masks)

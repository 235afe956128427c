"""Span corruption, as T5 is trained (Raffel et al. 2020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .corpus import Corpus, Side, generator, windows
from .tasks import Batch, TextTask, full_mask

CORRUPTED = 0.15
"""Share of the text's tokens that go from the encoder's side to the decoder's."""
MEAN_SPAN = 3.0


@dataclass(frozen=True)
class Shape:
    """Lengths of a corrupted text; the same for every row, so that nothing is padded.

    Attributes:
        text: Tokens before corruption.
        noise: Tokens that are taken out.
        spans: In how many spans.
    """

    text: int
    noise: int
    spans: int

    @property
    def encoder(self) -> int:
        """Length of the encoder's input: what is left, a sentinel a span, and the end token."""
        return self.text - self.noise + self.spans + 1

    @property
    def decoder(self) -> int:
        """Length of the decoder's labels: the spans, a sentinel before each, and the end token."""
        return self.noise + self.spans + 1

    @classmethod
    def of_text(cls, text: int, sentinels: int) -> Shape:
        """The shape for ``text`` tokens with so many sentinels to be had."""
        noise = min(max(1, round(CORRUPTED * text)), text - 1)
        spans = min(max(1, round(noise / MEAN_SPAN)), noise, text - noise, sentinels)
        return cls(text, noise, spans)

    @classmethod
    def of_encoder(cls, length: int, sentinels: int) -> Shape:
        """The shape with the longest text whose encoder input has at most ``length`` tokens."""
        text = length
        while cls.of_text(text + 1, sentinels).encoder <= length:
            text += 1
        while text > 2 and cls.of_text(text, sentinels).encoder > length:
            text -= 1
        return cls.of_text(text, sentinels)


class Spans(TextTask):
    """Spans are replaced by sentinels; the decoder says what they held."""

    name: ClassVar[str] = "spans"

    def __init__(self, corpus: Corpus, classes: int, sentinels: Sequence[int], end: int) -> None:
        super().__init__(corpus, classes)
        self.sentinels = tuple(sentinels)
        self.end = end

    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """``input_ids``, ``attention_mask`` (encoder) and the much shorter ``labels`` (decoder)."""
        shape = Shape.of_encoder(seq_len, len(self.sentinels))
        text = windows(self.corpus, side, index, seed=seed, count=batch_size, length=shape.text)
        rng = generator(side, seed, index).spawn(1)[0]
        rows = [corrupt(row, shape, rng, self.sentinels, self.end) for row in text]
        ids = torch.from_numpy(np.stack([row[0] for row in rows]))
        labels = torch.from_numpy(np.stack([row[1] for row in rows]))
        return {"input_ids": ids, "attention_mask": full_mask(ids), "labels": labels}

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """How many batches show every held-out window once."""
        return super().heldout_batches(
            batch_size, Shape.of_encoder(seq_len, len(self.sentinels)).text
        )


def corrupt(
    text: np.ndarray, shape: Shape, rng: np.random.Generator, sentinels: Sequence[int], end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take spans out of a text.

    Args:
        text: Token numbers, ``[shape.text]``.
        shape: How many tokens in how many spans.
        rng: Decides where; a text begins with a token that stays.
        sentinels: At least ``shape.spans`` of them.
        end: Ends both sequences.

    Returns:
        The encoder's input ``[shape.encoder]`` and the decoder's labels ``[shape.decoder]``.
    """
    kept = _composition(shape.text - shape.noise, shape.spans, rng)
    taken = _composition(shape.noise, shape.spans, rng)
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    at = 0
    for number, (stays, goes) in enumerate(zip(kept, taken, strict=True)):
        sentinel = np.array([sentinels[number]], dtype=text.dtype)
        source += [text[at : at + stays], sentinel]
        target += [sentinel, text[at + stays : at + stays + goes]]
        at += stays + goes
    last = np.array([end], dtype=text.dtype)
    return np.concatenate([*source, last]), np.concatenate([*target, last])


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """``total`` as an ordered sum of ``parts`` positive numbers, every one equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))

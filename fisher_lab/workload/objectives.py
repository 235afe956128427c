"""The training objectives: what a model predicts from the text, and the batches for it.

Four objectives: masked tokens (as BERT: Devlin et al. 2019, section 3.1), the next token, corrupted
spans (as T5: Raffel et al. 2020, section 3.1.4) and the topic of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature.losses import IGNORE_INDEX, CrossEntropy
from fisher_lab.workload.corpus import Corpus, Side, generator, windows

Batch = dict[str, Tensor]


class Objective(ABC):
    """Turns windows of tokens into batches with labels.

    Attributes:
        name: Short name, for records.
        baseline: Name of the trivial model that a trained one has to beat.
        loss_fn: None if a Hugging Face model has its own labelling.
        corpus: The tokens.
        classes: Number of values of a label.
    """

    name: ClassVar[str]
    baseline: ClassVar[str] = "unigram model"
    loss_fn: ClassVar[CrossEntropy | None] = None

    def __init__(self, corpus: Corpus, classes: int) -> None:
        self.corpus = corpus
        self.classes = classes

    @abstractmethod
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """Batch number ``index`` of a side; the same arguments give the same batch.

        Args:
            side: ``train`` or ``heldout``.
            index: Number of the batch, from 0.
            seed: Seed of windows and masks.
            batch_size: Sequences per batch.
            seq_len: Tokens per sequence.

        Returns:
            ``labels`` and the arguments of the model's ``forward``: for a text model ``input_ids``
            and ``attention_mask``, ``[batch_size, seq_len]`` int64 like ``labels``.
        """

    def label_batch(
        self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int
    ) -> Tensor:
        """The labels of `batch` that count, ``[N]``; the arguments are the same."""
        return self.targets(
            self.batch(side, index, seed=seed, batch_size=batch_size, seq_len=seq_len)
        )

    def text_length(self, seq_len: int) -> int:
        """Tokens of the text in a sequence of ``seq_len`` tokens."""
        return seq_len

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """Number of batches that show every held-out window once (the last may start over)."""
        count = max(1, len(self.corpus.heldout) // self.text_length(seq_len))
        return -(-count // batch_size)

    def distinct_batches(self, batch_size: int, seq_len: int) -> int | None:
        """Number of held-out batches of which no two share a window; None where they are drawn."""
        return len(self.corpus.heldout) // self.text_length(seq_len) // batch_size

    def targets(self, batch: Batch) -> Tensor:
        """The labels that count, ``[N]``."""
        labels = batch["labels"]
        return labels[labels != IGNORE_INDEX]

    def _windows(self, side: Side, index: int, seed: int, count: int, seq_len: int) -> np.ndarray:
        length = self.text_length(seq_len)
        return windows(self.corpus, side, index, seed=seed, count=count, length=length)


def _sequences(ids: np.ndarray, labels: np.ndarray) -> Batch:
    """A batch without padding."""
    inputs = torch.from_numpy(ids)
    mask = torch.ones_like(inputs)
    return {"input_ids": inputs, "attention_mask": mask, "labels": torch.from_numpy(labels)}


MASKED = 0.15
"""Share of the text's tokens that are predicted."""
REPLACED, RANDOM = 0.8, 0.1
"""Shares of these that are replaced by the mask token and by a random token; the rest stays."""


class Masked(Objective):
    """A fixed share of the tokens of each sequence (15 %) is hidden and predicted.

    Args:
        corpus: The tokens.
        classes: Number of values of a label.
        mask: The mask token.
        first: Token before the text of a sequence, or None.
        last: Token after it, or None.
    """

    name: ClassVar[str] = "masked"

    def __init__(
        self, corpus: Corpus, classes: int, mask: int, first: int | None, last: int | None
    ) -> None:
        super().__init__(corpus, classes)
        self.mask, self.first, self.last = mask, first, last

    @override
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        text = self._windows(side, index, seed, batch_size, seq_len)
        rng = generator(side, seed, index).spawn(1)[0]
        inputs, labels = mask(text, rng, mask_token=self.mask, classes=self.classes)
        frame = ((0, 0), (int(self.first is not None), int(self.last is not None)))
        ids = np.pad(inputs, frame, constant_values=((0, 0), (self.first or 0, self.last or 0)))
        return _sequences(ids, np.pad(labels, frame, constant_values=IGNORE_INDEX))

    @override
    def text_length(self, seq_len: int) -> int:
        return seq_len - (self.first is not None) - (self.last is not None)


def mask(
    text: np.ndarray, rng: np.random.Generator, *, mask_token: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens.

    Args:
        text: Token numbers, ``[B, S]``.
        rng: Chooses the tokens and their replacements.
        mask_token: Replaces most of them.
        classes: Random replacements are drawn from ``0 .. classes - 1``.

    Returns:
        The inputs, and the labels with -100 where nothing is predicted, both ``[B, S]``.
    """
    hidden = max(1, round(MASKED * text.shape[1]))
    ranks = rng.random(text.shape).argsort(axis=1).argsort(axis=1)
    chosen = ranks < hidden
    how = rng.random(text.shape)
    anything = rng.integers(0, classes, size=text.shape)
    inputs = np.where(chosen & (how < REPLACED), mask_token, text)
    inputs = np.where(chosen & (how >= REPLACED) & (how < REPLACED + RANDOM), anything, inputs)
    return inputs, np.where(chosen, text, IGNORE_INDEX)


class Causal(Objective):
    """Every token but the first is predicted from those before it."""

    name: ClassVar[str] = "causal"

    @override
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        ids = self._windows(side, index, seed, batch_size, seq_len)
        return _sequences(ids, ids.copy())  # the model's loss shifts the labels

    @override
    def targets(self, batch: Batch) -> Tensor:
        """The labels that count: all but the first of each row, ``[batch_size (seq_len - 1)]``."""
        return batch["labels"][:, 1:].flatten()


CORRUPTED = 0.15
"""Share of the text's tokens that move from the encoder's input to the decoder's labels."""
MEAN_SPAN = 3.0


@dataclass(frozen=True)
class SpanLengths:
    """Lengths of a corrupted text; the same for every row, so that nothing is padded.

    Attributes:
        text: Tokens before corruption.
        noise: Tokens that are removed.
        spans: Number of spans in which they are removed.
    """

    text: int
    noise: int
    spans: int

    @property
    def encoder(self) -> int:
        """Length of the encoder's input: the other tokens, one sentinel per span, an end token."""
        return self.text - self.noise + self.spans + 1

    @property
    def decoder(self) -> int:
        """Length of the decoder's labels: the spans, a sentinel before each, an end token."""
        return self.noise + self.spans + 1

    @classmethod
    def of_text(cls, text: int, sentinels: int) -> SpanLengths:
        """The lengths for ``text`` tokens with at most ``sentinels`` spans."""
        noise = min(max(1, round(CORRUPTED * text)), text - 1)
        spans = min(max(1, round(noise / MEAN_SPAN)), noise, text - noise, sentinels)
        return cls(text, noise, spans)

    @classmethod
    def of_encoder(cls, length: int, sentinels: int) -> SpanLengths:
        """The lengths with the longest text whose encoder input has at most ``length`` tokens."""
        text = length
        while cls.of_text(text + 1, sentinels).encoder <= length:
            text += 1
        while text > 2 and cls.of_text(text, sentinels).encoder > length:
            text -= 1
        return cls.of_text(text, sentinels)


class Spans(Objective):
    """Spans of the text are replaced by sentinels, and the decoder predicts their content.

    The ``labels`` are those of the decoder, and much shorter than the encoder's ``input_ids``.
    """

    name: ClassVar[str] = "spans"

    def __init__(self, corpus: Corpus, classes: int, sentinels: Sequence[int], end: int) -> None:
        super().__init__(corpus, classes)
        self.sentinels = tuple(sentinels)
        self.end = end

    @override
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        lengths = SpanLengths.of_encoder(seq_len, len(self.sentinels))
        text = self._windows(side, index, seed, batch_size, seq_len)
        rng = generator(side, seed, index).spawn(1)[0]
        rows = [corrupt(row, lengths, rng, self.sentinels, self.end) for row in text]
        return _sequences(np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))

    @override
    def text_length(self, seq_len: int) -> int:
        return SpanLengths.of_encoder(seq_len, len(self.sentinels)).text


def corrupt(
    text: np.ndarray,
    lengths: SpanLengths,
    rng: np.random.Generator,
    sentinels: Sequence[int],
    end: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Remove spans from a text.

    Args:
        text: Token numbers, ``[lengths.text]``.
        lengths: Number of tokens and of spans.
        rng: Chooses the spans; a text begins with a token that stays.
        sentinels: At least ``lengths.spans`` of them.
        end: Ends both sequences.

    Returns:
        The encoder's input ``[lengths.encoder]`` and the decoder's labels ``[lengths.decoder]``.
    """
    kept = _composition(lengths.text - lengths.noise, lengths.spans, rng)
    taken = _composition(lengths.noise, lengths.spans, rng)
    cuts = np.stack([kept, taken], axis=1).cumsum()
    pieces = np.split(text, cuts[:-1])
    source: list[np.ndarray | list[int]] = []
    target: list[np.ndarray | list[int]] = []
    for stays, goes, sentinel in zip(pieces[::2], pieces[1::2], sentinels, strict=False):
        source += [stays, [sentinel]]
        target += [[sentinel], goes]
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """``total`` as an ordered sum of ``parts`` positive numbers, all sums equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


STRETCHES = 16
"""Topics of a text whose documents are too few or too short: equal stretches of the text."""
HELDOUT_BATCHES = 4


def find(corpus: Corpus, window: int) -> dict[Side, np.ndarray]:
    """The topics of a text: its documents with at least ``window`` tokens on both sides.

    Returns:
        For each side, begin and end of the topics in its stream, ``[topics, 2]`` int64.

    Raises:
        ConfigError: The text is too short for two topics of any kind.
    """
    streams: dict[Side, np.ndarray] = {
        "train": corpus.train.document,
        "heldout": corpus.heldout.document,
    }
    documents = np.unique(np.concatenate([*streams.values()]))
    topics: dict[Side, np.ndarray] = {
        side: np.stack([np.searchsorted(stream, documents, at) for at in ("left", "right")], axis=1)
        for side, stream in streams.items()
    }
    enough = np.min([bounds[:, 1] - bounds[:, 0] for bounds in topics.values()], axis=0) >= window
    topics = {side: bounds[enough] for side, bounds in topics.items()}
    if enough.sum() < 2:
        for side, stream in streams.items():
            cuts = np.linspace(0, len(stream), STRETCHES + 1).astype(int)
            topics[side] = np.stack([cuts[:-1], cuts[1:]], axis=1)
    if min(np.diff(bounds).min() for bounds in topics.values()) < 1:
        raise ConfigError(
            f"data: {len(corpus.heldout)} held-out tokens are too few for topics; "
            "give more text or a larger data.heldout_fraction"
        )
    return topics


class Topics(Objective):
    """The topic of a window of text, from the counts of its tokens alone.

    An example is one row and so one token (``docs/math.md``, section 1). A batch therefore has
    ``batch_size x seq_len`` examples, as many as the tokens of any other model's batch: ``bag``
    ``[batch_size seq_len, vocabulary]`` (float32) and ``labels``.
    """

    name: ClassVar[str] = "topics"
    baseline: ClassVar[str] = "class frequencies"
    loss_fn: ClassVar[CrossEntropy | None] = CrossEntropy()

    def __init__(self, corpus: Corpus, vocabulary: int, topics: dict[Side, np.ndarray]) -> None:
        super().__init__(corpus, len(topics["train"]))
        self.vocabulary = vocabulary
        self.topics = topics

    @override
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        rng = generator(side, seed, index)
        count = batch_size * seq_len
        bounds = self.topics[side]
        sizes = bounds[:, 1] - bounds[:, 0]
        length = min(seq_len, int(sizes.min()))
        labels = rng.choice(len(sizes), size=count, p=sizes / sizes.sum())
        free = sizes[labels] - length + 1
        starts = bounds[labels, 0] + (rng.random(count) * free).astype(np.int64)
        ids = self.corpus.side(side).ids[starts[:, None] + np.arange(length)]
        return {
            "bag": torch.from_numpy(bag(ids, self.vocabulary)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }

    @override
    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """A fixed number: held-out windows are drawn, and overlap."""
        return HELDOUT_BATCHES

    @override
    def distinct_batches(self, batch_size: int, seq_len: int) -> None:
        return None


def bag(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """The logarithm of one plus the count of each token, ``[B, vocabulary]`` float32."""
    rows = np.arange(len(ids))[:, None] * vocabulary
    counts = np.bincount((rows + ids).ravel(), minlength=len(ids) * vocabulary)
    return np.log1p(counts.reshape(len(ids), vocabulary)).astype(np.float32)

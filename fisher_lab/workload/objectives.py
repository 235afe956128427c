"""What a model is trained to predict from the text, and the batches for it.

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

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature.losses import IGNORE_INDEX, CrossEntropy
from fisher_lab.workload.corpus import Corpus, Side, Stream, generator, windows

Batch = dict[str, Tensor]


class Objective(ABC):
    """Turns windows of tokens into batches with labels.

    Attributes:
        name: Short name, for records.
        baseline: Name of the trivial model that a trained one has to beat.
        loss_fn: None where a Hugging Face model knows its own labelling.
        corpus: The tokens.
        classes: How many values a label can have.
    """

    name: ClassVar[str]
    baseline: ClassVar[str] = "unigram model"
    loss_fn: CrossEntropy | None = None

    def __init__(self, corpus: Corpus, classes: int) -> None:
        self.corpus = corpus
        self.classes = classes

    @abstractmethod
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """Batch number ``index`` of a side; the same arguments give the same batch.

        Args:
            side: ``train`` or ``heldout``.
            index: The batch's number, from 0.
            seed: Of windows and masks.
            batch_size: Sequences.
            seq_len: Tokens a sequence.

        Returns:
            ``labels`` and what the model's ``forward`` takes.
        """

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """How many batches show every held-out window once (the last may begin again)."""
        count = max(1, len(self.corpus.heldout) // seq_len)
        return -(-count // batch_size)

    def targets(self, batch: Batch) -> Tensor:
        """The labels that count, ``[N]``."""
        labels = batch["labels"]
        return labels[labels != IGNORE_INDEX]


def full_mask(ids: Tensor) -> Tensor:
    """The attention mask of a batch without padding."""
    return torch.ones_like(ids)


MASKED = 0.15
"""Share of the text's tokens that are predicted."""
REPLACED, RANDOM = 0.8, 0.1
"""Of these: replaced by the mask token, replaced by any token; the rest stay as they are."""


@dataclass(frozen=True)
class MaskTokens:
    """Special tokens; ``first`` and ``last`` frame a sequence and may be missing."""

    mask: int
    first: int | None
    last: int | None


class Masked(Objective):
    """A fixed number of tokens a sequence (15 %) is hidden and predicted."""

    name: ClassVar[str] = "masked"

    def __init__(self, corpus: Corpus, classes: int, tokens: MaskTokens) -> None:
        super().__init__(corpus, classes)
        self.tokens = tokens

    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch_size, seq_len]``."""
        head = [] if self.tokens.first is None else [self.tokens.first]
        tail = [] if self.tokens.last is None else [self.tokens.last]
        length = seq_len - len(head) - len(tail)
        text = windows(self.corpus, side, index, seed=seed, count=batch_size, length=length)
        rng = generator(side, seed, index).spawn(1)[0]
        inputs, labels = mask(text, rng, mask_token=self.tokens.mask, classes=self.classes)
        ids = torch.from_numpy(_framed(inputs, head, tail))
        nothing = [IGNORE_INDEX]
        framed = _framed(labels, nothing * len(head), nothing * len(tail))
        return {
            "input_ids": ids,
            "attention_mask": full_mask(ids),
            "labels": torch.from_numpy(framed),
        }

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """How many batches show every held-out window once."""
        framing = (self.tokens.first is not None) + (self.tokens.last is not None)
        return super().heldout_batches(batch_size, seq_len - framing)


def mask(
    text: np.ndarray, rng: np.random.Generator, *, mask_token: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens.

    Args:
        text: Token numbers, ``[B, S]``.
        rng: Decides which and how.
        mask_token: What most of them are replaced by.
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


def _framed(rows: np.ndarray, head: list[int], tail: list[int]) -> np.ndarray:
    count = len(rows)
    columns = [np.full((count, 1), token, dtype=rows.dtype) for token in (*head, *tail)]
    return np.concatenate([*columns[: len(head)], rows, *columns[len(head) :]], axis=1)


class Causal(Objective):
    """Every token but the first is predicted from those before it."""

    name: ClassVar[str] = "causal"

    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch_size, seq_len]``.

        The labels are the inputs themselves: the model's loss shifts them.
        """
        drawn = windows(self.corpus, side, index, seed=seed, count=batch_size, length=seq_len)
        ids = torch.from_numpy(drawn)
        return {"input_ids": ids, "attention_mask": full_mask(ids), "labels": ids.clone()}

    def targets(self, batch: Batch) -> Tensor:
        """The labels that count: all but the first of each row, ``[batch_size (seq_len - 1)]``."""
        return batch["labels"][:, 1:].flatten()


CORRUPTED = 0.15
"""Share of the text's tokens that go from the encoder's side to the decoder's."""
MEAN_SPAN = 3.0


@dataclass(frozen=True)
class SpanLengths:
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
    def of_text(cls, text: int, sentinels: int) -> SpanLengths:
        """The lengths for ``text`` tokens with so many sentinels to be had."""
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
    """Spans are replaced by sentinels; the decoder says what they held."""

    name: ClassVar[str] = "spans"

    def __init__(self, corpus: Corpus, classes: int, sentinels: Sequence[int], end: int) -> None:
        super().__init__(corpus, classes)
        self.sentinels = tuple(sentinels)
        self.end = end

    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """``input_ids``, ``attention_mask`` (encoder) and the much shorter ``labels`` (decoder)."""
        lengths = SpanLengths.of_encoder(seq_len, len(self.sentinels))
        text = windows(self.corpus, side, index, seed=seed, count=batch_size, length=lengths.text)
        rng = generator(side, seed, index).spawn(1)[0]
        rows = [corrupt(row, lengths, rng, self.sentinels, self.end) for row in text]
        ids = torch.from_numpy(np.stack([row[0] for row in rows]))
        labels = torch.from_numpy(np.stack([row[1] for row in rows]))
        return {"input_ids": ids, "attention_mask": full_mask(ids), "labels": labels}

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """How many batches show every held-out window once."""
        return super().heldout_batches(
            batch_size, SpanLengths.of_encoder(seq_len, len(self.sentinels)).text
        )


def corrupt(
    text: np.ndarray,
    lengths: SpanLengths,
    rng: np.random.Generator,
    sentinels: Sequence[int],
    end: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Take spans out of a text.

    Args:
        text: Token numbers, ``[lengths.text]``.
        lengths: How many tokens in how many spans.
        rng: Decides where; a text begins with a token that stays.
        sentinels: At least ``lengths.spans`` of them.
        end: Ends both sequences.

    Returns:
        The encoder's input ``[lengths.encoder]`` and the decoder's labels ``[lengths.decoder]``.
    """
    kept = _composition(lengths.text - lengths.noise, lengths.spans, rng)
    taken = _composition(lengths.noise, lengths.spans, rng)
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


STRETCHES = 16
"""Topics of a text whose documents are too few or too short: equal stretches of it."""
HELDOUT_BATCHES = 4


@dataclass(frozen=True)
class Stretch:
    """Where a topic lies in the stream of each side: ``[begin, end)``."""

    train: tuple[int, int]
    heldout: tuple[int, int]

    def side(self, side: Side) -> tuple[int, int]:
        """Begin and end in the stream of a side."""
        return self.train if side == "train" else self.heldout


def find(corpus: Corpus, window: int) -> list[Stretch]:
    """The topics of a text: its documents with at least a window of text on both sides.

    Raises:
        ConfigError: The text is too short for two topics of any kind.
    """
    train, heldout = _by_document(corpus.train), _by_document(corpus.heldout)
    topics = [Stretch(train[one], heldout[one]) for one in sorted(train.keys() & heldout.keys())]
    topics = [topic for topic in topics if _shortest(topic) >= window]
    if len(topics) < 2:
        cuts = [
            np.linspace(0, len(stream), STRETCHES + 1).astype(int).tolist()
            for stream in (corpus.train, corpus.heldout)
        ]
        topics = [
            Stretch((cuts[0][i], cuts[0][i + 1]), (cuts[1][i], cuts[1][i + 1]))
            for i in range(STRETCHES)
        ]
    if min(_shortest(topic) for topic in topics) < 1:
        raise ConfigError(
            f"data: {len(corpus.heldout)} held-out tokens are too few for topics; "
            "give more text or a larger data.heldout_fraction"
        )
    return topics


def _by_document(stream: Stream) -> dict[int, tuple[int, int]]:
    documents, first, count = np.unique(stream.document, return_index=True, return_counts=True)
    return {
        int(document): (int(begin), int(begin + length))
        for document, begin, length in zip(documents, first, count, strict=True)
    }


def _shortest(topic: Stretch) -> int:
    return min(end - begin for begin, end in (topic.train, topic.heldout))


class Topics(Objective):
    """The topic of a window of text, from the counts of its tokens alone.

    An example is one row and so one token (``docs/math.md``, section 1); a batch therefore has
    ``batch_size x seq_len`` of them, as many tokens as any other model's batch.
    """

    name: ClassVar[str] = "topics"
    baseline: ClassVar[str] = "class frequencies"

    def __init__(self, corpus: Corpus, vocabulary: int, topics: list[Stretch]) -> None:
        super().__init__(corpus, len(topics))
        self.loss_fn = CrossEntropy()
        self.vocabulary = vocabulary
        self.topics = topics

    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        """``bag`` ``[batch_size seq_len, vocabulary]`` (float32) and ``labels``."""
        rng = generator(side, seed, index)
        count = batch_size * seq_len
        bounds = np.array([topic.side(side) for topic in self.topics])
        sizes = bounds[:, 1] - bounds[:, 0]
        length = min(seq_len, int(sizes.min()))
        labels = rng.choice(len(sizes), size=count, p=sizes / sizes.sum())
        room = sizes[labels] - length + 1
        starts = bounds[labels, 0] + (rng.random(count) * room).astype(np.int64)
        ids = self.corpus.side(side).ids[starts[:, None] + np.arange(length)]
        return {
            "bag": torch.from_numpy(bag(ids, self.vocabulary)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }

    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        """A few: held-out windows are drawn, and overlap."""
        return HELDOUT_BATCHES


def bag(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Logarithm of one plus the count of each token, ``[B, vocabulary]``, float32."""
    rows = np.arange(len(ids))[:, None] * vocabulary
    counts = np.bincount((rows + ids).ravel(), minlength=len(ids) * vocabulary)
    return np.log1p(counts.reshape(len(ids), vocabulary)).astype(np.float32)

"""Which document a bag of tokens comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature.losses import CrossEntropy

from .corpus import Corpus, Side, Stream, generator
from .tasks import Batch, TextTask

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


class Topics(TextTask):
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

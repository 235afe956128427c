"""Tokens of both sides of the split, and the windows that batches are cut from.

A batch is a pure function of ``(side, seed, index)``: a training has to remember only the number of
batches that it has seen, and two runs with the same seed see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fisher_lab.config.errors import ConfigError
from fisher_lab.workload.text import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["train", "heldout"]
_SIDE_NUMBER = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class Stream:
    """The tokens of one side: its passages, each followed by the end-of-text token.

    Attributes:
        ids: Token numbers, ``[n]``, int64.
        document: The document that each token belongs to, ``[n]``, int64.
    """

    ids: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """Both sides of a text, tokenized."""

    train: Stream
    heldout: Stream

    def side(self, side: Side) -> Stream:
        """The stream of a side.

        Raises:
            ValueError: Neither ``train`` nor ``heldout``.
        """
        if side not in _SIDE_NUMBER:
            raise ValueError(f"split={side!r} is not allowed: 'train' or 'heldout'")
        return self.train if side == "train" else self.heldout


def encode(
    passages: tuple[Sequence[Passage], Sequence[Passage]], tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """Tokenize train and held-out passages."""
    return Corpus(*(_encode(side, tokenizer) for side in passages))


def _encode(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> Stream:
    end = tokenizer.eos_token_id
    end = tokenizer.sep_token_id if end is None else end
    tail = [] if end is None else [end]
    ids: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    for passage in passages:
        encoded = tokenizer(passage.content, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(np.array([*encoded, *tail], dtype=np.int64))  # type: ignore[misc]
        documents.append(np.full(len(ids[-1]), passage.document, dtype=np.int64))
    empty = [np.zeros(0, dtype=np.int64)]
    return Stream(np.concatenate(ids or empty), np.concatenate(documents or empty))


def generator(side: Side, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one batch."""
    return np.random.default_rng([seed, _SIDE_NUMBER[side], index])


def windows(
    corpus: Corpus, side: Side, index: int, *, seed: int, count: int, length: int
) -> np.ndarray:
    """The token windows of one batch.

    Windows of the train side may begin anywhere. The held-out side is cut into windows that do not
    overlap; they are used in an order shuffled by ``seed``, starting over after the last.

    Args:
        corpus: The tokens.
        side: ``train`` or ``heldout``.
        index: Number of the batch.
        seed: Seed of the draw.
        count: Windows in the batch.
        length: Tokens per window.

    Returns:
        Token numbers, ``[count, length]``, int64.

    Raises:
        ConfigError: The side has fewer tokens than one window.
    """
    stream = corpus.side(side)
    if len(stream) < length:
        raise ConfigError.value(
            "data.seq_len",
            length,
            f"at most the {len(stream)} tokens of the {side} side of the text "
            "(data.heldout_fraction divides it)",
        )
    if side == "train":
        rng = generator(side, seed, index)
        starts = rng.integers(0, len(stream) - length + 1, size=count)
    else:
        order = np.random.default_rng([seed, _SIDE_NUMBER[side]]).permutation(len(stream) // length)
        starts = order[np.arange(index * count, (index + 1) * count) % len(order)] * length
    return stream.ids[starts[:, None] + np.arange(length)]

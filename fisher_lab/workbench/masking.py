"""Masked tokens, as BERT is trained (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fisher_lab.curvature.losses import IGNORE_INDEX

from .corpus import Corpus, Side, generator, windows
from .tasks import Batch, TextTask, full_mask

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


class Masked(TextTask):
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

"""What a model is asked about the text: the interface that the four tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fisher_lab.curvature.losses import IGNORE_INDEX, CrossEntropy
from fisher_lab.workload.corpus import Corpus, Side

Batch = dict[str, Tensor]


class TextTask(ABC):
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

"""Next-token prediction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .corpus import Side, windows
from .tasks import Batch, TextTask, full_mask


class Causal(TextTask):
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

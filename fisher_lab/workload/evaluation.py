"""Held-out loss, and the loss of the trivial model that a trained one has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fisher_lab.curvature import losses, wrappers
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.objectives import Batch, Objective

BASELINE_LABELS = 60_000
"""The trivial model counts at least this many labels of the train side."""
SEED = 0
"""Evaluation is the same for every run: its seed is fixed."""
FEW_BATCHES = 8
"""Held-out batches for a point of the curve, and for a model without a checkpoint of ours."""


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    objective: Objective,
    *,
    batch_size: int,
    seq_len: int,
    limit: int | None = None,
    parallel: DataParallel = ONE_PROCESS,
) -> float:
    """Mean loss per label over the held-out text, in nats; the model's mode is restored.

    Each rank takes its sequences of every batch; all return the same number.

    Args:
        model: The model.
        objective: Makes the batches.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence.
        limit: Largest number of batches; None takes every held-out window.
        parallel: The processes that evaluate together.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in _heldout(objective, batch_size, seq_len, limit):
            for own in parallel.own_sequences([losses.prepare(model, batch, objective.loss_fn)]):
                summed = losses.compute_loss(model, own, objective.loss_fn)
                total += float(summed.loss)
                count += summed.n_labels
    finally:
        model.train(training)
        wrappers.at_rest(model)
    total, count = parallel.sum(total, count)
    return total / max(count, 1)


def baseline_loss(
    objective: Objective, *, batch_size: int, seq_len: int, limit: int | None = None
) -> float:
    """Mean held-out loss, in nats, of the label frequencies of train batches (plus one each).

    The arguments are those of `heldout_loss`.
    """
    counts = torch.ones(objective.classes, dtype=torch.float64)
    index = 0
    while counts.sum() < BASELINE_LABELS + objective.classes:
        size: Any = {"seed": SEED, "batch_size": batch_size, "seq_len": seq_len}
        labels = objective.label_batch("train", index, **size)
        counts += torch.bincount(labels, minlength=objective.classes)
        index += 1
    nats = -(counts / counts.sum()).log()
    batches = _heldout(objective, batch_size, seq_len, limit)
    return float(torch.cat([nats[objective.targets(batch)] for batch in batches]).mean())


def _heldout(
    objective: Objective, batch_size: int, seq_len: int, limit: int | None
) -> Iterator[Batch]:
    count = objective.heldout_batches(batch_size, seq_len)
    for index in range(count if limit is None else min(count, limit)):
        yield objective.batch("heldout", index, seed=SEED, batch_size=batch_size, seq_len=seq_len)

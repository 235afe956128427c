"""Held-out loss, and the loss of the trivial model that a trained one has to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisher_lab.curvature import losses
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.objectives import Objective

BASELINE_LABELS = 60_000
"""The trivial model counts at least so many labels of the train side."""
SEED = 0
"""Evaluation is the same for every run: its seed is fixed."""


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
    """Mean loss a label over the held-out text, in nats; the model's mode is left as it was.

    Each rank takes its sequences of every batch; all return the same number.

    Args:
        model: The model.
        objective: Makes the batches.
        batch_size: Sequences a batch.
        seq_len: Tokens a sequence.
        limit: Batches at most; None takes every held-out window.
        parallel: The processes that evaluate.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for index in range(_batches(objective, batch_size, seq_len, limit)):
            batch = objective.batch(
                "heldout", index, seed=SEED, batch_size=batch_size, seq_len=seq_len
            )
            for own in parallel.own_sequences([losses.prepare(model, batch)]):
                summed = losses.compute_loss(model, own, objective.loss_fn)
                total += float(summed.loss)
                count += summed.n_labels
    finally:
        model.train(training)
        parallel.reshard(model)
    total, count = parallel.sum(total, count)
    return total / max(count, 1)


def baseline_loss(
    objective: Objective, *, batch_size: int, seq_len: int, limit: int | None = None
) -> float:
    """Mean held-out loss, in nats, of label frequencies counted on train batches (plus one each).

    Args:
        objective: Makes the batches.
        batch_size: Sequences a batch.
        seq_len: Tokens a sequence.
        limit: Held-out batches at most, as in `heldout_loss`.
    """
    counts = torch.ones(objective.classes, dtype=torch.float64)
    index = 0
    while counts.sum() < BASELINE_LABELS + objective.classes:
        batch = objective.batch("train", index, seed=SEED, batch_size=batch_size, seq_len=seq_len)
        counts += torch.bincount(objective.targets(batch), minlength=objective.classes)
        index += 1
    nats = -(counts / counts.sum()).log()
    seen: list[Tensor] = []
    for index in range(_batches(objective, batch_size, seq_len, limit)):
        batch = objective.batch("heldout", index, seed=SEED, batch_size=batch_size, seq_len=seq_len)
        seen.append(nats[objective.targets(batch)])
    return float(torch.cat(seen).mean())


def _batches(objective: Objective, batch_size: int, seq_len: int, limit: int | None) -> int:
    count = objective.heldout_batches(batch_size, seq_len)
    return count if limit is None else min(count, limit)

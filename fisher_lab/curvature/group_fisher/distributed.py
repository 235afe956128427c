"""Group Fisher of several ranks: the states are merged exactly, in the order of the ranks.

The merged moments are those of all data together (Chan et al. 1979; ``docs/math.md``, section 9).
The states are sent one after another, so that a rank never holds more than two of them besides its
own. With ``unit="batch"`` a batch is one datum: :func:`merge_over_ranks` gives the moments over
the ranks' batches. Where the ranks hold slices of one batch, :func:`collect_slices` takes the
gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Communicator, raise_others, together
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.group_fisher.collector import FisherCollector, active_tokens
from fisher_lab.curvature.wrappers import plain


def collect_slices(
    own: FisherCollector,
    model: nn.Module,
    slices: Sequence[Any | None],
    task: str,
    communicator: Communicator,
) -> None:
    """Takes in batches of which every rank holds some sequences; collective.

    Afterwards :func:`merge_over_ranks` returns the state of one process with the whole batches. The
    model is the same on all ranks; ``slices`` are this rank's sequences of each batch, None where
    it holds none of it, and every rank has as many batches.

    Raises:
        BatchError: no label counts on any rank.
        RankError: another rank has an error.
    """
    model = plain(model)
    own.describe(model)
    if own.unit == "batch":
        for batch in slices:
            _collect_whole_batch(own, model, batch, task, communicator)
        return
    mine = [batch for batch in slices if batch is not None]
    before = own.n_updates.get(task, 0)
    together(communicator, lambda: own.collect(model, mine, task, may_be_empty=True))
    if not any(communicator.all_gather_objects(own.n_updates.get(task, 0) - before)):
        raise BatchError(f"task {task}: no label of the batch counts")


def _collect_whole_batch(
    own: FisherCollector, model: nn.Module, batch: Any | None, task: str, communicator: Communicator
) -> None:
    """Rank 0's collector takes in the mean gradient over the labels of the whole batch."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flat = [torch.zeros(p.numel(), dtype=torch.float64) for p in parameters.values()]
    counts = [0, 0]

    def own_gradient() -> None:
        if batch is None:
            return
        with isolated(model, seed=0):
            grads, counts[0] = own.summed_gradient(model, batch, parameters)
        counts[1] = active_tokens(model, batch)
        flat[:] = [g.double().cpu().flatten() for g in grads.values()]

    together(communicator, own_gradient)
    n_labels, tokens = map(sum, zip(*communicator.all_gather_objects(counts), strict=True))
    if n_labels == 0:
        raise BatchError(f"task {task}: no label of the batch counts")
    mean = communicator.all_reduce(torch.cat(flat)) / n_labels
    pieces = mean.split([p.numel() for p in parameters.values()])
    means = {n: x.view_as(p) for (n, p), x in zip(parameters.items(), pieces, strict=True)}

    def take() -> None:
        if communicator.rank == 0:
            own.update_fisher_welford(task, means, tokens)

    together(communicator, take)


def merge_over_ranks(own: FisherCollector, communicator: Communicator) -> FisherCollector:
    """Returns the collector of all ranks' data, the same on every rank; collective.

    ``own``, this rank's collector, may have seen nothing yet; it stays as it is.

    Raises:
        CurvatureError: the ranks' collectors have other units, weights or shapes.
    """
    tensors, plain = own.state()
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    states: list[dict[str, Any]] = communicator.all_gather_objects(
        {"plain": plain, "shapes": shapes}
    )
    result: FisherCollector | None = None
    problem: str | None = None
    for rank, other in enumerate(states):
        state: dict[str, Tensor] = {}
        for name, shape in other["shapes"].items():
            mine = tensors[name].cpu() if rank == communicator.rank else None
            empty = torch.empty(shape, dtype=torch.float64)
            state[name] = communicator.broadcast(empty if mine is None else mine, rank)
        one = FisherCollector(own.unit, sequence_weight=own.sequence_weight)
        one.restore(state, other["plain"])
        try:
            if result is None:
                result = one
            else:
                result.merge(one)
        except CurvatureError as error:
            problem = problem or str(error)  # the other ranks' states still have to be taken
    raise_others([problem])
    assert result is not None
    return result

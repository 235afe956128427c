"""What the ranks do in `test_full_device_ranks.py`: the device of one of them runs full."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.accumulators import GradientAccumulator, MomentAccumulator
from fisher_lab.curvature.kfac.factors import Columns, Damped
from fisher_lab.curvature.kfac.factors.woodbury import DampedWoodbury
from tests import reference
from tests.capturing import random_like
from tests.curvature.kfac.test_full_device import LOGGER, FullOnce
from tests.distributed import kfac_on_ranks
from tests.distributed.kfac_on_ranks import Setting

STAGES: dict[str, tuple[Any, str]] = {
    "sum of A": (MomentAccumulator, "_add"),
    "sum of G": (GradientAccumulator, "_matrix"),
    "dense decomposition": (Damped, "_prepare"),
    "dense application": (Damped, "_power"),
    "columns, K": (Columns, "gram"),
    "columns, U^T Y": (Columns, "times"),
    "columns, U Z": (Columns, "transposed_times"),
    "Gram, push-through": (DampedWoodbury, "_push_through"),
    "EKFAC, moments": (ekfac, "squared_products"),
    "EKFAC, eigenvalues": (ekfac, "eigenbasis"),
}


class Counted(logging.Handler):
    """The warnings that something has moved to host memory."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def watched(stage: str, stub: FullOnce | None) -> Any:
    """Lets the stub see what one function does, and nothing else."""
    owner, name = STAGES[stage]
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with stub or nullcontext():
            return original(*args, **kwargs)

    return patch.object(owner, name, call)


def once(
    comm: Any, model: Any, setting: Setting, batches: list[dict], stage: str, stub: FullOnce | None
) -> dict[str, Any]:
    """Everything that is collective: collect, apply twice, a product."""
    kfac = setting.engine(comm)
    with watched(stage, stub):
        kfac.collect_kfac_factors(model, batches, keep_gradient=True)
        own = kfac.own_gradients(model)
        found = {"own": own, "natural": kfac.compute_natural_gradient(None, model)}
        found["again"] = kfac.compute_natural_gradient(own, model)
        found["product"] = kfac.compute_fisher_vector_product(random_like(own), model)
    found["later"] = kfac.compute_natural_gradient(own, model)
    return found


def full_on_one(
    comm: Any, full: int, stage: str, name: str, setting: Setting, batches: list[dict]
) -> tuple[int, float, list[str]]:
    """Runs with the device of rank `full` full at several operations of a stage.

    Returns how many operations there are on that rank, the largest relative difference from the
    run with room enough, and the warnings of this rank.
    """
    model = kfac_on_ranks.model_of(name, torch.float64)
    counting = FullOnce(None)
    expected = once(comm, model, setting, batches, stage, counting)
    count = comm.all_gather_objects(counting.count)[full]
    handler, worst = Counted(), 0.0
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        for at in sorted({1, 2, count // 2, count} - {0}):
            stub = FullOnce(at) if comm.rank == full else None
            found = once(comm, model, setting, batches, stage, stub)
            for key, truth in expected.items():
                worst = max(worst, *reference.errors(found[key], truth).values())
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    return count, worst, handler.texts

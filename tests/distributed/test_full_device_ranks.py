"""A device that runs full on one rank alone: nobody waits in vain, and the numbers stay.

Every stage of the factors' own work is hit on one rank, at several of its operations; what is
collective must not be done twice by one rank, and later calls must find all ranks in step.
"""

import logging
from contextlib import nullcontext
from logging.handlers import BufferingHandler
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.accumulators import GradientAccumulator, MomentAccumulator
from fisher_lab.curvature.kfac.factors import Columns, Damped
from fisher_lab.curvature.kfac.factors.woodbury import DampedWoodbury
from tests import reference
from tests.capturing import random_like
from tests.curvature.kfac.test_full_device import LOGGER, FullOnce
from tests.distributed.kfac_on_ranks import Setting, batches_of, model_of

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
CASES = [
    ("sum of A", "all", "gram", False),
    ("sum of G", "small_only", "gram", False),
    ("dense decomposition", "small_only", "gather", False),
    ("dense application", "small_only", "gather", False),
    ("dense application", "all", "gram", False),
    ("columns, K", "all", "gram", False),
    ("columns, U^T Y", "all", "gram", False),
    ("columns, U Z", "all", "gram", False),
    ("columns, U^T Y", "all", "gather", False),
    ("Gram, push-through", "all", "gather", False),
    ("EKFAC, moments", "all", "gram", True),
    ("EKFAC, moments", "all", "gather", True),
    ("EKFAC, eigenvalues", "all", "gather", True),
    ("columns, U Z", "all", "gram", True),
    ("columns, U^T Y", "all", "gram", True),
]


def once(
    comm: Any, setting: Setting, batches: list[dict], stage: str, stub: FullOnce | None
) -> dict[str, Any]:
    """Everything that is collective, the stub watching one function and nothing else."""
    model, kfac = model_of("gpt2", torch.float64), setting.engine(comm)
    owner, name = STAGES[stage]
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with stub or nullcontext():
            return original(*args, **kwargs)

    with patch.object(owner, name, watched):
        kfac.collect_kfac_factors(model, batches, keep_gradient=True)
        own = kfac.own_gradients(model)
        found = {"own": own, "natural": kfac.compute_natural_gradient(None, model)}
        found["again"] = kfac.compute_natural_gradient(own, model)
        found["product"] = kfac.compute_fisher_vector_product(random_like(own), model)
    found["later"] = kfac.compute_natural_gradient(own, model)
    return found


def full_on_one(
    comm: Any, full: int, setting: Setting, batches: list[dict], stage: str
) -> tuple[int, float, list[str]]:
    """Runs with the device of rank `full` full at several operations of a stage.

    Returns how many operations there are on that rank, the largest relative difference from the
    run with room enough, and the warnings of this rank.
    """
    counting = FullOnce(None)
    expected = once(comm, setting, batches, stage, counting)
    count = comm.all_gather_objects(counting.count)[full]
    handler, worst = BufferingHandler(10_000), 0.0
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        for at in sorted({1, 2, count // 2, count} - {0}):
            stub = FullOnce(at) if comm.rank == full else None
            found = once(comm, setting, batches, stage, stub)
            for key, truth in expected.items():
                worst = max(worst, *reference.errors(found[key], truth).values())
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    return count, worst, [r.getMessage() for r in handler.buffer if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(("stage", "policy", "mode", "ekfac"), CASES)
def test_one_rank_moves_to_its_host_memory(ranks, stage, policy, mode, ekfac):
    setting = Setting(policy, mode).also(**({"ekfac": True} if ekfac else {}))
    batches = batches_of("gpt2", 2, (40, 7))
    found = ranks.run(full_on_one, 2, batches, full=1, stage=stage, setting=setting)
    for rank, (count, worst, warnings) in enumerate(found):
        assert count > 2, "the stage takes memory"
        assert worst < 1e-10
        assert bool(warnings) == (rank == 1)
        assert all("moves to host memory" in text for text in warnings)

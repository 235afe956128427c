"""What the ranks do in `test_group_ranks.py`."""

from __future__ import annotations

from typing import Any

import torch

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.distributed.process_group import Ranks
from tests.distributed import kfac_on_ranks


def collected(unit: str, name: str, batches: list[dict]) -> FisherCollector:
    collector = FisherCollector(unit)
    model = kfac_on_ranks.model_of(name, torch.float64)
    for number, batch in enumerate(batches):
        collector.collect(model, batch, f"task{number % 2}")
    return collector


def on_a_rank(comm: Any, unit: str, name: str, batches: list[dict]) -> tuple[dict, dict]:
    own = collected(unit, name, batches)
    before = own.state()[1]
    state = merge_over_ranks(own, comm).state()
    if own.state()[1] != before:
        raise AssertionError("the rank's own collector has changed")
    return state


def of_other_units(comm: Any, name: str, batches: list[dict]) -> str:
    own = collected("token" if comm.rank == 0 else "sequence", name, batches)
    try:
        merge_over_ranks(own, comm)
    except CurvatureError as error:
        return str(error)
    return "nothing"


def in_shares(
    comm: Any, unit: str, name: str, batches: list[dict], dtype: torch.dtype, weight: str
) -> tuple[dict, dict]:
    """Every rank has its share of the sequences of whole batches."""
    ranks = Ranks(comm)
    collector = FisherCollector(unit, sequence_weight=weight)
    model = kfac_on_ranks.model_of(name, dtype)
    collect_slices(collector, model, ranks.own_parts(batches), "train", comm)
    return merge_over_ranks(collector, comm).state()


def of_own_batches(
    comm: Any, units: list[str], name: str, batches: list[dict], dtype: torch.dtype
) -> dict[str, tuple[dict, dict]]:
    """By unit: every rank's own batches, of which some have no label; as many on every rank."""
    found, model = {}, kfac_on_ranks.model_of(name, dtype)
    for unit in units:
        collector = FisherCollector(unit)
        collect_slices(collector, model, batches, "train", comm)
        found[unit] = merge_over_ranks(collector, comm).state()
    return found


def without_labels(comm: Any, unit: str, name: str, batches: list[dict]) -> str:
    collector = FisherCollector(unit)
    try:
        collect_slices(
            collector, kfac_on_ranks.model_of(name, torch.float64), batches, "train", comm
        )
    except CurvatureError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

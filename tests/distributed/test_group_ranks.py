"""Group Fisher of several ranks is that of one process that has seen all their data."""

from __future__ import annotations

import pytest

from tests import models, reference
from tests.distributed import grouping, joined
from tests.distributed.pool import Pool


def batches() -> list[list[dict]]:
    """Two batches on rank 0, one on rank 1, none on rank 2."""
    first = [models.language_batch((7, 5), seed=1), models.language_batch((9,), seed=2)]
    return [first, [models.language_batch((4, 6, 8), seed=3)], []]


@pytest.mark.parametrize("unit", ["token", "sequence", "batch"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_merged_states(ranks: Pool, unit: str, size: int) -> None:
    each = [{"batches": own} for own in batches()[:size]]
    found = ranks.run(grouping.on_a_rank, size, each=each, unit=unit, name="tiny")
    every = [batch for own in each for batch in own["batches"]]
    whole = grouping.GroupFisher(unit)
    model = joined.model_of("tiny", joined.torch.float64)
    for own in each:  # the tasks are numbered on each rank
        for number, batch in enumerate(own["batches"]):
            whole.collect(model, batch, f"task{number % 2}")
    tensors, plain = whole.state()
    assert len(every) == sum(task["n_updates"] for task in plain["tasks"]) or unit != "batch"
    for got, about in found:
        assert [t["name"] for t in about["tasks"]] == [t["name"] for t in plain["tasks"]]
        for mine, theirs in zip(about["tasks"], plain["tasks"], strict=True):
            assert mine["token_total"] == pytest.approx(theirs["token_total"], rel=1e-15)
            assert mine["n_updates"] == theirs["n_updates"]
        truth = {name: t for name, t in tensors.items() if float(t.norm()) > 1e-25}
        reference.assert_close(got, truth, 1e-10, f"{size} ranks, {unit}:")


def test_other_units_are_refused_on_all_ranks(ranks: Pool) -> None:
    each = [{"batches": own} for own in batches()[:2]]
    for text in ranks.run(grouping.of_other_units, 2, each=each, name="tiny"):
        assert "unit" in text

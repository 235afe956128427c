"""``KFACOptimizer`` in a plain loop on ranks: what one process does, refusals, checkpoints."""

from typing import Any

import pytest
import torch

from tests import models
from tests.distributed import optimizer_on_ranks
from tests.distributed.optimizer_on_ranks import Batch
from tests.optim.test_recipes import WITH_RANKS, snippets


def batches_of(steps: int, rows: int = 4) -> list[Batch]:
    """Texts without padding, every token of which is a label."""
    made = []
    for seed in range(steps):
        draws = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, models.VOCAB, (rows, 9), generator=draws)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def share(batches: list[Batch], rank: int) -> list[Batch]:
    return [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in batches]


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["gram", "gather"])
def test_a_plain_loop_on_two_ranks_is_that_of_one_process(ranks, kind, mode):
    """Hugging Face's loss is float32, so that its mean over ranks rounds another way."""
    batches = batches_of(4)
    one = optimizer_on_ranks.plain(None, kind, mode, batches)
    own = [share(batches, rank) for rank in range(2)]
    answers = ranks.run(optimizer_on_ranks.plain, 2, own=own, kind=kind, mode=mode)
    for answer in answers:
        assert furthest(one["weights"], answer["weights"]) < 1e-6
        assert furthest(answers[0]["weights"], answer["weights"]) == 0.0
        assert answer["done"] == 4


def test_factors_of_each_ranks_own_give_one_step_of_all(ranks):
    own = [share(batches_of(3), rank) for rank in range(2)]
    first, second = ranks.run(optimizer_on_ranks.plain, 2, own=own, kind="ddp", mode="none")
    assert furthest(first["weights"], second["weights"]) == 0.0


def test_uneven_shares_under_plain_ddp_are_refused(ranks):
    """DDP's gradient is the mean of the ranks' means, which is not the mean over all labels."""
    own = [share(batches_of(1), rank) for rank in range(2)]
    own[1][0]["labels"] = own[1][0]["labels"].clone()
    own[1][0]["labels"][0] = -100
    answers = ranks.run(optimizer_on_ranks.refused, 2, own=own, kind="ddp")
    assert all("a label weighs 0.0625, 0.125 on the ranks" in answer for answer in answers)
    own[1][0]["labels"][:] = -100  # an empty share: DDP's mean would halve the others' gradient
    answers = ranks.run(optimizer_on_ranks.refused, 2, own=own, kind="ddp")
    assert all("rank 1 has no label" in answer for answer in answers)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_distributed_checkpoint_goes_on_to_the_bit(ranks, kind, tmp_path):
    batches = batches_of(5)
    own = [share(batches, rank) for rank in range(2)]
    whole = ranks.run(optimizer_on_ranks.plain, 2, own=own, kind=kind, mode="gram")
    again = ranks.run(
        optimizer_on_ranks.restored, 2, own=own, kind=kind, directory=str(tmp_path / "saved")
    )
    for one, other in zip(whole, again, strict=True):
        assert other["done"] == 5
        assert furthest(one["weights"], other["weights"]) == 0.0


def test_the_recipe_on_shards_trains(ranks):
    own = [share(batches_of(2), rank) for rank in range(2)]
    answers = ranks.run(optimizer_on_ranks.recipe, 2, own=own, code=snippets()[WITH_RANKS])
    for answer in answers:
        assert answer["done"] == 20
        assert answer["after"] < answer["before"] - 1.0

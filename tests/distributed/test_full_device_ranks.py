"""A device that runs full on one rank alone: nobody waits in vain, and the numbers stay.

Every stage of the factors' own work is hit on one rank, at several of its operations; what is
collective must not be done twice by one rank, and later calls must find all ranks in step.
"""

from __future__ import annotations

import pytest

from tests.distributed import full_device_on_one_rank, kfac_on_ranks
from tests.distributed.kfac_on_ranks import Setting
from tests.distributed.rank_pool import Pool

EKFAC = {"ekfac": True}
CASES = [
    ("sum of A", Setting("all", "gram")),
    ("sum of G", Setting("small_only", "gram")),
    ("dense decomposition", Setting("small_only", "gather")),
    ("dense application", Setting("small_only", "gather")),
    ("dense application", Setting("all", "gram")),
    ("columns, K", Setting("all", "gram")),
    ("columns, U^T Y", Setting("all", "gram")),
    ("columns, U Z", Setting("all", "gram")),
    ("columns, U^T Y", Setting("all", "gather")),
    ("Gram, push-through", Setting("all", "gather")),
    ("EKFAC, moments", Setting("all", "gram").also(**EKFAC)),
    ("EKFAC, moments", Setting("all", "gather").also(**EKFAC)),
    ("EKFAC, eigenvalues", Setting("all", "gather").also(**EKFAC)),
    ("columns, U Z", Setting("all", "gram").also(**EKFAC)),
    ("columns, U^T Y", Setting("all", "gram").also(**EKFAC)),
]


def named(case: tuple[str, Setting]) -> str:
    stage, setting = case
    return f"{stage}-{setting.policy}-{setting.reduce}{'-ekfac' if setting.more else ''}"


@pytest.mark.parametrize(("stage", "setting"), CASES, ids=map(named, CASES))
def test_one_rank_moves_to_its_host_memory(ranks: Pool, stage: str, setting: Setting) -> None:
    each = [{"batches": own} for own in kfac_on_ranks.batches_of("gpt2", 2, (40, 7))]
    found = ranks.run(
        full_device_on_one_rank.full_on_one,
        2,
        each=each,
        full=1,
        stage=stage,
        name="gpt2",
        setting=setting,
    )
    for rank, (count, worst, warnings) in enumerate(found):
        assert count > 2, "the stage takes memory"
        assert worst < 1e-10
        if rank == 1:
            assert warnings
            assert all("moves to host memory" in text for text in warnings)
        else:
            assert not warnings

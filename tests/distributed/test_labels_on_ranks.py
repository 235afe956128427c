"""Ranks agree on how a model's own loss treats labels, whatever their own batches show."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.labelling import shift_of
from tests.curvature.test_labels import Wrapped
from tests.distributed.rank_pool import Pool
from tests.models import gpt2, language_batch, seeded


def collected(comm: Any, batches: list[dict[str, Tensor]]) -> tuple[bool | None, str]:
    model = Wrapped(seeded(gpt2, torch.float64))
    kfac = KFACNaturalGradient(damping=1e-3, kfac_distributed_reduce="gather", communicator=comm)
    kfac.collect_kfac_factors(model, batches)
    return shift_of(model), str(kfac.labels)


@pytest.mark.parametrize("first", ["no label", "one batch"])
def test_a_rank_that_cannot_measure_does_as_another_has_measured(ranks: Pool, first: str):
    batch = language_batch((7, 7), share=1.0)
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    batches = [[none, batch], [batch]] if first == "no label" else [[batch], [batch, none]]
    found = ranks.run(collected, 2, batches)
    assert found == [(True, "labels: shifted, 24 of 28")] * 2

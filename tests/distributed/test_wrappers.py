"""K-FAC of models in DDP and under `fully_shard`, with the names and values of the plain model."""

from __future__ import annotations

import pytest
import torch

from tests.capturing import random_like
from tests.distributed import joined
from tests.distributed.joined import LABELS, Joined, Setting, assert_all
from tests.distributed.pool import Pool

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrapped_models(ranks: Pool, kind: str, name: str, dtype: torch.dtype) -> None:
    setting = Setting("hybrid", "gram")
    each = [{"batches": own} for own in joined.batches_of(name, 3)]
    answers = ranks.run(
        joined.in_wrapper, 3, each=each, kind=kind, name=name, dtype=dtype, setting=setting
    )
    one = Joined(name, dtype, answers, sum(LABELS))
    own, bound = one.own(), BOUNDS[dtype]
    assert answers[0]["names"] == sorted(n for n, _ in one.model.named_parameters())
    assert_all(answers, "own", own, bound)
    truth = one.truth.natural_gradient(own, setting.damping)
    for key in ("natural", "general", "captured"):
        assert_all(answers, key, truth, bound)
    vectors = random_like(answers[0]["own"])
    assert_all(answers, "product", one.truth.fisher_vector_product(vectors), bound)
    if kind == "fsdp":
        assert_all(answers, "shards", truth, bound)
        assert_all(answers, "asked", truth, bound)

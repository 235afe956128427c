"""Models in DDP and under `fully_shard`, with the names and values of the plain model."""

from __future__ import annotations

import pytest
import torch

from fisher_lab.curvature.collectives import Alone
from tests import reference
from tests.curvature.spectra.reference import assert_values
from tests.distributed import kfac_on_ranks, spectra_on_ranks
from tests.distributed.kfac_on_ranks import LABELS, Joined, Setting, batches_of, in_one, model_of
from tests.distributed.rank_pool import Pool

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


OTHERS = [
    Setting("all", "gather"),
    Setting("auto", "gram"),
    Setting("small_only", "gather"),
    Setting("all", "gram").also(ekfac=True),
    Setting("small_only", "gather").also(ekfac=True),
]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrapped_models(ranks: Pool, kind: str, name: str, dtype: torch.dtype) -> None:
    check_wrapped(ranks, 3, kind, name, dtype, [Setting("hybrid", "gram")])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("size", "name", "dtype"),
    [
        (1, "gpt2", torch.float64), (2, "llama", torch.float64), (2, "gpt2", torch.float32),
        (3, "gpt2", torch.float64),
    ],
)  # fmt: skip
def test_wrapped_models_in_other_policies_and_modes(
    ranks: Pool, kind: str, size: int, name: str, dtype: torch.dtype
) -> None:
    check_wrapped(ranks, size, kind, name, dtype, OTHERS)


def check_wrapped(
    ranks: Pool, size: int, kind: str, name: str, dtype: torch.dtype, settings: list[Setting]
) -> None:
    batches, arguments = batches_of(name, size), {"kind": kind, "name": name, "dtype": dtype}
    keys = {"own", "natural", "general", "product", "captured"}
    if kind == "fsdp":
        keys |= {"shards", "asked"}
    for setting in settings:
        run = kfac_on_ranks.in_wrapper
        answers = ranks.run(run, size, batches, setting=setting, **arguments)
        one = Joined(name, dtype, answers, sum(LABELS[:size]))
        assert keys <= answers[0].keys()
        assert answers[0]["names"] == sorted(n for n, _ in one.model.named_parameters())
        one.check(setting, BOUNDS[dtype])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float64), ("llama", torch.float32)])
def test_spectra_lanczos_and_group_fisher(
    ranks: Pool, kind: str, name: str, dtype: torch.dtype
) -> None:
    """Names and values of one process with the plain model, which the wrapped one has not lost."""
    bound = BOUNDS[dtype]
    batches, arguments = batches_of(name, 2, (12, 5)), {"name": name, "dtype": dtype}
    run = spectra_on_ranks.in_wrapper
    found = ranks.run(run, 2, batches, kind=kind, **arguments)
    (without, *_) = ranks.run(run, 2, batches, kind=None, **arguments)
    one = run(Alone(), None, batches=in_one(batches), **arguments)
    assert list(found[0]["vectors"]) == [n for n, _ in model_of(name, dtype).named_parameters()]
    for answer in found:
        assert list(answer["spectrum"]["per_block"]) == list(one["spectrum"]["per_block"])
        top = one["spectrum"]["global"]["largest_eigenvalue"]
        for block, record in one["spectrum"]["per_block"].items():
            if record["status"] == "ok" and record["trace"] > bound * top:
                got = answer["spectrum"]["per_block"][block]["eigenvalues"]
                assert_values(got, record["eigenvalues"], bound, block)
        assert answer["top"] == pytest.approx(one["top"], rel=bound)
        assert answer["group"]["token"][1]["tasks"] == one["group"]["token"][1]["tasks"]
        assert answer["importance"].keys() == one["importance"].keys()
        # With "batch" one process would take two batches for two data: the plain model on ranks.
        for unit, wanted in (("token", one), ("batch", without)):
            truth = {n: t for n, t in wanted["group"][unit][0].items() if float(t.norm()) > 1e-25}
            reference.assert_close(answer["group"][unit][0], truth, bound, f"{kind}, {unit}:")

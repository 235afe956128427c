"""Models in DDP and under `fully_shard`, with the names and values of the plain model."""

from typing import Any

import pytest
import torch

from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from tests import reference
from tests.capturing import inputs_of
from tests.curvature.spectra.reference import assert_values
from tests.distributed import kfac_on_ranks
from tests.distributed.kfac_on_ranks import (
    LABELS,
    Joined,
    Setting,
    batches_of,
    in_one,
    model_of,
    wrapped,
)
from tests.distributed.test_spectra_ranks import Job

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


OTHERS = [
    Setting("all", "gather"),
    Setting("auto", "gram"),
    Setting("small_only", "gather"),
    Setting("all", "gram").also(ekfac=True),
    Setting("small_only", "gather").also(ekfac=True),
]


CASES = [
    *((3, name, dtype, [Setting("hybrid", "gram")])
      for name in ("gpt2", "llama") for dtype in BOUNDS),
    (1, "gpt2", torch.float64, OTHERS),
    (2, "llama", torch.float64, OTHERS),
    (2, "gpt2", torch.float32, OTHERS),
    (3, "gpt2", torch.float64, OTHERS),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("size", "name", "dtype", "settings"), CASES)
def test_wrapped_models(ranks, kind, size, name, dtype, settings):
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


def in_wrapper(
    comm: Any, kind: str | None, name: str, dtype: torch.dtype, batches: list[dict]
) -> dict[str, Any]:
    """On a rank: a spectrum, Lanczos and group Fisher of a wrapped model (None: the plain one)."""
    model = model_of(name, dtype)
    model = model if kind is None else wrapped(comm, model, kind)
    model.train()
    before = {n: (type(p), p.shape) for n, p in model.named_parameters()}
    job = Job("layer", config={"storage_mode": "chunked"})
    lanczos = FisherLanczos(k=2, tol=1e-9, communicator=comm)
    vectors = lanczos.top_eigenpairs(model, batches, eigenvectors=True)
    group = {unit: FisherCollector(unit) for unit in ("token", "batch")}
    for unit, collector in group.items():
        collect_slices(collector, model, batches, "train", comm)
        group[unit] = merge_over_ranks(collector, comm)
    if not all(module.training for module in model.modules()):
        raise AssertionError("the model's mode has changed")
    if before != {n: (type(p), p.shape) for n, p in model.named_parameters()}:
        raise AssertionError("the model's parameters have changed")
    result = {
        "spectrum": job.run(comm, model, batches),
        "top": vectors["eigenvalues"],
        "vectors": vectors["eigenvectors"],
        "group": {unit: collector.state() for unit, collector in group.items()},
        "importance": group["token"].importance("train", "head"),
    }
    if kind is not None:
        # It still trains, and what the wrapper does in a pass is still done.
        (batch,) = batches
        logits = model(**inputs_of(batch)).logits
        reference.summed_loss(getattr(model, "module", model), logits, batch)[0].backward()
        if any(p.grad is None or type(p.grad) is not type(p.data) for p in model.parameters()):
            raise AssertionError("a backward pass left no gradient like its parameter")
    return result


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float64), ("llama", torch.float32)])
def test_spectra_lanczos_and_group_fisher(ranks, kind, name, dtype):
    """Names and values of one process with the plain model, which the wrapped one has not lost."""
    bound = BOUNDS[dtype]
    batches, arguments = batches_of(name, 2, (12, 5)), {"name": name, "dtype": dtype}
    run = in_wrapper
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

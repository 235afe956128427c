"""Group Fisher of several ranks is that of one process that has seen all their data."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.distributed.process_group import Ranks
from tests import models, reference
from tests.curvature.spectra.reference import flat_gradient, logits_of, rows_of
from tests.distributed.kfac_on_ranks import LABELS, batches_of, in_one, model_of, with_labels
from tests.distributed.rank_pool import said

DTYPES = ((torch.float64, 1e-10), (torch.float32, 1e-5))


def some_batches() -> list[list[dict]]:
    """Two batches on rank 0, one on rank 1, none on rank 2."""
    first = [models.language_batch((7, 5), seed=1), models.language_batch((9,), seed=2)]
    return [first, [models.language_batch((4, 6, 8), seed=3)], []]


def collected(unit: str, of_ranks: list[list[dict]]) -> FisherCollector:
    """The tasks are numbered on each rank."""
    collector, model = FisherCollector(unit), model_of("tiny", torch.float64)
    for batches in of_ranks:
        for number, batch in enumerate(batches):
            collector.collect(model, batch, f"task{number % 2}")
    return collector


def merged(comm: Any, units: list[str], batches: list[dict]) -> tuple[dict, dict]:
    """On a rank; `units`: of the ranks."""
    own = collected(units[comm.rank], [batches])
    before = own.state()[1]
    state = merge_over_ranks(own, comm).state()
    if own.state()[1] != before:
        raise AssertionError("the rank's own collector has changed")
    return state


def refused(comm: Any, **arguments: Any) -> str:
    return said(lambda: merged(comm, **arguments))


@pytest.mark.parametrize("unit", ["token", "sequence", "batch"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_merged_states(ranks, unit, size):
    batches = some_batches()[:size]
    tensors, plain = collected(unit, batches).state()
    updates = sum(task["n_updates"] for task in plain["tasks"])
    assert len(in_one(batches)) == updates or unit != "batch"
    for got, about in ranks.run(merged, size, batches, units=[unit] * size):
        assert [t["name"] for t in about["tasks"]] == [t["name"] for t in plain["tasks"]]
        for mine, theirs in zip(about["tasks"], plain["tasks"], strict=True):
            assert mine["token_total"] == pytest.approx(theirs["token_total"], rel=1e-15)
            assert mine["n_updates"] == theirs["n_updates"]
        truth = {name: t for name, t in tensors.items() if float(t.norm()) > 1e-25}
        reference.assert_close(got, truth, 1e-10, f"{size} ranks, {unit}:")


def test_other_units_are_refused_on_all_ranks(ranks):
    for text in ranks.run(refused, 2, some_batches(), units=["token", "sequence"]):
        assert "unit" in text


def whole_batches() -> list[dict]:
    """Two batches; on three ranks the last one has no sequence of the second."""
    model = model_of("gpt2", torch.float64)
    first = models.language_batch((9, 7, 12, 5), seed=4)
    second = models.language_batch((6, 8), seed=5)
    return [with_labels(model, first, 20), with_labels(model, second, 3)]


def moments_of(
    model: torch.nn.Module, batches: list[dict], unit: str, weight: str = "tokens"
) -> dict[str, Tensor]:
    """Means of the squared gradient, written from `docs/math.md`, section 9."""
    if unit == "batch":
        every = [rows_of(model, [batch]) for batch in batches]
        rows = {n: torch.stack([one[n].mean(0) for one in every]) for n in every[0]}
        weights = [int(batch["attention_mask"].sum()) for batch in batches]
    else:
        rows = rows_of(model, batches, unit)
        weights = [1] * len(next(iter(rows.values())))
        if unit == "sequence" and weight == "tokens":
            weights = active_tokens(model, batches)
    w = torch.tensor(weights, dtype=torch.float64)
    return {name: (w[:, None] * r.square()).sum(0) / w.sum() for name, r in rows.items()}


def active_tokens(model: torch.nn.Module, batches: list[dict]) -> list[int]:
    """Of every sequence that has a label."""
    found = []
    for batch in batches:
        labelled = (reference.counting_labels(model, batch) != reference.IGNORE).any(1)
        found += batch["attention_mask"].sum(1)[labelled].tolist()
    return found


def in_slices(
    comm: Any, unit: str, name: str, batches: list[dict], dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[dict, dict]:  # fmt: skip
    """On a rank: of the rank's own batches, of which some have no label; as many on every rank."""
    collector = FisherCollector(unit, **options)
    collect_slices(collector, model_of(name, dtype), batches, "train", comm)
    return merge_over_ranks(collector, comm).state()


def in_shares(comm: Any, whole: list[dict], **arguments: Any) -> tuple[dict, dict]:
    """Every rank has its share of the sequences of whole batches."""
    return in_slices(comm, batches=Ranks(comm).own_parts(whole), **arguments)


@pytest.mark.parametrize(
    ("unit", "weight"),
    [("token", "tokens"), ("sequence", "tokens"), ("sequence", "one"), ("batch", "tokens")],
)
@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_batches(ranks, unit, weight, size):
    batches = whole_batches()
    arguments = {"unit": unit, "sequence_weight": weight}
    truth = moments_of(model_of("gpt2", torch.float64), batches, unit, weight)
    truth = {n: t for n, t in truth.items() if float(t.norm()) > 1e-25}
    for dtype, bound in DTYPES:
        alone = FisherCollector(**arguments)
        alone.collect(model_of("gpt2", dtype), batches, "train")
        tensors, plain = alone.state()
        tensors = {n: t for n, t in tensors.items() if n.split("/")[2] in truth}
        found = ranks.run(in_shares, size, whole=batches, name="gpt2", dtype=dtype, **arguments)
        for got, about in found:
            for key in ("n_updates", "token_total"):
                assert about["tasks"][0][key] == plain["tasks"][0][key]
            reference.assert_close(got, tensors, bound, f"{size} ranks, {unit}, one process:")
            if dtype == torch.float64:
                means = {n: got[f"0/mean/{n}"].flatten() for n in truth}
                reference.assert_close(means, truth, bound, f"{size} ranks, {unit}:")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("labels", [(40,), (40, 0), LABELS, (0, 6), (0, 6, 7)])
def test_uneven_labels(ranks, name, labels):
    """40, 0 and 7 labels, or a first rank with none: means from the explicit gradients."""
    size, batches = len(labels), batches_of(name, len(labels), labels)
    every, model = in_one(batches), model_of(name, torch.float64)
    truths = {unit: moments_of(model, every, unit) for unit in ("token", "sequence")}
    truths["batch"] = {n: g.square() for n, g in mean_gradient(model, every).items()}
    updates = {
        "token": sum(labels), "sequence": len(active_tokens(model, every)), "batch": 1
    }  # fmt: skip
    for unit, truth in truths.items():
        # A key's bias has a gradient of zero in exact arithmetic.
        truth = {n: t for n, t in truth.items() if float(t.norm()) > 1e-14}
        assert len(truth) >= len(truths["token"]) - 1
        for dtype, bound in DTYPES:
            arguments = {"unit": unit, "name": name, "dtype": dtype}
            for tensors, about in ranks.run(in_slices, size, batches, **arguments):
                assert about["tasks"][0]["n_updates"] == updates[unit]
                means = {n: tensors[f"0/mean/{n}"].flatten() for n in truth}
                reference.assert_close(means, truth, bound, f"{size} ranks, {unit}, {dtype}:")


def mean_gradient(model: torch.nn.Module, batches: list[dict]) -> dict[str, Tensor]:
    """Of the mean loss over all labels, by sums: LLaMA's norms round these in float32."""
    named, total, count = dict(model.named_parameters()), 0, 0
    for batch in batches:
        loss, labels = reference.summed_loss(model, logits_of(model, batch), batch)
        total, count = total + flat_gradient(loss, list(named.values())), count + labels
    parts = (total / count).split([p.numel() for p in named.values()])
    return dict(zip(named, parts, strict=True))


@pytest.mark.parametrize("unit", ["token", "batch"])
def test_no_label_on_any_rank(ranks, unit):
    batches = batches_of("gpt2", 2, (0, 0))
    for text in ranks.run(in_slices_refused, 2, batches, unit=unit, name="gpt2"):
        assert text == "BatchError: task train: no label of the batch counts"


def in_slices_refused(comm: Any, **arguments: Any) -> str:
    return said(lambda: in_slices(comm, **arguments))

"""Group Fisher of several ranks is that of one process that has seen all their data."""

from __future__ import annotations

import pytest
import torch

from tests import models, reference
from tests.distributed import group_fisher_on_ranks, kfac_on_ranks, spectra_on_ranks
from tests.distributed.rank_pool import Pool


def batches() -> list[list[dict]]:
    """Two batches on rank 0, one on rank 1, none on rank 2."""
    first = [models.language_batch((7, 5), seed=1), models.language_batch((9,), seed=2)]
    return [first, [models.language_batch((4, 6, 8), seed=3)], []]


@pytest.mark.parametrize("unit", ["token", "sequence", "batch"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_merged_states(ranks: Pool, unit: str, size: int) -> None:
    each = [{"batches": own} for own in batches()[:size]]
    found = ranks.run(group_fisher_on_ranks.on_a_rank, size, each=each, unit=unit, name="tiny")
    every = [batch for own in each for batch in own["batches"]]
    whole = group_fisher_on_ranks.FisherCollector(unit)
    model = kfac_on_ranks.model_of("tiny", kfac_on_ranks.torch.float64)
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
    for text in ranks.run(group_fisher_on_ranks.of_other_units, 2, each=each, name="tiny"):
        assert "unit" in text


def whole_batches() -> list[dict]:
    """Two batches; on three ranks the last one has no sequence of the second."""
    model = kfac_on_ranks.model_of("gpt2", torch.float64)
    first = models.language_batch((9, 7, 12, 5), seed=4)
    second = models.language_batch((6, 8), seed=5)
    return [
        kfac_on_ranks.with_labels(model, first, 20),
        kfac_on_ranks.with_labels(model, second, 3),
    ]


def moments_of(unit: str, weight: str) -> dict[str, torch.Tensor]:
    """Means of the squared gradient, written from `docs/math.md`, section 9."""
    model = kfac_on_ranks.model_of("gpt2", torch.float64).eval()
    batches = whole_batches()
    if unit == "batch":
        rows = [spectra_on_ranks.rows_of(model, [batch]) for batch in batches]
        squares = [{n: r.mean(0).square() for n, r in one.items()} for one in rows]
        weights = [int(batch["attention_mask"].sum()) for batch in batches]
    else:
        rows = spectra_on_ranks.rows_of(model, batches, unit)
        count = len(next(iter(rows.values())))
        squares = [{n: r[i].square() for n, r in rows.items()} for i in range(count)]
        weights = [1] * count
        if unit == "sequence" and weight == "tokens":
            labels = [reference.counting_labels(model, batch) for batch in batches]
            active = [batch["attention_mask"].sum(1) for batch in batches]
            has = [(one != reference.IGNORE).any(1) for one in labels]
            weights = torch.cat([a[h] for a, h in zip(active, has, strict=True)]).tolist()
    total = sum(weights)
    return {
        name: sum(w * one[name] for w, one in zip(weights, squares, strict=True)) / total
        for name in squares[0]
    }


@pytest.mark.parametrize(
    ("unit", "weight"),
    [("token", "tokens"), ("sequence", "tokens"), ("sequence", "one"), ("batch", "tokens")],
)
@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_batches(ranks: Pool, unit: str, weight: str, size: int) -> None:
    batches = whole_batches()
    arguments = {"unit": unit, "name": "gpt2", "batches": batches, "weight": weight}
    truth = moments_of(unit, weight)
    truth = {n: t for n, t in truth.items() if float(t.norm()) > 1e-25}
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        alone = group_fisher_on_ranks.FisherCollector(unit, sequence_weight=weight)
        alone.collect(kfac_on_ranks.model_of("gpt2", dtype), batches, "train")
        tensors, plain = alone.state()
        for got, about in ranks.run(
            group_fisher_on_ranks.in_shares, size, dtype=dtype, **arguments
        ):
            assert about["tasks"][0]["n_updates"] == plain["tasks"][0]["n_updates"]
            assert about["tasks"][0]["token_total"] == plain["tasks"][0]["token_total"]
            reference.assert_close(
                {n: t for n, t in got.items() if n.split("/")[2] in truth},
                {n: t for n, t in tensors.items() if n.split("/")[2] in truth},
                bound, f"{size} ranks, {unit}, one process:",
            )  # fmt: skip
            if dtype == torch.float64:
                means = {n: got[f"0/mean/{n}"].flatten() for n in truth}
                reference.assert_close(means, truth, bound, f"{size} ranks, {unit}:")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("labels", [(40,), (40, 0), kfac_on_ranks.LABELS, (0, 6), (0, 6, 7)])
def test_uneven_labels(ranks: Pool, name: str, labels: tuple[int, ...]) -> None:
    """40, 0 and 7 labels, or a first rank with none: means from the explicit gradients."""
    size = len(labels)
    batches = kfac_on_ranks.batches_of(name, size, labels)
    each = [{"batches": own} for own in batches]
    every = spectra_on_ranks.together(batches)
    model = kfac_on_ranks.model_of(name, torch.float64).eval()
    counting = [reference.counting_labels(model, batch) for batch in every]
    active = torch.cat([
        batch["attention_mask"].sum(1)[(counts != reference.IGNORE).any(1)]
        for batch, counts in zip(every, counting, strict=True)
    ])  # fmt: skip
    rows = {unit: spectra_on_ranks.rows_of(model, every, unit) for unit in ("token", "sequence")}
    truths = {
        "token": {n: r.square().mean(0) for n, r in rows["token"].items()},
        "sequence": {
            n: (active[:, None] * r.square()).sum(0) / active.sum()
            for n, r in rows["sequence"].items()
        },
        "batch": {n: g.square() for n, g in mean_gradient(model, every).items()},
    }
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = ranks.run(
            group_fisher_on_ranks.of_own_batches,
            size,
            each=each,
            units=list(truths),
            name=name,
            dtype=dtype,
        )
        for unit, truth in truths.items():
            # A key's bias has a gradient of zero in exact arithmetic.
            truth = {n: t for n, t in truth.items() if float(t.norm()) > 1e-14}
            assert len(truth) >= len(rows["token"]) - 1
            for answer in found:
                tensors, about = answer[unit]
                updates = {"token": len(rows["token"][next(iter(truth))]), "batch": 1}
                assert about["tasks"][0]["n_updates"] == updates.get(unit, len(active))
                means = {n: tensors[f"0/mean/{n}"].flatten() for n in truth}
                reference.assert_close(means, truth, bound, f"{size} ranks, {unit}, {dtype}:")


def mean_gradient(model: torch.nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Of the mean loss over all labels, by sums: LLaMA's norms round these in float32."""
    named, total, count = dict(model.named_parameters()), {}, 0
    for batch in batches:
        loss, labels = reference.summed_loss(model, spectra_on_ranks.forward(model, batch), batch)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        count += int(labels)
        for (name, p), g in zip(named.items(), grads, strict=True):
            g = torch.zeros_like(p) if g is None else g
            total[name] = total.get(name, 0) + g.flatten()
    return {name: g / count for name, g in total.items()}


@pytest.mark.parametrize("unit", ["token", "batch"])
def test_no_label_on_any_rank(ranks: Pool, unit: str) -> None:
    each = [{"batches": own} for own in kfac_on_ranks.batches_of("gpt2", 2, (0, 0))]
    for text in ranks.run(
        group_fisher_on_ranks.without_labels, 2, each=each, unit=unit, name="gpt2"
    ):
        assert text == "BatchError: task train: no label of the batch counts"

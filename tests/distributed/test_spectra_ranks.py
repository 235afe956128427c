"""Spectra, Lanczos and group Fisher of samples on 1, 2 and 3 ranks.

The ranks have 40, 0 and 7 labels. Truth: explicit matrices on the joined samples, and one process.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra import per_sample_gradients, spill
from fisher_lab.curvature.spectra.blocks import parameter_blocks
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.curvature.spectra.reference import (
    Rows,
    assert_values,
    hessian,
    matrix_of,
    reference_fisher,
    reference_spectrum,
    rows_of,
    true_fisher,
)
from tests.distributed.kfac_on_ranks import batches_of, in_one, model_of
from tests.distributed.rank_pool import Pool, said

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
NUMBERS = ("largest_eigenvalue", "effective_rank", "spectral_gap", "trace")


@dataclass(frozen=True)
class Job:
    """One spectrum, as plain data that can be sent to a rank.

    `products`: every linear layer without per-sample gradients; `tile`: bytes of a column tile.
    """

    structure: str = "layer"
    center: bool = False
    n_samples: int | None = None
    products: bool = False
    tile: int = 1 << 17
    config: dict[str, Any] = field(default_factory=dict)

    def run(self, comm: Any, model: nn.Module, batches: list[dict]) -> dict[str, Any]:
        config = SpectralConfig(**{"chunk_size": 8, **self.config})
        engine = FisherSpectral(config, communicator=comm)
        cheaper = patch.object(
            per_sample_gradients, "factored_is_cheaper", lambda *_: self.products
        )
        with cheaper, patch.object(spill, "TILE_BYTES", self.tile):
            return engine.compute_fisher_spectrum(
                model, batches, self.n_samples, self.structure, self.center
            )


def spectra(
    comm: Any, name: str, dtype: torch.dtype, jobs: list[Job], batches: list[dict]
) -> list[tuple[dict, dict]]:
    """On a rank: every job's result, and what was moved for it."""
    model = model_of(name, dtype)
    found = []
    for job in jobs:
        if not isinstance(comm, Alone):
            comm.reset()
        result = job.run(comm, model, batches)
        traffic = {} if isinstance(comm, Alone) else comm.traffic
        moved = {key: (t.calls, t.sent, t.received) for key, t in traffic.items()}
        found.append((result, moved))
    return found


def job(structure: str, mode: str, unit: str, center: bool, **more: Any) -> Job:
    config = {"storage_mode": mode, "sample_unit": unit, **more.pop("config", {})}
    return Job(structure, center, config=config, **more)


JOBS = [
    job("layer", "chunked", "token", False, config={"memory_budget_mb": 0}),
    job("layer", "chunked", "token", True, products=True),
    job("parameter", "streaming", "token", True, products=True),
    job("parameter", "full", "token", False),
    job("full", "full", "sequence", True),
    job("module", "streaming", "sequence", False, products=True),
]
"""Every storage mode, blocks larger and smaller than `N`, with products and without."""


def answers_of(ranks: Pool, size: int, batches: list[list[dict]], **arguments: Any) -> Any:
    """By job: every rank's result and traffic; `arguments`: of `spectra`."""
    found = ranks.run(spectra, size, batches, **arguments)
    return [list(of_job) for of_job in zip(*found, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_spectra_are_those_of_the_joined_samples(ranks, name, size):
    batches = batches_of(name, size)
    model, every = model_of(name, torch.float64), in_one(batches)
    by_unit = {unit: rows_of(model, every, unit) for unit in ("token", "sequence")}
    methods = set()
    found = answers_of(ranks, size, batches, dtype=torch.float64, jobs=JOBS, name=name)
    for one, answers in zip(JOBS, found, strict=True):
        (first, _), *others = answers
        assert all(other == first for other, _ in others)
        rows = by_unit[one.config["sample_unit"]]
        methods |= check_blocks(one, first, rows, parameter_blocks(model, one.structure))
        counts = first["metadata"]["samples_by_rank"]
        assert sum(counts) == len(next(iter(rows.values())))
        assert len(counts) == size
        assert size < 3 or counts[1] == 0
    assert methods >= {"gram", "gram+factored", "full", "covariance"}


def check_blocks(one: Job, result: dict, rows: Rows, blocks: dict[str, list[str]]) -> set[str]:
    """Every block of a result against the explicit matrix; returns the methods in use."""
    every = []
    noise = 1e-20 * float(matrix_of(rows, list(rows)).square().mean(0).sum())
    for block, names in blocks.items():
        matrix = matrix_of(rows, names, one.center)
        trace = float(matrix.square().mean(0).sum())
        if trace < noise:
            continue  # a key's bias: zero but for rounding
        record = result["per_block"][block]
        truth = reference_spectrum(rows, names, center=one.center)
        wanted = truth[: min(matrix.shape)]
        assert_values(record["eigenvalues"], wanted, 1e-10, f"{one} {block}")
        assert record["trace"] == pytest.approx(trace, rel=1e-10)
        every.append(truth)
    top = float(torch.cat(every).max())
    assert result["global"]["largest_eigenvalue"] == pytest.approx(top, rel=1e-10)
    return {record["method"] for record in result["per_block"].values()}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_float32_spectra_are_those_of_one_process(ranks, name, size):
    batches = batches_of(name, size)
    every = in_one(batches)
    alone = spectra(Alone(), name, torch.float32, JOBS, every)
    every_answer = answers_of(ranks, size, batches, dtype=torch.float32, jobs=JOBS, name=name)
    for (one, _), answers in zip(alone, every_answer, strict=True):
        # A key's bias has a gradient of zero in exact arithmetic.
        noise = 1e-10 * one["global"]["trace"]
        for found, _ in answers:
            assert found["global"]["n_blocks"] >= 1
            for key in NUMBERS:
                assert found["global"][key] == pytest.approx(one["global"][key], rel=1e-5), key
            assert found["metadata"]["factored_weights"] == one["metadata"]["factored_weights"]
            for block, record in one["per_block"].items():
                other = found["per_block"][block]
                assert other["method"] == record["method"]
                if record["status"] == "ok" and record["trace"] > noise:
                    assert_values(other["eigenvalues"], record["eigenvalues"], 1e-5, block)


def repeated(batches: list[list[dict]]) -> list[list[dict]]:
    """Rank 2 has rank 0's sequences once more: which of them is chosen must not depend on it."""
    return [batches[0], batches[1], batches[0] + batches[2]]


def test_a_subsample_is_that_of_one_process(ranks):
    batches = repeated(batches_of("gpt2", 3))
    jobs = [
        Job("layer", n_samples=n, config={"sample_unit": unit, "seed": seed})
        for n, unit, seed in (
            (9, "token", 3),
            (50, "token", 3),
            (2, "sequence", 0),
            (1, "token", 5),
        )
    ]
    alone = spectra(Alone(), "gpt2", torch.float64, jobs, in_one(batches))
    # One process may see the joined batches in another order.
    other = [batches[2][1], *batches[1], *batches[0], batches[2][0]]
    turned = spectra(Alone(), "gpt2", torch.float64, jobs, other)
    found = answers_of(ranks, 3, batches, dtype=torch.float64, jobs=jobs, name="gpt2")
    for job, (one, _), (two, _), answers in zip(jobs, alone, turned, found, strict=True):
        for result in (two, *(answer for answer, _ in answers)):
            for key in ("n_samples", "n_candidates", "data_hash", "subsample_hash"):
                assert result["metadata"][key] == one["metadata"][key], key
            assert result["metadata"]["n_samples"] == job.n_samples
            for block, record in one["per_block"].items():
                if record["status"] == "ok" and record["trace"] > 1e-20:
                    got = result["per_block"][block]["eigenvalues"]
                    assert_values(got, record["eigenvalues"], 1e-10, block)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_gets_its_columns_of_the_others_rows(ranks, size):
    """Bytes of every rank as `docs/distributed.md` has them, and nobody gets all gradients."""
    batches = batches_of("gpt2", size, (12, 5, 9))
    jobs = [Job("full", config={"storage_mode": mode}) for mode in ("chunked", "full")]
    parameters = sum(p.numel() for p in model_of("gpt2", torch.float64).parameters())
    for answers in answers_of(ranks, size, batches, dtype=torch.float64, jobs=jobs, name="gpt2"):
        counts = answers[0][0]["metadata"]["samples_by_rank"]
        n = sum(counts)
        assert counts == [12, 5, 9][:size]
        for rank, (_, moved) in enumerate(answers):
            _, sent, received = moved["exchange"]
            # A tile whose columns do not divide by the ranks gives some of them one more.
            assert sent == pytest.approx(
                counts[rank] * parameters * 8 * (size - 1) / size, rel=0.02
            )
            assert received == pytest.approx((n - counts[rank]) * parameters * 8 / size, rel=0.02)
            assert moved["all_reduce"][1] == 2 * (size - 1) * n * n * 8 // size


def counted_decompositions(comm: Any, name: str, batches: list[dict]) -> int:
    """How many blocks this rank has decomposed."""
    calls = []
    solve = torch.linalg.eigvalsh

    def counting(matrix: Tensor) -> Tensor:
        calls.append(len(matrix))
        return solve(matrix)

    with patch("torch.linalg.eigvalsh", counting):
        Job().run(comm, model_of(name, torch.float64), batches)
    return len(calls)


def test_blocks_are_decomposed_by_all_ranks(ranks):
    batches = batches_of("gpt2", 3)
    found = ranks.run(counted_decompositions, 3, batches, name="gpt2")
    blocks = len(parameter_blocks(model_of("gpt2", torch.float64), "layer"))
    assert sum(found) == blocks
    assert max(found) == math.ceil(blocks / 3)


def refused(comm: Any, kind: str, name: str, batches: list[dict]) -> str:
    """What this rank says when rank 1 has something wrong."""
    model = model_of(name, torch.float64)
    config: dict[str, Any] = {}
    if kind == "sketch":
        config = {"storage_mode": "sketch"}
    if kind == "choices" and comm.rank == 1:
        config = {"chunk_size": 5}
    if kind == "labels" and comm.rank == 1:
        batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    cache = object() if kind == "cache" else None
    loss: Any = None
    if comm.rank == 1 and kind in ("loss", "no loss"):
        loss = FailingLoss(True) if kind == "loss" else len

    def compute() -> None:
        engine = FisherSpectral(SpectralConfig(**config), cache, loss_fn=loss, communicator=comm)
        engine.compute_fisher_spectrum(model, batches)

    return said(compute)


class FailingLoss(CrossEntropy):
    """A loss that gives up in the forward pass of the first sequence."""

    def score(self, outputs: Any, batch: Any) -> Any:
        raise ValueError("the loss gave up")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("labels", "no 'labels' in it"),
        ("loss", "the loss gave up"),
        ("no loss", "gives no logits"),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(ranks, kind, text):
    batches = batches_of("gpt2", 3, (40, 6, 7))
    found = ranks.run(refused, 3, batches, kind=kind, name="gpt2")
    assert text in found[1]
    for rank in (0, 2):
        assert found[rank].startswith("RankError: rank 1: ")
        assert text in found[rank]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sketch", "storage_mode on several ranks: 'sketch'; allowed: full, chunked, streaming"),
        ("cache", "gradient_cache: given; allowed on several ranks: None"),
        ("choices", "rank 1 has "),
    ],
)
def test_what_ranks_do_not_have_is_refused_on_all(ranks, kind, text):
    batches = batches_of("gpt2", 2)
    for answer in ranks.run(refused, 2, batches, kind=kind, name="gpt2"):
        assert text in answer


def test_no_label_on_any_rank_is_degenerate(ranks):
    batches = batches_of("gpt2", 2, (0, 0))
    ((*answers,),) = answers_of(ranks, 2, batches, dtype=torch.float64, jobs=[Job()], name="gpt2")
    for result, _ in answers:
        assert result["global"]["status"] == "degenerate"
        assert result["metadata"]["n_samples"] == 0


def pairs(
    comm: Any, name: str, options: list[dict], batches: list[dict], block: str
) -> list[dict[str, Any]]:
    """On a rank: the top eigenpairs of a block, for each choice of options."""
    model = model_of(name, torch.float64)
    return [
        FisherLanczos(k=4, tol=1e-11, **chosen, communicator=comm).top_eigenpairs(
            model, batches, block, eigenvectors=True
        )
        for chosen in options
    ]


def everything(
    comm: Any, name: str, dtype: torch.dtype, tol: float, batches: list[dict]
) -> dict[str, Any]:
    """On a rank: everything else that `FisherLanczos` has to give, of the whole model."""
    model = model_of(name, dtype)
    engine = FisherLanczos(k=2, tol=tol, communicator=comm)
    steps: dict[str, Any] = {"n_probes": 2, "steps": 5}
    result = engine.analyze(model, batches, lam=1e-3, **steps)
    result["slq"] = vars(engine.trace(model, batches, method="slq", n_products=2))
    result["hutch"] = vars(engine.trace(model, batches, n_products=6))
    result["dimension"] = vars(engine.effective_dimension(model, batches, 1e-3, **steps))
    result["alone"] = engine.spectral_density(model, batches, **steps)
    return result


BLOCK = "transformer.h.0.ln_1"
FEW = (12, 0, 5)
OPTIONS: list[dict[str, Any]] = [
    {"operator": "empirical"},
    {"operator": "empirical", "products": "forward"},
    {"operator": "true"},
    {"operator": "hessian", "which": "magnitude"},
]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_lanczos_finds_the_eigenvalues_of_the_explicit_matrix(ranks, size):
    batches = batches_of("gpt2", size, FEW)
    arguments = {"name": "gpt2", "options": OPTIONS, "block": BLOCK}
    found = ranks.run(pairs, size, batches, **arguments)
    model, every = model_of("gpt2", torch.float64), in_one(batches)
    names = [f"{BLOCK}.weight", f"{BLOCK}.bias"]
    empirical = reference_fisher(rows_of(model, every), names)
    true, second = (matrix(model, every, f"{BLOCK}.") for matrix in (true_fisher, hessian))
    truths = [empirical, empirical, true, second]
    for answers in found:
        for option, truth, answer in zip(OPTIONS, truths, answers, strict=True):
            values = torch.linalg.eigvalsh(truth)
            values = values[values.abs().argsort(descending=True)][:4]
            scale = float(values[0].abs())
            top = torch.tensor(answer["eigenvalues"], dtype=torch.float64)
            assert float((top - values).abs().max()) <= 1e-10 * scale, option
            assert answer["n_samples"] == sum(FEW[:size])
            assert all(answer["converged"])
            vectors = torch.cat([v.flatten(1) for v in answer["eigenvectors"].values()], dim=1)
            off = vectors @ truth - top[:, None] * vectors
            assert float(off.norm(dim=1).max()) <= 1e-9 * scale


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("gpt2", 3, torch.float64),
        ("gpt2", 2, torch.float32),
        ("llama", 2, torch.float64),
        ("llama", 3, torch.float32),
    ],
)
def test_lanczos_gives_what_one_process_does(ranks, name, size, dtype):
    batches = batches_of(name, size, FEW)
    common = {"name": name, "dtype": dtype, "tol": 1e-9 if dtype == torch.float64 else 1e-4}
    found = ranks.run(everything, size, batches, **common)
    one = everything(Alone(), batches=in_one(batches), **common)
    bound = BOUNDS[dtype]
    for answer in found:
        assert answer == found[0]
        assert answer["top"]["eigenvalues"] == pytest.approx(one["top"]["eigenvalues"], rel=bound)
        assert answer["top"]["n_samples"] == one["top"]["n_samples"]
        for key in ("trace", "effective_dimension", "slq", "hutch", "dimension"):
            assert answer[key]["value"] == pytest.approx(one[key]["value"], rel=bound), key
            assert answer[key]["n_probes"] == one[key]["n_probes"]
        top = max(map(max, one["alone"]["nodes"]))
        assert max(map(max, answer["alone"]["nodes"])) == pytest.approx(top, rel=bound)


def products_that_fail(comm: Any, kind: str, name: str, batches: list[dict]) -> str:
    """An error of rank `kind` in the middle of Lanczos, or of no rank in particular."""
    model = model_of(name, torch.float64)
    engine = FisherLanczos(k=2, communicator=comm)
    failing: Any = nullcontext()
    if kind == "nan" and comm.rank == 1:
        with torch.no_grad():
            next(model.parameters())[5] = torch.nan
    elif kind == f"rank {comm.rank}":
        step = "fisher_lab.curvature.spectra.operators._Part.product"
        failing = patch(step, side_effect=ValueError("a product failed"))
    elif kind == "basis":
        failing = patch("fisher_lab.curvature.spectra.matrix_free.free_memory", lambda device: 0)
    with failing:
        text = said(lambda: engine.top_eigenpairs(model, batches))
    if text == "nothing":  # the ranks are still in step
        text += f", {sum(comm.all_gather_objects(1))}"
    return text


@pytest.mark.parametrize("kind", ["rank 0", "rank 2"])
def test_a_product_that_fails_on_one_rank_is_an_error_on_all(ranks, kind):
    batches = batches_of("gpt2", 3)
    found = ranks.run(products_that_fail, 3, batches, kind=kind, name="gpt2")
    for rank, answer in enumerate(found):
        own = kind == f"rank {rank}"
        expected = "ValueError: a product failed" if own else f"RankError: {kind}: ValueError"
        assert answer.startswith(expected)


def test_an_error_of_rank_0_is_raised_on_all(ranks):
    batches = batches_of("gpt2", 3, (9, 6, 7))

    def answers(kind: str) -> list[str]:
        return ranks.run(products_that_fail, 3, batches, kind=kind, name="gpt2")

    for kind, text in (("nan", "holds NaN"), ("basis", "max_vectors: ")):
        first, *others = answers(kind)
        assert text in first
        for answer in others:
            assert answer.startswith("RankError: rank 0: ")
            assert text in answer
    assert answers("no") == ["nothing, 3"] * 3

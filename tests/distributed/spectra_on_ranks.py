"""What the ranks do in `test_spectra_ranks.py`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra import per_sample_gradients, spill
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests import reference
from tests.distributed.kfac_on_ranks import model_of, wrapped
from tests.distributed.rank_pool import said


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


# ---- Lanczos -------------------------------------------------------------------------------------


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
    steps = {"n_probes": 2, "steps": 5}
    result = engine.analyze(model, batches, lam=1e-3, **steps)
    result["slq"] = vars(engine.trace(model, batches, method="slq", n_products=2))
    result["hutch"] = vars(engine.trace(model, batches, n_products=6))
    result["dimension"] = vars(engine.effective_dimension(model, batches, 1e-3, **steps))
    result["alone"] = engine.spectral_density(model, batches, **steps)
    return result


# ---- wrappers ------------------------------------------------------------------------------------


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
        reference.summed_loss(
            getattr(model, "module", model),
            model(**{k: v for k, v in batch.items() if k != "labels"}).logits,
            batch,
        )[0].backward()
        if any(p.grad is None or type(p.grad) is not type(p.data) for p in model.parameters()):
            raise AssertionError("a backward pass left no gradient like its parameter")
    return result


# ---- errors --------------------------------------------------------------------------------------


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
    loss = None
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
        failing = patch("fisher_lab.curvature.spectra.krylov.free_memory", lambda device: 0)
    with failing:
        text = said(lambda: engine.top_eigenpairs(model, batches))
    if text == "nothing":  # the ranks are still in step
        text += f", {sum(comm.all_gather_objects(1))}"
    return text


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

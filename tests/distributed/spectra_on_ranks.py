"""What the ranks do in `test_spectra_ranks.py`, and the dense truth on their joined samples.

The truth is written from `docs/math.md`, section 8: one backward pass a sample, the explicit `J`,
singular values of `J / sqrt(N)`. Nothing of the engines is used for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra import per_sample_gradients, spill
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests import reference
from tests.distributed import kfac_on_ranks

Rows = dict[str, Tensor]


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
    model = kfac_on_ranks.model_of(name, dtype)
    found = []
    for job in jobs:
        if not isinstance(comm, Alone):
            comm.reset()
        result = job.run(comm, model, batches)
        traffic = {} if isinstance(comm, Alone) else comm.traffic
        moved = {key: (t.calls, t.sent, t.received) for key, t in traffic.items()}
        found.append((result, moved))
    return found


def together(batches: list[list[dict]]) -> list[dict]:
    """The joined batches: those of rank 0, then those of rank 1, and so on."""
    return [batch for own in batches for batch in own]


# ---- the truth -----------------------------------------------------------------------------------


def rows_of(model: nn.Module, batches: list[dict], unit: str = "token") -> Rows:
    """The rows of `J` by parameter, `[N, numel]`."""
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for batch in batches:
        labels = reference.counting_labels(model, batch)
        logits = forward(model, batch)
        places = (labels != reference.IGNORE).nonzero().tolist()
        losses = [-torch.log_softmax(logits[b, t], -1)[labels[b, t]] for b, t in places]
        if unit == "sequence":
            by_row = sorted({b for b, _ in places})
            pairs = list(zip(places, losses, strict=True))
            losses = [torch.stack([x for (b, _), x in pairs if b == row]).sum() for row in by_row]
        for loss in losses:
            grads = torch.autograd.grad(
                loss, list(named.values()), retain_graph=True, allow_unused=True
            )
            for (name, p), grad in zip(named.items(), grads, strict=True):
                rows[name].append((torch.zeros_like(p) if grad is None else grad).flatten())
    return {name: torch.stack(parts).double() for name, parts in rows.items()}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def matrix_of(rows: Rows, names: list[str], center: bool = False) -> Tensor:
    """`J` of a block, less its mean row if asked for."""
    matrix = torch.cat([rows[name] for name in names], dim=1)
    return matrix - matrix.mean(0) if center else matrix


def eigenvalues(rows: Rows, names: list[str], center: bool = False) -> Tensor:
    matrix = matrix_of(rows, names, center)
    return torch.linalg.svdvals(matrix / math.sqrt(len(matrix))).square()


def true_fisher(model: nn.Module, batches: list[dict], names: list[str]) -> Tensor:
    """`(1/N) sum_n sum_y p_n(y) g g^T`, `g` the gradient of `log p_n(y)`."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    rows, n = [], 0
    for batch in batches:
        labels = reference.counting_labels(model, batch)
        logits = forward(model, batch)
        for b, t in (labels != reference.IGNORE).nonzero().tolist():
            n += 1
            logp = torch.log_softmax(logits[b, t], -1)
            for y in range(len(logp)):
                grads = torch.autograd.grad(logp[y], parameters, retain_graph=True)
                weight = float(logp[y].detach().exp()) ** 0.5
                rows.append(torch.cat([g.flatten() for g in grads]) * weight)
    stacked = torch.stack(rows)
    return stacked.T @ stacked / n


def hessian(model: nn.Module, batches: list[dict], names: list[str]) -> Tensor:
    """Second derivative of the mean loss over all labels, a row at a time."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    total, n = torch.zeros(()).double(), 0
    for batch in batches:
        loss, labels = reference.summed_loss(model, forward(model, batch), batch)
        total, n = total + loss, n + int(labels)
    first = torch.autograd.grad(total / n, parameters, create_graph=True)
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True)
        for entry in torch.cat([g.flatten() for g in first])
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def assert_values(found: list[float], truth: Tensor, bound: float, what: str = "") -> None:
    """Every eigenvalue within `bound` of the largest; relatively those above 1e-4 of it.

    A float64 product fixes an eigenvalue to 1e-16 of the largest one, and no better.
    """
    values = torch.tensor(found, dtype=torch.float64)
    if len(values) != len(truth):
        raise AssertionError(f"{what}: {len(values)} eigenvalues, wanted {len(truth)}")
    off = (values - truth).abs()
    worst = float((off / float(truth[0])).max())
    large = truth > 1e-4 * float(truth[0])
    relative = float((off[large] / truth[large]).max())
    if not (worst <= bound and relative <= bound):
        raise AssertionError(f"{what}: off by {worst:.1e} of the largest, {relative:.1e} relative")


# ---- Lanczos -------------------------------------------------------------------------------------


def pairs(
    comm: Any, name: str, options: list[dict], batches: list[dict], block: str
) -> list[dict[str, Any]]:
    """On a rank: the top eigenpairs of a block, for each choice of options."""
    model = kfac_on_ranks.model_of(name, torch.float64)
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
    model = kfac_on_ranks.model_of(name, dtype)
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
    model = kfac_on_ranks.model_of(name, dtype)
    model = model if kind is None else kfac_on_ranks.wrapped(comm, model, kind)
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
    model = kfac_on_ranks.model_of(name, torch.float64)
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
    try:
        engine = FisherSpectral(SpectralConfig(**config), cache, loss_fn=loss, communicator=comm)
        engine.compute_fisher_spectrum(model, batches)
    except (CurvatureError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class FailingLoss(CrossEntropy):
    """A loss that gives up in the forward pass of the first sequence."""

    def score(self, outputs: Any, batch: Any) -> Any:
        raise ValueError("the loss gave up")


def products_that_fail(comm: Any, kind: str, name: str, batches: list[dict]) -> str:
    """An error of rank `kind` in the middle of Lanczos, or of no rank in particular."""
    model = kfac_on_ranks.model_of(name, torch.float64)
    engine = FisherLanczos(k=2, communicator=comm)
    step = "fisher_lab.curvature.spectra.operators._Part.product"
    if kind == "nan" and comm.rank == 1:
        with torch.no_grad():
            next(model.parameters())[5] = torch.nan
    try:
        if kind == f"rank {comm.rank}":
            with patch(step, side_effect=ValueError("a product failed")):
                engine.top_eigenpairs(model, batches)
        elif kind == "basis":
            with patch("fisher_lab.curvature.spectra.lanczos.free_memory", lambda device: 0):
                engine.top_eigenpairs(model, batches)
        else:
            engine.top_eigenpairs(model, batches)
    except (CurvatureError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    # The ranks are still in step.
    return f"nothing, {sum(comm.all_gather_objects(1))}"


def counted_decompositions(comm: Any, name: str, batches: list[dict]) -> int:
    """How many blocks this rank has decomposed."""
    calls = []
    solve = torch.linalg.eigvalsh

    def counting(matrix: Tensor) -> Tensor:
        calls.append(len(matrix))
        return solve(matrix)

    with patch("torch.linalg.eigvalsh", counting):
        Job().run(comm, kfac_on_ranks.model_of(name, torch.float64), batches)
    return len(calls)

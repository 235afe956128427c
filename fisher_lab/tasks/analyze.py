"""``task=analyze``: K-FAC factors of a model, its natural gradient, and what both are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fisher_lab.analysis import summed_loss
from fisher_lab.config.schema import Config
from fisher_lab.curvature import losses
from fisher_lab.curvature.kfac.collect import compare_gradients
from fisher_lab.curvature.kfac.ekfac import Eigenbasis
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.factors import FactorReport
from fisher_lab.curvature.kfac.inverses import LayerReport
from fisher_lab.curvature.kfac.refresh import Coverage
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs.record import Run
from fisher_lab.tasks import steps
from fisher_lab.tasks.damping_scan import run_scan
from fisher_lab.tasks.memory import PeakMemory
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.spectra import refuse, run_engines
from fisher_lab.workload.build import Workload, build

LAYERS_FILE = "layers.csv"
UNCOVERED_FILE = "uncovered.csv"
RANKS_FILE = "ranks.csv"
FACTORS_FILE = "factors.safetensors"

SIDE_COLUMNS = (
    "damping", "dim", "kappa_before", "kappa", "clipped", "clipped_frac", "route", "jitter", "eps",
    "fallback", "floor_applied",
)  # fmt: skip
"""Columns of ``layers.csv`` that both factors of a layer have."""

PAIR_COLUMNS = ("clipped", "clipped_frac", "kappa_before", "kappa")
"""Those of EKFAC's pairs of eigenvectors."""


def run(config: Config, run: Run) -> None:
    """Analyse a model: loss, K-FAC, the natural gradient and the step that it gives.

    On several ranks each takes its sequences of every batch, and the numbers are those of all of
    them; with ``kfac.reduce=none`` those of K-FAC are rank 0's own.

    Args:
        config: the validated configuration.
        run: the run's record; gets ``metrics.json``, ``layers.csv``, ``step_curve.csv`` with its
            figure, where parameters are left out ``uncovered.csv``, with ranks ``ranks.csv`` and,
            where ``kfac.save_factors`` asks for them, ``factors.safetensors``.

    Raises:
        ConfigError: text or model cannot be had as configured.
        fisher_lab.curvature.errors.CurvatureError: the factors cannot be formed or applied.
    """
    progress = Progress(config.progress)
    ranks = Ranks.of(config)
    refuse(config, ranks)
    workload = build(config, progress.track, run.signals)
    run.note(workbench=workload.record)
    parts = ranks.own_parts(workload.batches("train", config.kfac.n_batches, config.seed))
    batches = [own for own in parts if own is not None]
    heldout = steps.heldout_parts(config, workload, ranks)
    engine = KFACNaturalGradient(
        config.kfac, seed=config.seed, track_diagonal=False, progress=progress.track
    )
    engine.layers_of(workload.model)  # what does not go with the model is said before the work
    _record_loss(workload, batches, run, ranks)
    plain = _time_plain_pass(workload, batches, run, keep=config.kfac.verify)
    gradient, natural = _precondition(engine, workload, batches, run, ranks)
    if config.kfac.verify:
        _verify(gradient, plain, workload, ranks)
    del plain
    reports = engine.reports()
    residuals = engine.residuals(gradient, natural, workload.model)
    run.table(LAYERS_FILE, [layer_row(r, residuals) for r in reports])
    run.metrics({"kfac/residual_max": max(residuals.values(), default=math.nan)})
    record_uncovered(engine.coverage, run)
    run.metrics(layer_metrics(reports))
    run.metrics(curvature_metrics(engine))
    run.note(kfac=_about(engine))
    if config.kfac.save_factors:
        engine.save(run.directory / FACTORS_FILE, workload.model)
    metrics = gradient_metrics(gradient, natural)
    metrics["ng/eta"] = eta = steps.eta_of(metrics["ng/decrement"])
    run.metrics(metrics)
    if config.task.heldout_batches:
        directions = steps.directions_of(engine, gradient, natural, workload)
        steps.run_steps(workload, directions, parts, heldout, eta, run, progress, ranks)
    if config.task.damping_scan:
        names, multiples = list(natural), config.task.damping_scan
        run_scan(engine, workload, names, multiples, heldout, run, progress, ranks)
    run_engines(config, workload, run, progress, ranks)


# ---- loss and time -------------------------------------------------------------------------------


def mean_loss(workload: Workload, batches: Iterable[Any], ranks: Ranks | None = None) -> float:
    """Returns the mean loss over all labels, in nats; with ``ranks`` over theirs, collective."""
    total, count = summed_loss(workload.model, batches, workload.loss_fn)
    if ranks is not None:
        total, count = ranks.total(total, count)
    return total / max(count, 1)


def _record_loss(workload: Workload, batches: list[Any], run: Run, ranks: Ranks) -> None:
    about = workload.record.get("model", {})
    run.metrics({"loss": mean_loss(workload, batches, ranks)})
    # With a part drawn at random it is not the checkpoint's.
    heldout = "heldout_drawn" if about.get("drawn") else "heldout"
    for name, key in ((heldout, "heldout_loss"), ("baseline", "baseline_loss")):
        if about.get(key) is not None:
            run.metrics({f"loss/{name}": about[key]})


Sums = tuple[dict[str, Tensor], int]
"""Gradient of the summed loss of this rank's batches by parameter, and their labels."""


def _time_plain_pass(workload: Workload, batches: list[Any], run: Run, *, keep: bool) -> Sums:
    """A plain forward and backward pass over the same batches, after one over the first.

    Returns what it found, or nothing unless ``keep``.
    """
    seconds = 0.0
    found: Sums = {}, 0
    for some in (batches[:1], batches):
        _wait(workload)
        start = perf_counter()
        labels = _plain_pass(workload, some)
        _wait(workload)
        seconds = perf_counter() - start
        if keep:
            named = workload.model.named_parameters()
            found = {n: p.grad for n, p in named if p.grad is not None}, labels
        workload.model.zero_grad(set_to_none=True)
    run.metrics({"kfac/forward_backward_s": seconds})
    return found


def _plain_pass(workload: Workload, batches: list[Any]) -> int:
    """Fills ``.grad`` with the gradient of the summed loss; returns its labels."""
    labels = 0
    for batch in batches:
        prepared = losses.prepare(workload.model, batch, workload.loss_fn)
        summed = losses.compute_loss(workload.model, prepared, workload.loss_fn)
        summed.loss.backward()
        labels += summed.n_labels
    return labels


def _verify(gradient: Mapping[str, Tensor], sums: Sums, workload: Workload, ranks: Ranks) -> None:
    """Compares the gradient that the layers' tokens give with autograd's; collective.

    Args:
        gradient: of the mean loss, from the factors' tokens.
        sums: of the plain pass.
        workload: of both.
        ranks: those of the run.

    Raises:
        LayerError: they differ beyond rounding; on all ranks whose tokens are reduced together.
    """
    (labels,) = ranks.total(sums[1])
    named = dict(workload.model.named_parameters())
    plain: dict[str, Tensor] = {}
    for name in gradient:
        grad = sums[0].get(name)
        if ranks.reduced.size > 1:
            grad = ranks.reduced.all_reduce(torch.zeros_like(named[name]) if grad is None else grad)
        if grad is not None:
            plain[name] = grad / max(labels, 1)
    compare_gradients(gradient, plain)


def _wait(workload: Workload) -> None:
    if workload.device.type == "cuda":
        torch.cuda.synchronize(workload.device)


# ---- K-FAC ---------------------------------------------------------------------------------------


def _precondition(
    engine: KFACNaturalGradient, workload: Workload, batches: list[Any], run: Run, ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collects, factors and applies, timed apart; returns gradient and natural gradient.

    Both are over the covered parameters alone: uncovered ones come back unchanged and would
    swamp them (``docs/math.md``, section 1).
    """
    marks = []

    def mark() -> None:
        _wait(workload)
        marks.append(perf_counter())

    ranks.reset_traffic()
    with PeakMemory(workload.device) as memory:
        mark()
        engine.collect_kfac_factors(
            workload.model, batches, loss=workload.loss_fn, keep_gradient=True
        )
        mark()
        engine.prepare_inverses()
        mark()
        natural = engine.compute_natural_gradient(None, workload.model)
        mark()
    collect, factor, apply = (b - a for a, b in pairwise(marks))
    run.metrics(
        {
            "tokens": max(f.tokens for f in engine.kfac_factors.values()),
            "labels": max(f.n_labels for f in engine.kfac_factors.values()),
            "kfac/coverage": engine.coverage.share,
            "kfac/coverage_of_reached": engine.coverage.share_of_reached,
            "kfac/collect_s": collect,
            "kfac/factor_s": factor,
            "kfac/apply_s": apply,
            "kfac/total_s": collect + factor + apply,
        }
    )
    own = engine.last.rank_counts[ranks.reduced.rank]
    rows, metrics = ranks.report(own["tokens"], own["labels"], memory.growth_mib)
    run.metrics(metrics)
    if len(rows) > 1:
        run.table(RANKS_FILE, rows)
    gradient = engine.own_gradients(workload.model)
    covered = [name for name in gradient if name not in engine.uncovered]
    return {n: gradient[n] for n in covered}, {n: natural[n] for n in covered}


def gradient_metrics(
    gradient: Mapping[str, Tensor], natural: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns the norms of both, their cosine, and the decrement ``<dW, natural gradient>``."""

    def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
        return sum(float((left[n].double() * right[n].double()).sum()) for n in left)

    grad_norm = math.sqrt(inner(gradient, gradient))
    norm = math.sqrt(inner(natural, natural))
    decrement = inner(gradient, natural)
    scale = grad_norm * norm
    return {
        "grad/norm": grad_norm,
        "ng/norm": norm,
        "ng/decrement": decrement,
        "ng/cosine": decrement / scale if scale > 0 else math.nan,
    }


def layer_row(report: LayerReport, residuals: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Returns a row of ``layers.csv``; what a layer does not have is None.

    Args:
        report: of the layer.
        residuals: of the layers' natural gradients, by name.
    """
    f, layer = report.factors, report.factors.layer
    row: dict[str, Any] = {
        "name": layer.name,
        "type": str(layer.kind),
        "in": layer.n_in,
        "out": layer.n_out,
        "tokens": f.tokens,
        "method": f.method,
        "fisher": f.fisher,
        "sharing": f.sharing,
        "bias_augmented": layer.augmented,
        "tied": layer.tied,
        "columns": f["columns"],
        "reduction": f["reduction"],
        "discarded": f["discarded"],
    }
    for side, found in (("A", report.A), ("G", report.G)):
        for name, value in _columns(SIDE_COLUMNS, found).items():
            row[f"kappa_{side}_before" if name == "kappa_before" else f"{name}_{side}"] = value
    row["kappa_max"] = report.kappa_max
    row |= {f"ekfac_{k}": value for k, value in _columns(PAIR_COLUMNS, report.pairs).items()}
    dtype, device = f.stored()
    row |= {"storage_dtype": dtype, "storage_device": device, "storage_error": f.storage_error}
    row |= {"bytes": f.nbytes(), "seconds": report.seconds}
    return row | {"parameters": layer.n_parameters, "residual": (residuals or {}).get(layer.name)}


def record_uncovered(coverage: Coverage, run: Run) -> None:
    """Writes ``uncovered.csv``: a row for each parameter that no layer covers, or not as a whole.

    Args:
        coverage: of the layers.
        run: gets the file, where there is such a parameter.
    """
    rows = [
        {"name": name, "parameters": count, "reason": reason}
        for name, (count, reason) in coverage.by_parameter.items()
    ]
    if rows:
        run.table(UNCOVERED_FILE, rows)


def _columns(names: Iterable[str], report: FactorReport | Eigenbasis | None) -> dict[str, Any]:
    if report is None:
        return dict.fromkeys(names)
    fraction = report.clipped / max(report.dim, 1)
    derived = {"kappa": report.kappa_after, "clipped_frac": fraction}
    return {name: derived[name] if name in derived else getattr(report, name) for name in names}


def layer_metrics(reports: Sequence[LayerReport]) -> dict[str, float]:
    """Returns what the layers sum up to: methods, clipped shares, condition numbers, events."""
    metrics: dict[str, float] = {}
    methods = [r.factors.method for r in reports]
    for method in ("woodbury", "eig", "norm", "true_head"):
        metrics[f"kfac/{method}_layers"] = methods.count(method)
    if "channels" in methods:  # depthwise convolutions
        metrics["kfac/channels_layers"] = methods.count("channels")
    sides = {"A": [r.A for r in reports if r.A is not None], "G": [r.G for r in reports]}
    for side, found in sides.items():
        dims = sum(r.dim for r in found)
        metrics[f"kfac/clipped_frac_{side}"] = sum(r.clipped for r in found) / max(dims, 1)
        metrics[f"kfac/kappa_{side}_max"] = max((r.kappa_after for r in found), default=math.nan)
    pairs = [r.pairs for r in reports if r.pairs is not None]
    if pairs:
        total = sum(p.dim for p in pairs)
        metrics["kfac/ekfac_clipped_frac"] = sum(p.clipped for p in pairs) / max(total, 1)
        metrics["kfac/ekfac_kappa_max"] = max(p.kappa_after for p in pairs)
    both = [*sides["A"], *sides["G"]]
    metrics["kfac/jitter_events"] = sum(r.jitter > 0 for r in both)
    metrics["kfac/fallbacks"] = sum(bool(r.fallback) for r in both)
    metrics["kfac/factor_bytes"] = sum(r.factors.nbytes() for r in reports)
    errors = [r.factors.storage_error for r in reports if r.factors.storage_error is not None]
    if errors:
        metrics["kfac/storage_error_max"] = max(errors)
    return metrics


def curvature_metrics(engine: KFACNaturalGradient) -> dict[str, float]:
    """Returns trace, log-determinant and largest eigenvalue of the block-diagonal approximation."""
    logdet = sum(engine.log_determinant().values())  # before the spectra: Cholesky factors do
    tops = engine.top_eigenvalues(1).values()
    return {
        "kfac/trace": sum(engine.trace().values()),
        "kfac/logdet": logdet,
        "kfac/top_eigenvalue": max((float(t[0]) for t in tops), default=math.nan),
    }


def _about(engine: KFACNaturalGradient) -> dict[str, Any]:
    s = engine.settings
    return {
        "fisher": engine.last.fisher,
        "core_dtype": str(s.numerics.core_dtype).removeprefix("torch."),
        "apply_dtype": str(s.numerics.apply_dtype).removeprefix("torch."),
        "coverage": engine.coverage.summed(),
        "labels": vars(engine.labels),
        "skipped": engine.skipped,
        "uncovered": engine.uncovered,
    }

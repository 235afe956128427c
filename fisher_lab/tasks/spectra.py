"""Steps of ``task=analyze`` for the spectral engines: compute, write, draw, summarise.

Each step writes its files into the run directory and returns flat metrics. Files: ``spectral.json``
and ``spectral.csv``; ``lanczos.json`` and ``density.csv``; ``group_fisher.json``,
``group_fisher/`` (the state), ``group_fisher.csv`` and ``group_fisher_export.safetensors``; a PDF
and a PNG for every figure.

On several ranks each takes its sequences of every batch, whatever ``kfac.reduce`` says, and the
numbers are those of all of them; rank 0 writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import safetensors.torch
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.spectra import (
    GroupFisherSection,
    LanczosConfig,
    LanczosSection,
    SpectralConfig,
    options_of,
)
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run, strict
from fisher_lab.tasks import spectra_figures as figures
from fisher_lab.tasks.progress import Progress
from fisher_lab.workload.build import Bench

log = logging.getLogger(__name__)

GROUP_KINDS = ("layer", "head", "neuron", "parameter")

Report = Callable[[int, int], None]


def refuse(config: Config, ranks: Ranks) -> None:
    """Says what several ranks cannot do, before any work.

    Raises:
        ConfigError: the spectrum is to be sketched.
    """
    if len(ranks) > 1:
        for key, value, allowed in config.spectral.on_ranks():
            raise ConfigError.value(f"spectral.{key}", value, allowed)


def run_engines(
    config: Config, bench: Bench, run: Run, progress: Progress, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Runs the engines that are switched on, one after another, and records their metrics.

    Args:
        config: the validated configuration.
        bench: model and batches.
        run: the run's record.
        progress: shows which engine is at work.
        ranks: the ranks; collective where there are several.

    Returns:
        All their metrics; those of rank 0 are recorded.
    """
    steps = (
        ("spectral", config.spectral.enabled, "Fisher spectrum", run_spectral),
        ("lanczos", config.lanczos.enabled, "Lanczos", run_lanczos),
        ("group_fisher", config.group_fisher.enabled, "group Fisher", run_group_fisher),
    )
    ranks = Ranks() if ranks is None else ranks
    metrics: dict[str, Any] = {}
    for name, enabled, label, step in steps:
        if enabled:
            ranks.reset_traffic()
            with progress.step(label):
                found = step(config, bench, run, ranks)
            found |= ranks.traffic_metrics(name)
            run.metrics(found)
            metrics |= found
    return metrics


# ---- spectrum ------------------------------------------------------------------------------------


def run_spectral(
    config: Config, bench: Bench, run: Run, ranks: Ranks, *, report: Report | None = None
) -> dict[str, Any]:
    """Computes the blocks' spectra; writes ``spectral.json``, ``spectral.csv`` and the decay.

    Args:
        config: the validated configuration.
        bench: model and batches.
        run: the run's record.
        ranks: the ranks.
        report: gets (done, total) samples.

    Returns:
        Flat metrics under ``spectral/``; none but on rank 0.
    """
    chosen = config.spectral
    start = perf_counter()
    engine = FisherSpectral(
        options_of(chosen, SpectralConfig, use_deterministic=config.deterministic),
        loss_fn=_loss(bench),
        progress=report,
        communicator=ranks.world,
    )
    result = engine.compute_fisher_spectrum(
        bench.model,
        _batches(config, bench, ranks),
        chosen.n_samples,
        chosen.block_structure,
        chosen.center_gradients,
    )
    seconds = perf_counter() - start  # of the engine, without its files and figures
    if not ranks.is_rank_zero:
        return {}
    atomic.write_json(run.directory / "spectral.json", strict(result))
    skipped = {"eigenvalues", "residuals"}
    run.table(
        "spectral.csv",
        [
            {"block": name, **{k: v for k, v in record.items() if k not in skipped}}
            for name, record in result["per_block"].items()
        ],
    )
    figures.decay(run.directory / "spectral_decay", result)
    whole = result["global"]
    metrics = {
        f"spectral/{key}": whole[key]
        for key in (
            "largest_eigenvalue", "condition_number", "effective_rank", "spectral_gap", "trace",
            "n_nonzero", "n_blocks", "n_degenerate",
        )
        if whole.get(key) is not None
    }  # fmt: skip
    metrics["spectral/n_samples"] = result["metadata"]["n_samples"]
    metrics["spectral/bytes"] = (run.directory / "spectral.json").stat().st_size
    metrics["spectral/seconds"] = seconds
    return metrics


# ---- Lanczos -------------------------------------------------------------------------------------


def run_lanczos(config: Config, bench: Bench, run: Run, ranks: Ranks) -> dict[str, Any]:
    """Runs Lanczos, density, trace and effective dimension; writes ``lanczos.json``.

    Args:
        config: the validated configuration.
        bench: model and batches.
        run: the run's record.
        ranks: the ranks.

    Returns:
        Flat metrics under ``lanczos/``; none but on rank 0.
    """
    chosen = config.lanczos
    start = perf_counter()
    batches = _batches(config, bench, ranks)
    result = _lanczos(chosen, bench, ranks).analyze(
        bench.model,
        batches,
        chosen.block,
        lam=None if chosen.operator == "hessian" else chosen.dimension_damping,
        n_probes=chosen.density_probes,
        steps=chosen.density_steps,
    )
    seconds = perf_counter() - start
    if not ranks.is_rank_zero:
        return {}
    pairs = result["top"]
    metrics: dict[str, Any] = {
        f"lanczos/eigenvalue_{i}": value for i, value in enumerate(pairs["eigenvalues"])
    }
    metrics |= {
        "lanczos/converged": sum(pairs["converged"]),
        "lanczos/residual_max": max(pairs["residuals"]),
        "lanczos/n_products": pairs["n_products"],
        "lanczos/memory_mb": pairs["memory_bytes"] / 2**20,
        "lanczos/bytes_per_parameter": pairs["memory_bytes"] / pairs["n_params"],
    }
    for name in ("trace", "effective_dimension"):
        if name in result:
            metrics |= _estimate(f"lanczos/{name}", result[name])
    atomic.write_json(run.directory / "lanczos.json", strict(result))
    figures.eigenvalues(run.directory / "lanczos_eigenvalues", pairs)
    if "density" in result:
        metrics["lanczos/mass_at_zero"] = result["density"]["mass_at_zero"]
        _write_density(result["density"], run)
    metrics["lanczos/seconds"] = seconds
    return metrics


def _write_density(density: Mapping[str, Any], run: Run) -> None:
    columns = ("grid", "density", "standard_error")
    rows = zip(*(density[name] for name in columns), strict=True)
    run.table("density.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    figures.density(run.directory / "lanczos_density", density)


def _lanczos(chosen: LanczosSection, bench: Bench, ranks: Ranks) -> FisherLanczos:
    return FisherLanczos(
        config=options_of(chosen, LanczosConfig),
        loss_fn=_loss(bench),
        say=_say,
        communicator=ranks.world,
    )


def _say(line: str) -> None:
    """A line for the screen as well as for the log: what is about to be allocated."""
    log.info(line)
    print(line, flush=True)


def _estimate(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    metrics = {name: found["value"]}
    if not math.isnan(found["standard_error"]):
        metrics[f"{name}_se"] = found["standard_error"]
    return metrics


# ---- group Fisher --------------------------------------------------------------------------------


def run_group_fisher(config: Config, bench: Bench, run: Run, ranks: Ranks) -> dict[str, Any]:
    """Collects group Fisher on training and held-out batches; writes scores, overlap and state.

    Training and held-out text are two tasks, so that their overlap says how stable what matters is.

    Args:
        config: the validated configuration.
        bench: model and batches.
        run: the run's record.
        ranks: the ranks.

    Returns:
        Flat metrics under ``group_fisher/``; none but on rank 0.
    """
    chosen = config.group_fisher
    start = perf_counter()
    collector = _collected(config, bench, ranks)
    if not ranks.is_rank_zero:
        return {}
    rows, summary = _scores(collector, chosen)
    overlap = collector.overlap("train", "heldout", share=chosen.share)
    summary |= {"overlap": overlap, "unit": chosen.unit, "token_total": collector.token_total}
    atomic.write_json(run.directory / "group_fisher.json", strict(summary))
    run.table("group_fisher.csv", rows)
    if chosen.save_state:
        collector.save(run.directory / "group_fisher")
    _export(collector, chosen, run)
    figures.importance(run.directory / "group_fisher_layers", summary["importance"]["layer"])
    metrics: dict[str, Any] = {
        f"group_fisher/overlap_{key}": value for key, value in overlap.items() if value is not None
    }
    metrics["group_fisher/token_total"] = collector.token_total["train"]
    metrics["group_fisher/trace"] = sum(
        float(mean.sum()) for mean in collector.fisher_mean["train"].values()
    )
    metrics["group_fisher/seconds"] = perf_counter() - start
    return metrics


def _collected(config: Config, bench: Bench, ranks: Ranks) -> FisherCollector:
    """The moments of all ranks' sequences."""
    chosen = config.group_fisher
    collector = FisherCollector(
        chosen.unit,
        sequence_weight=chosen.sequence_weight,
        chunk_size=chosen.chunk_size,
        loss_fn=_loss(bench),
    )
    for split in ("train", "heldout"):
        batches = bench.batches(split, config.kfac.n_batches, config.seed)
        if len(ranks) == 1:
            collector.collect(bench.model, batches, split)
        else:
            shares = ranks.own_parts(batches)
            collect_slices(collector, bench.model, shares, split, ranks.world)
    return collector if len(ranks) == 1 else merge_over_ranks(collector, ranks.world)


def _scores(
    collector: FisherCollector, chosen: GroupFisherSection
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, importance, top = [], {}, {}
    for kind in GROUP_KINDS:
        try:
            scores = collector.importance("train", kind)
        except ValueError as error:
            log.info("group Fisher: %s", error)
            continue
        except RuntimeError as error:  # the model has no group of this kind
            log.info("group Fisher: %s", error)
            continue
        rows += [{"kind": kind, "group": name, "importance": v} for name, v in scores.items()]
        top[kind] = collector.top_k("train", chosen.top_k, kind)
        if kind != "neuron":
            importance[kind] = scores
    return rows, {"importance": importance, "top": top}


def _export(collector: FisherCollector, chosen: GroupFisherSection, run: Run) -> None:
    exported = collector.export("train", getattr(torch, chosen.export_dtype))
    tensors = {
        f"{kind}/{name}": tensor.cpu().contiguous()
        for kind in ("mean", "variance")
        for name, tensor in exported[kind].items()
    }
    about = {"unit": exported["unit"], "token_total": str(exported["token_total"])}
    atomic.write_bytes(
        run.directory / "group_fisher_export.safetensors", safetensors.torch.save(tensors, about)
    )


# ---- shared --------------------------------------------------------------------------------------


def _batches(config: Config, bench: Bench, ranks: Ranks) -> list[Any]:
    return ranks.own_batches(bench.batches("train", config.kfac.n_batches, config.seed))


def _loss(bench: Bench) -> CrossEntropy | None:
    return bench.loss_fn  # type: ignore[return-value]

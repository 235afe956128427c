"""Steps of ``task=analyze`` for the spectral engines: compute, write, draw, summarise.

On rank 0 each step writes its files into the run directory and returns flat metrics:
``spectral.json`` and ``spectral.csv``; ``lanczos.json`` and ``density.csv``; ``group_fisher.json``,
``group_fisher/`` (the state), ``group_fisher.csv`` and ``group_fisher_export.safetensors``; a PDF
and a PNG for every figure.

On several ranks each takes its sequences of every batch, whatever ``kfac.reduce`` says, and the
numbers are those of all of them; rank 0 writes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fisher_lab.analysis import SpectralEngines
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import ON_RANKS, Config
from fisher_lab.config.spectra import GroupFisherSection
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.group_fisher.parameter_groups import GROUPS
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run, strict
from fisher_lab.tasks.progress import Progress
from fisher_lab.workload.build import Workload
from fisher_lab.workload.corpus import Side

log = logging.getLogger(__name__)

SPECTRAL_METRICS = (
    "largest_eigenvalue",
    "condition_number",
    "effective_rank",
    "spectral_gap",
    "trace",
    "n_nonzero",
    "n_blocks",
    "n_degenerate",
)
"""Numbers of the union of the blocks that become metrics."""


ESTIMATE_METRICS = {
    "value": "", "standard_error": "_se", "low": "_low", "high": "_high",
    "bracket_low": "_bracket_low", "bracket_high": "_bracket_high",
}  # fmt: skip
"""Entry of an estimate -> the end of its metric's name; what is not a number is left out."""


def refuse(config: Config, ranks: Ranks) -> None:
    """Says what several ranks cannot do, before any work.

    Raises:
        ConfigError: the spectrum is to be sketched.
    """
    if len(ranks) > 1 and config.spectral.sketches:
        raise ConfigError.value("spectral.storage_mode", "sketch", ON_RANKS)


def run_engines(
    config: Config, workload: Workload, run: Run, progress: Progress, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Runs the engines that are switched on, one after another, and records their metrics.

    Returns:
        All their metrics; those of rank 0 are recorded. Collective where there are several ranks.
    """
    steps = (
        ("spectral", config.spectral.enabled, "Fisher spectrum", _spectral),
        ("lanczos", config.lanczos.enabled, "Lanczos", _lanczos),
        ("group_fisher", config.group_fisher.enabled, "group Fisher", _group_fisher),
    )
    ranks = Ranks() if ranks is None else ranks
    metrics: dict[str, Any] = {}
    for name, enabled, label, step in steps:
        if enabled:
            ranks.reset_traffic()
            with progress.step(label):
                found = step(config, workload, run, ranks)
            found |= ranks.traffic_metrics(name)
            run.metrics(found)
            metrics |= found
    return metrics


def _engines(config: Config, workload: Workload, ranks: Ranks) -> SpectralEngines:
    return SpectralEngines(
        workload.model,
        _own_parts(config, workload, ranks, "train"),
        loss_fn=workload.loss_fn,
        communicator=ranks.world,
    )


def _own_parts(
    config: Config, workload: Workload, ranks: Ranks, side: Side
) -> Sequence[dict[str, Tensor] | None]:
    """This rank's sequences of every batch, None for a batch of which it holds none."""
    n = config.task.engine_batches or config.kfac.n_batches
    return ranks.own_parts(workload.batches(side, n, config.seed))


def draw(name: str, result: Mapping[str, Any], run: Run) -> None:
    """Draws a figure of the run; matplotlib is imported for the first, since few processes draw."""
    from fisher_lab.results import curve_figures

    curve_figures.draw_of_run(name, result, run.directory)


# ---- spectrum ------------------------------------------------------------------------------------


def _spectral(config: Config, workload: Workload, run: Run, ranks: Ranks) -> dict[str, Any]:
    """Computes the blocks' spectra; writes ``spectral.json``, ``spectral.csv`` and the decay."""
    start = perf_counter()
    result = _engines(config, workload, ranks).spectrum(
        config.spectral, deterministic=config.deterministic
    )
    seconds = perf_counter() - start  # of the engine, without its files and figures
    if not ranks.is_rank_zero:
        return {}
    atomic.write_json(run.directory / "spectral.json", strict(result))
    skipped = {"eigenvalues", "residuals"}
    rows = [
        {"block": name, **{k: v for k, v in record.items() if k not in skipped}}
        for name, record in result["per_block"].items()
    ]
    run.table("spectral.csv", rows)
    draw("spectral_decay", result, run)
    whole = result["global"]
    metrics = {
        f"spectral/{key}": whole[key] for key in SPECTRAL_METRICS if whole.get(key) is not None
    }
    metrics["spectral/n_samples"] = result["metadata"]["n_samples"]
    metrics["spectral/bytes"] = (run.directory / "spectral.json").stat().st_size
    metrics["spectral/seconds"] = seconds
    return metrics


# ---- Lanczos -------------------------------------------------------------------------------------


def _lanczos(config: Config, workload: Workload, run: Run, ranks: Ranks) -> dict[str, Any]:
    """Runs Lanczos, density, trace and effective dimension; writes ``lanczos.json``."""
    start = perf_counter()
    result = _engines(config, workload, ranks).lanczos(config.lanczos, say=_say)
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
        found = result.get(name, {"value": math.nan})
        for key, suffix in ESTIMATE_METRICS.items():
            if isinstance(found.get(key), float) and not math.isnan(found[key]):
                metrics[f"lanczos/{name}{suffix}"] = found[key]
    atomic.write_json(run.directory / "lanczos.json", strict(result))
    draw("lanczos_eigenvalues", pairs, run)
    if "density" in result:
        density = result["density"]
        columns = ("grid", "density", "standard_error", "low", "high")
        metrics["lanczos/mass_at_zero"] = density["mass_at_zero"]
        rows = zip(*(density[name] for name in columns), strict=True)
        run.table("density.csv", [dict(zip(columns, row, strict=True)) for row in rows])
        draw("lanczos_density", density, run)
    metrics["lanczos/seconds"] = seconds
    return metrics


def _say(line: str) -> None:
    """Shows what is about to be allocated on the screen as well as in the log."""
    log.info(line)
    with contextlib.suppress(OSError):  # a terminal that has gone is no reason to stop
        print(line, flush=True)


# ---- group Fisher --------------------------------------------------------------------------------


def _group_fisher(config: Config, workload: Workload, run: Run, ranks: Ranks) -> dict[str, Any]:
    """Collects group Fisher on training and held-out batches; writes scores, overlap and state.

    Training and held-out text are two tasks: their overlap says how stable the importance is.
    """
    section = config.group_fisher
    start = perf_counter()
    sides: tuple[Side, Side] = ("train", "heldout")
    tasks = {side: _own_parts(config, workload, ranks, side) for side in sides}
    collector = _engines(config, workload, ranks).group_fisher(section, tasks)
    if not ranks.is_rank_zero:
        return {}
    rows, summary = _scores(collector, section)
    overlap = collector.overlap("train", "heldout", share=section.share)
    summary |= {"overlap": overlap, "unit": section.unit, "token_total": collector.token_total}
    atomic.write_json(run.directory / "group_fisher.json", strict(summary))
    run.table("group_fisher.csv", rows)
    if section.save_state:
        collector.save(run.directory / "group_fisher")
    _export(collector, section, run)
    draw("group_fisher_layers", summary["importance"]["layer"], run)
    metrics: dict[str, Any] = {
        f"group_fisher/overlap_{key}": value for key, value in overlap.items() if value is not None
    }
    metrics["group_fisher/token_total"] = collector.token_total["train"]
    metrics["group_fisher/trace"] = sum(
        float(mean.sum()) for mean in collector.fisher_mean["train"].values()
    )
    metrics["group_fisher/seconds"] = perf_counter() - start
    return metrics


def _scores(
    collector: FisherCollector, section: GroupFisherSection
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, importance, top = [], {}, {}
    for kind in GROUPS:
        try:
            scores = collector.importance("train", kind)
        except CurvatureError as error:  # the model has no group of this kind
            log.info("group Fisher: %s", error)
            continue
        rows += [{"kind": kind, "group": name, "importance": v} for name, v in scores.items()]
        top[kind] = collector.top_k("train", section.top_k, kind)
        if kind != "neuron":
            importance[kind] = scores
    return rows, {"importance": importance, "top": top}


def _export(collector: FisherCollector, section: GroupFisherSection, run: Run) -> None:
    exported = collector.export("train", getattr(torch, section.export_dtype))
    tensors = {
        f"{kind}/{name}": tensor.cpu().contiguous()
        for kind in ("mean", "variance")
        for name, tensor in exported[kind].items()
    }
    about = {"unit": exported["unit"], "token_total": str(exported["token_total"])}
    atomic.write_bytes(
        run.directory / "group_fisher_export.safetensors", safetensors.torch.save(tensors, about)
    )

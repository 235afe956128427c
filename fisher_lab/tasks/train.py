"""``task=train``: train the configured model on the configured text, resumably.

Started again in the same run directory (``hydra.run.dir=...``), a training that was stopped or
killed continues where it was, and on the CPU ends bit-identical to one that was not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab import tracking
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import CURVATURE_OPTIMIZERS, MATRIX_OPTIMIZERS
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run, strict
from fisher_lab.tasks.analyze import RANKS_FILE
from fisher_lab.tasks.memory import PeakMemory
from fisher_lab.tasks.progress import Progress
from fisher_lab.workload import build, cache, models, pretrained, training_loop
from fisher_lab.workload.data_parallel import DataParallel
from fisher_lab.workload.inputs import Inputs, prepare
from fisher_lab.workload.training_run import Result, TrainingRun

log = logging.getLogger(__name__)

MODEL_DIRECTORY = "model"


def run(config: Config, run: Run) -> None:
    """Train, and leave ``curve.csv``, ``metrics.json`` and ``model/`` in the run directory.

    On several ranks every step is that of the whole batch; rank 0 writes the files, among them
    ``ranks.csv`` with one row per rank.

    Args:
        config: The validated configuration.
        run: The run's record; its signals end the training between two steps.

    Raises:
        ConfigError: Text or model cannot be had as configured.
        fisher_lab.workload.snapshot.SnapshotError: The run directory has another training's state.
        fisher_lab.runs.signals.Interrupted: A signal came; what resuming needs is saved.
    """
    progress = Progress(config.progress)
    inputs = prepare(config)
    model, origin = _initial(inputs, progress, run)
    run.note(workbench={**inputs.record, "initial": origin})
    ranks = Ranks.of(config)
    # What is built here uses all its parameters.
    unused = config.model.type == "pretrained"
    parallel = DataParallel(ranks.communicator, config.distributed.wrapper, unused=unused)
    training = training_run(config, origin)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and training.seq_len > limit:
        raise ConfigError.value("train.seq_len", training.seq_len, f"at most the model's {limit}")
    check_ranks(config, training.batch_size, parallel.size)
    device = build.device_of(config)
    model = model.to(device)
    parallel.prepare(model)
    ranks.reset_traffic()
    with PeakMemory(device) as memory:
        result = training_loop.train(
            model,
            inputs.objective,
            training,
            run.directory,
            label=f"training {config.model.name}",
            save_every_s=config.train.save_every_s,
            track=progress.track,
            signals=run.signals,
            on_row=_send_row,
            parallel=parallel,
        )
    weights = parallel.full_weights(model)
    if parallel.is_rank_zero:
        digest = _save(model, inputs, run.directory / MODEL_DIRECTORY, weights)
        run.note(weights_sha256=digest, resumed_at=result.resumed_at)
    run.metrics(metrics(result, config.train.target_loss))
    if result.curvature:
        run.note(kfac=result.curvature)
    if ranks.communicator is not None:
        rows, about = ranks.report(parallel.tokens, parallel.labels, memory.growth_mib)
        run.metrics({name: value for name, value in about.items() if name.startswith("dist/")})
        run.table(RANKS_FILE, rows)


def _send_row(row: Mapping[str, Any]) -> None:
    values = {name: value for name, value in row.items() if name != "step"}
    tracking.active().log(strict(values), int(row["step"]))


def training_run(config: Config, origin: dict[str, Any]) -> TrainingRun:
    """What is trained, from the sections ``train`` and ``optimizer`` and the model's recipe."""
    recipe = config.model.recipe
    lr = config.optimizer.lr or recipe.lr
    optimizer = dataclasses.replace(
        config.optimizer, lr=lr, rest_lr=config.optimizer.rest_lr or recipe.lr
    )
    return TrainingRun(
        steps=config.train.steps or recipe.steps,
        batch_size=config.train.batch_size or recipe.batch_size,
        seq_len=config.train.seq_len or recipe.seq_len,
        lr=lr,
        seed=config.seed,
        optimizer=optimizer,
        eval_every=config.train.eval_every,
        precision=config.train.precision,
        accumulation=config.train.accumulation,
        gradient_checkpointing=config.train.gradient_checkpointing,
        divergence_factor=config.train.divergence_factor,
        kfac=config.kfac if optimizer.name in CURVATURE_OPTIMIZERS else None,
        origin=origin,
    )


def check_ranks(config: Config, batch_size: int, ranks: int) -> None:
    """Refuse what ranks with shards cannot do, before anything is trained.

    Raises:
        ConfigError: Steps of whole matrices, or fewer sequences than ranks and a curvature
            optimiser.
    """
    if ranks == 1 or config.distributed.wrapper != "fsdp":
        return
    if config.optimizer.name in MATRIX_OPTIMIZERS:
        allowed = (
            "another one with distributed.wrapper=fsdp, where its steps are not those of whole "
            "matrices"
        )
        raise ConfigError.value("optimizer.name", config.optimizer.name, allowed)
    if config.optimizer.name in CURVATURE_OPTIMIZERS and batch_size < ranks:
        where = "with distributed.wrapper=fsdp and a curvature optimiser"
        allowed = f"at least {ranks}, the ranks, {where}"
        raise ConfigError.value("train.batch_size", batch_size, allowed)


def _initial(inputs: Inputs, progress: Progress, run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The weights to begin with, and what they are."""
    cfg = inputs.cfg
    if cfg.train.from_checkpoint or inputs.pretrained is not None:
        model, about = build.trained(inputs, progress.track, run.signals)
        return model, {**about, "dtype": cfg.model.dtype}
    model = models.with_dtype(inputs.untrained(cfg.seed), cfg.model.dtype)
    models.set_attention(model, cfg.model.attn_implementation)
    model, adapter = pretrained.with_adapter(model, cfg.model)
    about = {"init": "random", "checkpoint": inputs.checkpoint_key, "seed": cfg.seed, **adapter}
    return model, {**about, "dtype": cfg.model.dtype}


def _save(
    model: nn.Module, inputs: Inputs, directory: Path, weights: dict[str, Tensor] | None
) -> str:
    """Write the model with its tokenizer; returns the hash of the weights."""
    if directory.exists():  # of an earlier attempt that ended before its record did
        shutil.rmtree(directory)
    with atomic.directory(directory) as temporary:
        models.save(model, temporary, weights)
        if inputs.tokenizer is not None:
            inputs.tokenizer.save_pretrained(str(temporary))
    return cache.sha256_of(*sorted(directory.glob("*.safetensors")))


def metrics(result: Result, target: float | None) -> dict[str, float | int | None]:
    """What a training came to, for ``metrics.json``; ``target``: see ``train.target_loss``."""
    rows = result.curve.rows
    last = rows[-1]
    tokens, steps = int(last["tokens"]), int(last["step"])
    log.info("held-out loss %.4f after %d steps", result.heldout_loss, steps)
    if result.diverged_at is not None:
        log.warning("diverged at step %d (loss %g)", result.diverged_at, last["loss"])
    values: dict[str, float | int | None] = {
        "loss": last["loss"],
        "loss/heldout": result.heldout_loss,
        "loss/heldout_best": result.best_heldout_loss,
        "loss/baseline": result.baseline_loss,
        "grad/norm": last["grad_norm"],
        "tokens": tokens,
        "diverged": int(result.diverged_at is not None),
        "train/steps": steps,
        "train/seconds": result.seconds,
        "train/evaluation_s": result.evaluation_seconds,
        "train/tokens_per_s": tokens / result.seconds,
        "train/threads": torch.get_num_threads(),
    }
    if result.diverged_at is not None:
        values["train/diverged_step"] = result.diverged_at
    if target is not None:
        row = result.reached(target) or {}
        values["train/target_steps"] = row.get("step")
        values["train/target_s"] = row.get("seconds")
    if result.curvature:
        about = result.curvature["coverage"]
        trained = about["covered"] + sum(about["passed"].values())
        values["kfac/coverage"] = about["covered"] / trained
        reached = max(trained - about["unreached"], 1)
        values["kfac/coverage_of_reached"] = about["covered"] / reached
    return values | _curvature_metrics(rows, result.seconds)


def _curvature_metrics(rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    spent = [row["curvature_seconds"] for row in rows if "curvature_seconds" in row]
    if not spent:
        return {}
    values = {
        "train/curvature_share": sum(spent) / seconds,
        "train/kl_scale": statistics.median(r["kl_scale"] for r in rows if "kl_scale" in r),
        "train/damping_multiplier": rows[-1].get("damping_multiplier", math.nan),
    }
    ratios = [
        r["reduction_ratio"] for r in rows if math.isfinite(r.get("reduction_ratio", math.nan))
    ]
    if ratios:
        values["train/reduction_ratio"] = statistics.median(ratios)
    return values

"""``task=train``: train the configured model on the configured text, resumably.

Started again in the same run directory (``hydra.run.dir=...``), a training that was stopped or
killed goes on where it was, and on the CPU ends bit-identical to one that was left alone.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run
from fisher_lab.tasks.progress import Progress
from fisher_lab.workbench import bench, cache, models, training

log = logging.getLogger(__name__)

MODEL_DIRECTORY = "model"


def run(config: Config, run: Run) -> None:
    """Train, and leave ``curve.csv``, ``metrics.json`` and ``model/`` in the run directory.

    Args:
        config: The validated configuration.
        run: The run's record; its signals end the training between two steps.

    Raises:
        ConfigError: Text or model cannot be had as configured.
        fisher_lab.workbench.snapshot.SnapshotError: The run directory has another training's state.
        fisher_lab.runs.signals.Interrupted: A signal came; what resuming needs is saved.
    """
    progress = Progress(config.progress)
    materials = bench.prepare(config)
    model, origin = _initial(materials, progress, run)
    run.note(workbench={**materials.record, "initial": origin})
    job = make_job(config, origin)
    _check_length(job, model)
    result = training.train(
        model.to(bench.device_of(config)),
        materials.task,
        job,
        run.directory,
        label=f"training {config.model.name}",
        save_every_s=config.train.save_every_s,
        track=progress.track,
        signals=run.signals,
    )
    digest = _save(model, materials, run.directory / MODEL_DIRECTORY)
    run.note(weights_sha256=digest, resumed_at=result.resumed_at)
    run.metrics(_metrics(result, job, materials.task.name))


def make_job(config: Config, origin: dict[str, Any]) -> training.Job:
    """What is trained, from the sections ``train`` and ``optimizer`` and the model's recipe."""
    recipe = config.model.recipe
    return training.Job(
        steps=config.train.steps or recipe.steps,
        batch_size=config.train.batch_size or recipe.batch_size,
        seq_len=config.train.seq_len or recipe.seq_len,
        lr=config.optimizer.lr or recipe.lr,
        seed=config.seed,
        optimizer=config.optimizer,
        eval_every=config.train.eval_every,
        origin=origin,
    )


def _initial(
    materials: bench.Materials, progress: Progress, run: Run
) -> tuple[nn.Module, dict[str, Any]]:
    """The weights to begin with, and what they are."""
    cfg = materials.cfg
    if cfg.train.from_checkpoint or materials.pretrained is not None:
        model, about = bench.trained(materials, progress, run.signals)
        return model, {**about, "dtype": cfg.model.dtype}
    model = models.with_dtype(materials.untrained(cfg.seed), cfg.model.dtype)
    models.set_attention(model, cfg.model.attn_implementation)
    about = {
        "init": "random",
        "checkpoint": materials.checkpoint_key,
        "seed": cfg.seed,
        "dtype": cfg.model.dtype,
    }
    return model, about


def _check_length(job: training.Job, model: nn.Module) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and job.seq_len > limit:
        raise ConfigError.value("train.seq_len", job.seq_len, f"at most the model's {limit}")


def _save(model: nn.Module, materials: bench.Materials, directory: Path) -> str:
    """Write the model with its tokenizer; returns the hash of the weights."""
    if directory.exists():  # of an earlier attempt that ended before its record did
        shutil.rmtree(directory)
    with atomic.directory(directory) as temporary:
        models.save(model, temporary)
        materials.tokenizer.save_pretrained(str(temporary))
    return cache.sha256_of(*sorted(directory.glob("*.safetensors")))


def _metrics(result: training.Result, job: training.Job, task: str) -> dict[str, float | int]:
    last = result.curve.rows[-1]
    tokens = int(last["tokens"])
    log.info("%s: held-out loss %.4f after %d steps", task, result.heldout_loss, job.steps)
    return {
        "loss": last["loss"],
        "heldout_loss": result.heldout_loss,
        "heldout_loss_best": result.best_heldout_loss,
        "baseline_loss": result.baseline_loss,
        "grad/norm": last["grad_norm"],
        "tokens": tokens,
        "train/steps": job.steps,
        "train/seconds": result.seconds,
        "train/tokens_per_s": tokens / result.seconds,
        "train/threads": torch.get_num_threads(),
    }

"""The checkpoint of a built model: trained once by its recipe, then read from the cache."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.curvature.collectives import Progress, no_progress
from fisher_lab.runs import atomic, lock
from fisher_lab.runs.signals import Watch
from fisher_lab.workload import cache, models, training_loop
from fisher_lab.workload.snapshot import SnapshotError
from fisher_lab.workload.training_run import Result, TrainingRun

if TYPE_CHECKING:
    from fisher_lab.workload.inputs import Inputs

log = logging.getLogger(__name__)

RECORD_FILE = "record.json"
WEIGHTS_FILE = "model.safetensors"
EVAL_EVERY = 100


class CheckpointError(RuntimeError):
    """A cached checkpoint does not match its record."""


def cached(inputs: Inputs, progress: Progress = no_progress, signals: Watch | None = None) -> Path:
    """Train the checkpoint unless the cache has it.

    It is always trained on the CPU in float32, so that it does not depend on the machine's device.
    A training that was killed is resumed, by this or by another process that needs the same
    checkpoint.

    Returns:
        A directory with ``config.json``, ``model.safetensors``, the tokenizer, ``curve.csv`` and
        ``record.json``.
    """
    model = inputs.cfg.model
    root = cache.directory(inputs.cfg.cache_dir)
    target = root / "checkpoints" / f"{model.type}-{inputs.checkpoint_key}"

    def build(path: Path) -> None:
        partial = path.parent / f"{path.name}.partial"
        try:
            _train(inputs, path, partial, progress, signals)
        except SnapshotError as error:
            log.warning("%s; the training of the checkpoint begins again", error)
            shutil.rmtree(partial)
            _train(inputs, path, partial, progress, signals)
        shutil.rmtree(partial)

    def report_waiting(holder: lock.Holder) -> None:
        log.warning(
            "waiting for %s, which process %d on %s is training", target, holder.pid, holder.host
        )

    lock.once(target, build, on_wait=report_waiting)
    return target


def verified_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint, after a check of its weights.

    Raises:
        CheckpointError: The weights are not those that were saved.
    """
    record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
    found = cache.sha256_of(directory / WEIGHTS_FILE)
    if record["checkpoint_sha256"] != found:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE} has changed since it was saved; remove {directory}, "
            "and the next run trains it again"
        )
    return record


def _train(
    inputs: Inputs, path: Path, partial: Path, progress: Progress, signals: Watch | None
) -> None:
    config = inputs.cfg.model
    run = TrainingRun(
        **dataclasses.asdict(config.recipe),
        seed=config.train_seed,
        optimizer=OptimizerConfig(),
        eval_every=EVAL_EVERY,
        origin={"checkpoint": inputs.checkpoint_key},
    )
    label = f"training {config.type} once"
    log.info("%s: %d steps, into %s", label, run.steps, path)
    model = inputs.untrained(config.train_seed)
    # The training seeds the process's random numbers. What follows must not depend on whether the
    # checkpoint was trained here or found.
    with torch.random.fork_rng(devices=[]):
        result = training_loop.train(
            model,
            inputs.objective,
            run,
            partial,
            label=label,
            track=progress,
            signals=signals,
        )
    _save(path, inputs, model, run, result)
    baseline = inputs.objective.baseline
    losses = f"held-out loss {result.heldout_loss:.3f}, {baseline} {result.baseline_loss:.3f}"
    log.info("%s: %s, %.0f s", label, losses, result.seconds)
    if result.heldout_loss >= result.baseline_loss:
        log.warning("%s: the recipe does not beat the %s", label, baseline)


def _save(path: Path, inputs: Inputs, model: nn.Module, run: TrainingRun, result: Result) -> None:
    """Write the trained model, its tokenizer, its curve and its record."""
    with atomic.directory(path, keep_existing=True) as temporary:
        models.save(model, temporary)
        assert inputs.tokenizer is not None  # a built model's
        inputs.tokenizer.save_pretrained(str(temporary))
        result.curve.write(temporary / training_loop.CURVE_FILE)
        record = {
            "checkpoint": inputs.checkpoint_key,
            "checkpoint_sha256": cache.sha256_of(temporary / WEIGHTS_FILE),
            "train_seed": inputs.cfg.model.train_seed,
            "steps": run.steps,
            "threads": torch.get_num_threads(),
            "seconds": result.seconds,
            "heldout_loss": result.heldout_loss,
            "baseline_loss": result.baseline_loss,
            "baseline": inputs.objective.baseline,
        }
        atomic.write_json(temporary / RECORD_FILE, record)

"""The training loop of ``task=train`` and of the cached checkpoints.

It can be stopped at any moment and resumes exactly. Everything that a step depends on is saved in
one file (`snapshot`): weights, optimiser, random numbers, and the number of steps done, which is
also the position in the data, since a batch is a function of its number (`corpus`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_lab.curvature import losses, wrappers
from fisher_lab.curvature.collectives import Progress, no_progress
from fisher_lab.runs import atomic
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.workload import evaluation, optimizers, snapshot
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.gradient import Diverged
from fisher_lab.workload.objectives import Batch, Objective
from fisher_lab.workload.snapshot import SnapshotError
from fisher_lab.workload.training_run import Curve, Result, TrainingRun

log = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
CURVE_FILE = "curve.csv"
RANK_SEED = 1_000_003
"""Difference of the seeds of two ranks' dropout; rank 0 draws what one process would draw."""


def train(
    model: nn.Module,
    objective: Objective,
    run: TrainingRun,
    directory: Path,
    *,
    label: str = "training",
    save_every_s: float = 5.0,
    track: Progress = no_progress,
    signals: Watch | None = None,
    after_step: Callable[[int], None] | None = None,
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None,
    parallel: DataParallel = ONE_PROCESS,
) -> Result:
    """Train a model, or resume if ``directory`` has the saved state of this very training.

    All ranks call it together; every step uses the whole batch, and only rank 0 reads and writes
    ``directory``.

    Args:
        model: The model with its initial weights; it is changed in place and left in evaluation
            mode.
        objective: Makes the batches.
        run: What is trained.
        directory: Gets ``state.safetensors`` and ``curve.csv``.
        label: For the progress bar.
        save_every_s: Seconds between two saves.
        track: Shows progress.
        signals: If given, SIGTERM and SIGUSR2 end the loop between two steps with a saved state.
        after_step: Called after each step (and its save) with the number of steps done.
        on_row: Called with each new row of the curve; the last one has the final evaluation.
        parallel: The processes that train; they have prepared the model (`DataParallel.prepare`).

    Raises:
        SnapshotError: The state in ``directory`` is unreadable or belongs to another training.
        fisher_lab.runs.signals.Interrupted: A signal came; the state is saved.
    """
    loop = _Loop(model, objective, run, directory, parallel)
    result = loop.result
    start = result.resumed_at = loop.restore()
    end = start if result.diverged_at is not None else run.steps
    deferred: AbstractContextManager[Pending | None] = (
        nullcontext() if signals is None else signals.deferred()
    )
    with deferred as pending:
        loop.saved_at = time.monotonic()
        for step in track(range(start, end), label, end - start):
            loop.step(step)
            if result.diverged_at is not None:
                break
            if step + 1 < run.steps:
                on_row(result.curve.rows[-1])
            came = 0 if pending is None else pending()
            came, due = parallel.agree(came, time.monotonic() - loop.saved_at >= save_every_s)
            if came or due:
                loop.save(step + 1)
            if came and pending is not None:
                pending.note(came)
                pending.stop()
            if after_step is not None:
                after_step(step + 1)
        loop.save(len(result.curve.rows))
    loop.finish()
    on_row(result.curve.rows[-1])
    return result


@dataclass
class _Loop:
    """The state of a running training, and the steps that change it."""

    model: nn.Module
    objective: Objective
    run: TrainingRun
    directory: Path
    parallel: DataParallel

    def __post_init__(self) -> None:
        self.updater = optimizers.make(self.model, self.objective.loss_fn, self.run, self.parallel)
        self.result = Result()
        self.size: Any = {"batch_size": self.run.batch_size, "seq_len": self.run.seq_len}
        self.saved_at = time.monotonic()

    def step(self, step: int) -> None:
        """Do step number ``step``, from 0, and append its row to the curve."""
        run, result, began = self.run, self.result, time.perf_counter()
        self.model.train()
        rate = optimizers.rate(step, run.steps, run.lr, run.optimizer)
        row: dict[str, Any] = {
            "step": step + 1,
            "tokens": (step + 1) * run.batch_size * run.seq_len,
            "lr": rate,
        }
        try:
            row |= self.updater.step(self.batch(step), rate, lambda k: self.batch(step + k))
        except Diverged as stop:
            row |= stop.row
            result.diverged_at = step + 1
        result.seconds += time.perf_counter() - began
        row["seconds"] = result.seconds
        result.curve.rows.append(row)
        factor = math.inf if run.divergence_factor is None else run.divergence_factor
        limit = factor * result.curve.rows[0]["loss"]
        if not math.isfinite(row["loss"]) or row["loss"] > limit:
            result.diverged_at = step + 1
        elif (step + 1) % run.eval_every == 0 and step + 1 < run.steps:
            row["heldout_loss"] = self.heldout_loss(evaluation.FEW_BATCHES)
            self.parallel.check_weights(self.model)

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the model's device."""
        batch = self.objective.batch("train", step, seed=self.run.seed, **self.size)
        return losses.prepare(self.model, batch, self.objective.loss_fn)

    def heldout_loss(self, limit: int | None) -> float:
        """The held-out loss; the time that it takes is added up."""
        began = time.perf_counter()
        loss = evaluation.heldout_loss(
            self.model, self.objective, **self.size, limit=limit, parallel=self.parallel
        )
        self.result.evaluation_seconds += time.perf_counter() - began
        return loss

    def save(self, steps: int) -> None:
        """Write curve and state; the curve first, so that it has every step of the state."""
        parallel, result = self.parallel, self.result
        state = {
            "fingerprint": self.run.fingerprint,
            "steps": steps,
            "seconds": result.seconds,
            "evaluation_seconds": result.evaluation_seconds,
            "diverged_at": result.diverged_at,
            "model": parallel.gather_shards(dict(_weights(self.model))),
            "updater": parallel.gather_shards(self.updater.state_dict()),
            "random": parallel.gather_states(snapshot.random_state()),
        }
        if parallel.is_rank_zero:
            result.curve.write(self.directory / CURVE_FILE)
            snapshot.save(self.directory / STATE_FILE, state)
        parallel.first_problem(None)  # no rank continues or ends before everything is written
        self.saved_at = time.monotonic()

    def restore(self) -> int:
        """Load the saved state, if there is one; returns the number of steps done."""
        state = self.parallel.from_rank_zero(self._saved)
        if state is None:
            torch.manual_seed(self.run.seed + RANK_SEED * self.parallel.rank)
            return 0
        with torch.no_grad():
            for name, tensor in _weights(self.model):
                tensor.copy_(wrappers.like(state["model"][name], tensor))
        self.updater.load_state_dict(state["updater"])
        self.result.curve = Curve(state["curve"])
        for name in ("seconds", "evaluation_seconds", "diverged_at"):
            setattr(self.result, name, state[name])
        self._restore_random(state["random"])
        return state["steps"]

    def _restore_random(self, saved: list[Any]) -> None:
        """Goes on with this rank's random numbers; a rank that is new begins its own."""
        rank, size = self.parallel.rank, self.parallel.size
        if len(saved) != size:
            log.warning(
                "resumed on %d ranks, saved on %d: sums round, and dropout draws, another way than "
                "without a break",
                size, len(saved),
            )  # fmt: skip
        if rank < len(saved):
            snapshot.restore_random_state(saved[rank])
        else:
            torch.manual_seed(self.run.seed + RANK_SEED * rank)

    def _saved(self) -> dict[str, Any] | None:
        """The saved state with its curve, or None."""
        path = self.directory / STATE_FILE
        for name in (STATE_FILE, CURVE_FILE):
            atomic.remove_leftovers(self.directory, name)
        if not path.exists():
            return None
        state = snapshot.load(path)
        if state["fingerprint"] != self.run.fingerprint:
            raise SnapshotError(
                f"{path} is the state of another training; choose another directory or remove it"
            )
        curve = Curve.read(self.directory / CURVE_FILE, state["steps"])
        return {**state, "curve": curve.rows}

    def finish(self) -> None:
        """Evaluate on all held-out text, and put the loss into the last row of the curve."""
        result = self.result
        rows = result.curve.rows
        result.heldout_loss = rows[-1]["heldout_loss"] = self.heldout_loss(None)
        self.model.eval()
        self.parallel.check_weights(self.model)
        if self.parallel.is_rank_zero:
            result.curve.write(self.directory / CURVE_FILE)
        result.curvature = self.updater.curvature
        seen = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
        finite = (loss for loss in seen if math.isfinite(loss))
        result.best_heldout_loss = min(finite, default=math.nan)
        result.baseline_loss = evaluation.baseline_loss(self.objective, **self.size)


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; a shared one occurs once."""
    yield from model.named_parameters()
    yield from model.named_buffers()

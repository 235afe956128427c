"""The training loop of ``task=train`` and of the cached checkpoints.

It can be stopped at any moment and resumes exactly. Everything that a step depends on is saved in
one file (`snapshot`): weights, optimiser, random numbers, and the number of steps done, which is
also the position in the data, since a batch is a function of its number (`corpus`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
    start = loop.restore()
    end = start if loop.diverged_at is not None else run.steps
    deferred: AbstractContextManager[Pending | None] = (
        nullcontext() if signals is None else signals.deferred()
    )
    with deferred as pending:
        loop.saved_at = time.monotonic()
        for step in track(range(start, end), label, end - start):
            loop.step(step)
            if loop.diverged_at is not None:
                break
            if step + 1 < run.steps:
                on_row(loop.curve.rows[-1])
            came = 0 if pending is None else pending()
            came, due = parallel.agree(came, time.monotonic() - loop.saved_at >= save_every_s)
            if came or due:
                loop.save(step + 1)
            if came and pending is not None:
                pending.note(came)
                pending.stop()
            if after_step is not None:
                after_step(step + 1)
        loop.save(len(loop.curve.rows))
    result = loop.result(start)
    on_row(loop.curve.rows[-1])
    return result


class _Loop:
    """The state of a running training, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        run: TrainingRun,
        directory: Path,
        parallel: DataParallel,
    ) -> None:
        self.model, self.objective, self.run = model, objective, run
        self.directory, self.parallel = directory, parallel
        self.updater = optimizers.make(model, objective.loss_fn, run, parallel)
        self.curve = Curve()
        self.seconds = 0.0
        self.evaluation_seconds = 0.0
        self.diverged_at: int | None = None
        self.saved_at = time.monotonic()

    def step(self, step: int) -> None:
        """Do step number ``step``, from 0, and append its row to the curve."""
        run, began = self.run, time.perf_counter()
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
            self.diverged_at = step + 1
        self.seconds += time.perf_counter() - began
        row["seconds"] = self.seconds
        self.curve.rows.append(row)
        factor = math.inf if run.divergence_factor is None else run.divergence_factor
        limit = factor * self.curve.rows[0]["loss"]
        if not math.isfinite(row["loss"]) or row["loss"] > limit:
            self.diverged_at = step + 1
        elif (step + 1) % run.eval_every == 0 and step + 1 < run.steps:
            row["heldout_loss"] = self.heldout_loss(evaluation.FEW_BATCHES)
            self.parallel.check_weights(self.model)

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the model's device."""
        run = self.run
        batch = self.objective.batch(
            "train", step, seed=run.seed, batch_size=run.batch_size, seq_len=run.seq_len
        )
        return losses.prepare(self.model, batch)

    def heldout_loss(self, limit: int | None) -> float:
        """The held-out loss; the time that it takes is added up."""
        began = time.perf_counter()
        loss = evaluation.heldout_loss(
            self.model,
            self.objective,
            batch_size=self.run.batch_size,
            seq_len=self.run.seq_len,
            limit=limit,
            parallel=self.parallel,
        )
        self.evaluation_seconds += time.perf_counter() - began
        return loss

    def save(self, steps: int) -> None:
        """Write curve and state; the curve first, so that it has every step of the state."""
        parallel = self.parallel
        model = parallel.gather_shards(dict(_weights(self.model)))
        updater = parallel.gather_shards(self.updater.state_dict())
        random = parallel.gather_states(snapshot.random_state())
        if parallel.is_rank_zero:
            self.curve.write(self.directory / CURVE_FILE)
            snapshot.save(
                self.directory / STATE_FILE,
                {
                    "fingerprint": self.run.fingerprint,
                    "steps": steps,
                    "seconds": self.seconds,
                    "evaluation_seconds": self.evaluation_seconds,
                    "diverged_at": self.diverged_at,
                    "model": model,
                    "updater": updater,
                    "random": random,
                },
            )
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
        self.curve = Curve(state["curve"])
        self.seconds = state["seconds"]
        self.evaluation_seconds = state["evaluation_seconds"]
        self.diverged_at = state["diverged_at"]
        snapshot.restore_random_state(state["random"][self.parallel.rank])
        return state["steps"]

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

    def result(self, start: int) -> Result:
        """Evaluate on all held-out text, and put the loss into the last row of the curve."""
        final = self.heldout_loss(None)
        self.model.eval()
        self.parallel.check_weights(self.model)
        self.curve.rows[-1]["heldout_loss"] = final
        if self.parallel.is_rank_zero:
            self.curve.write(self.directory / CURVE_FILE)
        seen = [row["heldout_loss"] for row in self.curve.rows if "heldout_loss" in row]
        best = min((loss for loss in seen if math.isfinite(loss)), default=math.nan)
        baseline = evaluation.baseline_loss(
            self.objective, batch_size=self.run.batch_size, seq_len=self.run.seq_len
        )
        return Result(
            curve=self.curve,
            heldout_loss=final,
            best_heldout_loss=best,
            baseline_loss=baseline,
            seconds=self.seconds,
            evaluation_seconds=self.evaluation_seconds,
            resumed_at=start,
            diverged_at=self.diverged_at,
        )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; a shared one occurs once."""
    yield from model.named_parameters()
    yield from model.named_buffers()

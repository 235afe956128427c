"""The training loop: ``task=train`` and the cached checkpoints both go through it.

It can be stopped at any moment and goes on exactly where it was. What a step depends on is saved
in one file (`snapshot`): weights, optimiser, random numbers, and the number of steps done, which is
also the position in the data, since a batch is a function of its number (`corpus`).
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.curvature import losses
from fisher_lab.runs import atomic
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.workload import cache, evaluation, optimizers, snapshot
from fisher_lab.workload.data_parallel import ALONE, Crew
from fisher_lab.workload.gradient import Passes
from fisher_lab.workload.objectives import TextTask
from fisher_lab.workload.optimizers import Diverged, MakeUpdater
from fisher_lab.workload.snapshot import SnapshotError

STATE_FILE = "state.safetensors"
STATE_FORMAT = 2
"""Raised where what is in the file changes: the states of others are refused."""
CURVE_FILE = "curve.csv"
CURVE_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "heldout_loss", "seconds")
RANK_SEED = 1_000_003
"""Between the seeds of two ranks' dropout; rank 0 has what one process would have."""
EVALUATION_BATCHES = 8
"""Held-out batches behind a point of the curve; the last one has all of them."""

Track = Callable[[Iterable[int], str, int], Iterable[int]]
"""Hands on the items of an iterable and shows how far it is: ``track(items, label, total)``."""


@dataclass(frozen=True)
class Job:
    """All that decides what comes out of a training beside model, text and initial weights.

    Attributes:
        steps: How many.
        batch_size: Sequences a step.
        seq_len: Tokens a sequence.
        lr: Peak learning rate.
        seed: Of batches and dropout.
        optimizer: What is done with the gradient.
        eval_every: Steps between two held-out evaluations.
        passes: How gradients are computed.
        divergence_factor: The training ends early where a loss is over this many times the
            first one; None: only where it is not finite.
        curvature: The choices of a curvature optimiser beside ``optimizer``; part of the
            fingerprint.
        origin: What the initial weights and the text are; part of the fingerprint.
    """

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int
    optimizer: OptimizerConfig
    eval_every: int
    passes: Passes = field(default_factory=Passes)
    divergence_factor: float | None = None
    curvature: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A saved state of another fingerprint is not gone on with."""
        return cache.key_of({**asdict(self), "format": STATE_FORMAT})


@dataclass
class Curve:
    """The learning curve, a row a step; all but the columns of seconds is the same in a repeat."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as CSV, atomically; numbers in full precision."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic.write_text(path, text.getvalue())

    @property
    def columns(self) -> list[str]:
        """The usual columns, then what the updater adds."""
        return list(dict.fromkeys((*CURVE_COLUMNS, *(key for row in self.rows for key in row))))

    @classmethod
    def read(cls, path: Path, steps: int) -> Curve:
        """Read the first ``steps`` rows of a curve.

        Raises:
            SnapshotError: The file does not have them.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = [
                    {key: _number(key, value) for key, value in row.items() if value != ""}
                    for row in csv.DictReader(file)
                ][:steps]
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path} cannot be read as a learning curve: {error}") from error
        if [row.get("step") for row in rows] != list(range(1, steps + 1)):
            raise SnapshotError(f"{path} does not have the steps 1 to {steps}")
        return cls(rows)


def _number(column: str, text: str) -> float | int:
    return int(text) if column in ("step", "tokens") else float(text)


@dataclass(frozen=True)
class Result:
    """What a training gave.

    Attributes:
        curve: A row a step.
        heldout_loss: At the end, over all of the held-out text, in nats a label.
        best_heldout_loss: The lowest on the way (over fewer batches) or at the end.
        baseline_loss: The trivial model's, on the same held-out labels.
        seconds: Spent in steps, all attempts together; held-out evaluations are not in it.
        evaluation_seconds: Spent in held-out evaluations on the way.
        resumed_at: The step that this attempt began with.
        diverged_at: The step (from 1) at which the training was given up, or None.
    """

    curve: Curve
    heldout_loss: float
    best_heldout_loss: float
    baseline_loss: float
    seconds: float
    evaluation_seconds: float
    resumed_at: int
    diverged_at: int | None

    def reached(self, target: float) -> dict[str, Any] | None:
        """The first row of the curve whose held-out loss is at or under ``target``, or None."""
        for row in self.curve.rows:
            if row.get("heldout_loss", math.inf) <= target:
                return row
        return None


def no_track(items: Iterable[int], label: str, total: int) -> Iterable[int]:
    """Show nothing."""
    return items


def no_row(row: Mapping[str, Any]) -> None:
    """Send a row of the curve nowhere."""


def train(
    model: nn.Module,
    task: TextTask,
    job: Job,
    directory: Path,
    *,
    make: MakeUpdater = optimizers.make,
    label: str = "training",
    save_every_s: float = 5.0,
    track: Track = no_track,
    signals: Watch | None = None,
    after_step: Callable[[int], None] | None = None,
    on_row: Callable[[Mapping[str, Any]], None] = no_row,
    crew: Crew = ALONE,
) -> Result:
    """Train a model, or go on with it where ``directory`` has the state of this very training.

    Several ranks call it together; every step is that of the joined batch, and rank 0 alone reads
    and writes ``directory``.

    Args:
        model: With its initial weights; changed in place, and left in evaluation mode.
        task: Where the batches come from.
        job: What is done.
        directory: Gets ``state.safetensors`` and ``curve.csv``.
        make: Makes what changes the weights.
        label: For the progress bar.
        save_every_s: Seconds between two saves.
        track: Shows progress.
        signals: Where given, SIGTERM and SIGUSR2 end the loop between two steps, state saved.
        after_step: Called with the number of steps done, after each (and after its save).
        on_row: Called with each new row of the curve, the last one with the final evaluation.
        crew: Who trains; the model is theirs already (`Crew.adopt`).

    Raises:
        SnapshotError: ``directory`` has the state of another training, or an unreadable one.
        fisher_lab.runs.signals.Interrupted: A signal came; the state is saved.
    """
    loop = _Loop(model, task, job, directory, make, crew)
    start = loop.restore()
    end = start if loop.diverged_at is not None else job.steps
    deferred: AbstractContextManager[Pending | None] = (
        nullcontext() if signals is None else signals.deferred()
    )
    with deferred as pending:
        loop.saved_at = time.monotonic()
        for step in track(range(start, end), label, end - start):
            loop.step(step)
            if loop.diverged_at is not None:
                break
            if step + 1 < job.steps:
                on_row(loop.curve.rows[-1])
            came = 0 if pending is None else pending()
            came, due = crew.agree(came, time.monotonic() - loop.saved_at >= save_every_s)
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
        task: TextTask,
        job: Job,
        directory: Path,
        make: MakeUpdater,
        crew: Crew,
    ) -> None:
        self.model = model
        self.task = task
        self.job = job
        self.directory = directory
        self.crew = crew
        self.updater = make(model, task.loss_fn, job.optimizer, job.passes, crew)
        self.curve = Curve()
        self.seconds = 0.0
        self.evaluation_seconds = 0.0
        self.diverged_at: int | None = None
        self.saved_at = time.monotonic()

    def step(self, step: int) -> None:
        """Step number ``step``, from 0, and its row of the curve."""
        job, began = self.job, time.perf_counter()
        self.model.train()
        rate = optimizers.rate(step, job.steps, job.lr, job.optimizer)
        row: dict[str, Any] = {
            "step": step + 1,
            "tokens": (step + 1) * job.batch_size * job.seq_len,
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
        if self.has_diverged(row["loss"]):
            self.diverged_at = step + 1
        elif (step + 1) % job.eval_every == 0 and step + 1 < job.steps:
            row["heldout_loss"] = self.heldout_loss(EVALUATION_BATCHES)
            self.crew.check(self.model)

    def batch(self, step: int) -> Any:
        """The batch of a step, on the model's device."""
        job = self.job
        batch = self.task.batch(
            "train", step, seed=job.seed, batch_size=job.batch_size, seq_len=job.seq_len
        )
        return losses.prepare(self.model, batch)

    def has_diverged(self, loss: float) -> bool:
        """Whether this loss is the end of the training."""
        if not math.isfinite(loss):
            return True
        factor = self.job.divergence_factor
        return factor is not None and loss > factor * self.curve.rows[0]["loss"]

    def heldout_loss(self, limit: int | None) -> float:
        """Held-out loss, and the time that it takes."""
        began = time.perf_counter()
        loss = evaluation.heldout_loss(
            self.model,
            self.task,
            batch_size=self.job.batch_size,
            seq_len=self.job.seq_len,
            limit=limit,
            crew=self.crew,
        )
        self.evaluation_seconds += time.perf_counter() - began
        return loss

    def save(self, steps: int) -> None:
        """Write curve and state; the curve first, so that it has all that the state speaks of."""
        crew = self.crew
        model = crew.whole(dict(_weights(self.model)))
        updater = crew.whole(self.updater.state_dict())
        random = crew.every(snapshot.random_state())
        if crew.leads:
            self.curve.write(self.directory / CURVE_FILE)
            snapshot.save(
                self.directory / STATE_FILE,
                {
                    "fingerprint": self.job.fingerprint,
                    "steps": steps,
                    "seconds": self.seconds,
                    "evaluation_seconds": self.evaluation_seconds,
                    "diverged_at": self.diverged_at,
                    "model": model,
                    "updater": updater,
                    "random": random,
                },
            )
        crew.problem(None)  # no rank goes on, or ends, before all is written
        self.saved_at = time.monotonic()

    def restore(self) -> int:
        """Take up the saved state, if there is one; returns the number of steps done."""
        state = self.crew.lead(self._saved)
        if state is None:
            torch.manual_seed(self.job.seed + RANK_SEED * self.crew.rank)
            return 0
        with torch.no_grad():
            for name, tensor in _weights(self.model):
                self.crew.fill(tensor, state["model"][name])
        self.updater.load_state_dict(state["updater"])
        self.curve = Curve(state["curve"])
        self.seconds = state["seconds"]
        self.evaluation_seconds = state["evaluation_seconds"]
        self.diverged_at = state["diverged_at"]
        snapshot.restore_random_state(state["random"][self.crew.rank])
        return state["steps"]

    def _saved(self) -> dict[str, Any] | None:
        """The saved state with its curve, or None."""
        path = self.directory / STATE_FILE
        atomic.remove_leftovers(path)
        atomic.remove_leftovers(self.directory / CURVE_FILE)
        if not path.exists():
            return None
        state = snapshot.load(path)
        if state["fingerprint"] != self.job.fingerprint:
            raise SnapshotError(
                f"{path} is the state of another training; choose another directory or remove it"
            )
        curve = Curve.read(self.directory / CURVE_FILE, state["steps"])
        return {**state, "curve": curve.rows}

    def result(self, start: int) -> Result:
        """Evaluate at the end, and put that into the curve's last row."""
        final = self.heldout_loss(None)
        self.model.eval()
        self.crew.check(self.model)
        self.curve.rows[-1]["heldout_loss"] = final
        if self.crew.leads:
            self.curve.write(self.directory / CURVE_FILE)
        seen = [row["heldout_loss"] for row in self.curve.rows if "heldout_loss" in row]
        best = min((loss for loss in seen if math.isfinite(loss)), default=math.nan)
        baseline = evaluation.baseline_loss(
            self.task, batch_size=self.job.batch_size, seq_len=self.job.seq_len
        )
        return Result(
            self.curve,
            final,
            best,
            baseline,
            self.seconds,
            self.evaluation_seconds,
            start,
            self.diverged_at,
        )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, shared ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()

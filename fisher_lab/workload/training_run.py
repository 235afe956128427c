"""What a training is asked for, and what it gave: `TrainingRun`, `Curve` and `Result`."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import KfacConfig
from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.runs import atomic
from fisher_lab.workload import cache
from fisher_lab.workload.gradient import GradientOptions
from fisher_lab.workload.snapshot import SnapshotError

STATE_FORMAT = 2
"""Raised where what is in a saved state changes: the states of other formats are refused."""
CURVE_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "heldout_loss", "seconds")


@dataclass(frozen=True)
class TrainingRun:
    """All that decides what comes out of a training beside model, text and initial weights.

    Attributes:
        steps: How many.
        batch_size: Sequences a step.
        seq_len: Tokens a sequence.
        lr: Peak learning rate.
        seed: Of batches and dropout.
        optimizer: What is done with the gradient.
        eval_every: Steps between two held-out evaluations.
        gradient: How gradients are computed.
        divergence_factor: The training ends early where a loss is over this many times the
            first one; None: only where it is not finite.
        kfac: What a curvature optimiser takes beside ``optimizer``.
        origin: What the initial weights and the text are.
    """

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int
    optimizer: OptimizerConfig
    eval_every: int
    gradient: GradientOptions = field(default_factory=GradientOptions)
    divergence_factor: float | None = None
    kfac: KfacConfig | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A training does not continue from a saved state of another fingerprint."""
        content = asdict(self)
        # These two had other names when the format was made.
        content["passes"] = content.pop("gradient")
        content["curvature"] = content.pop("kfac") or {}
        return cache.key_of({**content, "format": STATE_FORMAT})


@dataclass
class Curve:
    """The learning curve, one row per step; a repeat differs in the columns of seconds alone."""

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
        curve: One row per step.
        heldout_loss: At the end, over all of the held-out text, in nats a label.
        best_heldout_loss: The lowest on the way (over fewer batches) or at the end.
        baseline_loss: The trivial model's, on the same held-out labels.
        seconds: Spent in steps, all attempts together; held-out evaluations are not in it.
        evaluation_seconds: Spent in held-out evaluations on the way.
        resumed_at: The step at which this attempt began.
        diverged_at: The step (from 1) at which the training diverged, or None.
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

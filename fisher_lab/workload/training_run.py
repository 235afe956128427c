"""The definition of a training and what comes out of it: `TrainingRun`, `Curve` and `Result`."""

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
from fisher_lab.workload.snapshot import SnapshotError

STATE_FORMAT = 3
"""Raised when the content of a saved state changes: states of other formats are refused."""
CURVE_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "heldout_loss", "seconds")


@dataclass(frozen=True)
class TrainingRun:
    """Everything that determines a training besides model, text and initial weights.

    Attributes:
        steps: Number of steps.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        lr: Peak learning rate.
        seed: Seed of batches and dropout.
        optimizer: The optimiser and its options.
        eval_every: Steps between two held-out evaluations.
        precision: ``fp32`` (the weights' own dtype), ``bf16`` or ``fp16`` under autocast; the
            weights keep their dtype.
        accumulation: Micro-batches that a batch is cut into; their gradients add up.
        gradient_checkpointing: Recompute activations in the backward pass.
        divergence_factor: The training ends early when a loss exceeds this multiple of the first
            one; None: only when it is not finite.
        kfac: Further options of a curvature optimiser.
        origin: Identifies the initial weights and the text.
    """

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int
    optimizer: OptimizerConfig
    eval_every: int
    precision: str = "fp32"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    divergence_factor: float | None = None
    kfac: KfacConfig | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Only a saved state with the same fingerprint can be resumed."""
        content = asdict(self)
        # The format has groups and names of its own.
        passes = ("precision", "accumulation", "gradient_checkpointing")
        content["passes"] = {name: content.pop(name) for name in passes}
        content["curvature"] = content.pop("kfac") or {}
        content["curvature"].pop("verify", None)  # it changes no number
        return cache.key_of({**content, "format": STATE_FORMAT})


@dataclass
class Curve:
    """The learning curve, one row per step; a repetition differs only in columns of seconds."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as CSV, atomically and in full precision; an updater's own columns come last."""
        columns = dict.fromkeys((*CURVE_COLUMNS, *(key for row in self.rows for key in row)))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic.write_text(path, text.getvalue())

    @classmethod
    def read(cls, path: Path, steps: int) -> Curve:
        """Read the first ``steps`` rows of a curve.

        Raises:
            SnapshotError: The file does not have them.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                kinds = {"step": int, "tokens": int}
                rows = [
                    {key: kinds.get(key, float)(value) for key, value in row.items() if value}
                    for row in csv.DictReader(file)
                ][:steps]
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path} cannot be read as a learning curve: {error}") from error
        if [row.get("step") for row in rows] != list(range(1, steps + 1)):
            raise SnapshotError(f"{path} does not have the steps 1 to {steps}")
        return cls(rows)


@dataclass
class Result:
    """The result of a training, and its state on the way.

    Attributes:
        curve: One row per step.
        seconds: Time in steps, in all attempts together, without held-out evaluations.
        evaluation_seconds: Time in held-out evaluations.
        diverged_at: The step (from 1) at which the training diverged, or None.
        resumed_at: The step at which this attempt began.
        heldout_loss: Final loss over all held-out text, in nats per label.
        best_heldout_loss: The lowest held-out loss during the training (over fewer batches) or at
            its end.
        baseline_loss: The trivial model's loss on the same held-out labels.
        curvature: ``coverage`` and ``skipped`` of the last factors, of a curvature optimiser.
    """

    curve: Curve = field(default_factory=Curve)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    diverged_at: int | None = None
    resumed_at: int = 0
    heldout_loss: float = math.nan
    best_heldout_loss: float = math.nan
    baseline_loss: float = math.nan
    curvature: dict[str, Any] = field(default_factory=dict)

    def reached(self, target: float) -> dict[str, Any] | None:
        """The first row of the curve whose held-out loss is at or under ``target``, or None."""
        for row in self.curve.rows:
            if row.get("heldout_loss", math.inf) <= target:
                return row
        return None

"""What a run tells its trackers at its beginning and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs.record import Run

from . import identity
from .base import Start, Tracker

DIRECTORY = "tracker"
"""Of the sinks' own files, in the run directory."""

ARTIFACTS = {"factors": "*.safetensors", "tables": "*.csv", "spectra": "*.json"}
"""Kind of an artifact -> which files of the run directory it is made of."""

NOT_KEPT = ("state.safetensors", identity.FILE, "run.json", "metrics.json")
"""What only the run itself needs, or what is sent otherwise."""

NAME_LENGTH = 128


def start_of(
    run: Run, config: TrackerConfig, *, task: str, overrides: Sequence[str], sweep: str | None
) -> Start:
    """What the sinks are told of a run that begins.

    Args:
        run: the run.
        config: the section ``tracker``.
        task: its task.
        overrides: as typed; the run's name where the configuration gives none.
        sweep: of which it is a cell, or None.
    """
    tracker_id, attempt = identity.claim(run.directory, run.run_id)
    directory = Path(config.directory) if config.directory else run.directory / DIRECTORY
    name = config.name or " ".join(overrides) or task
    return Start(
        run_id=run.run_id,
        tracker_id=tracker_id,
        attempt=attempt,
        config=run.record["config"],
        directory=directory.absolute(),
        name=name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…",
        group=config.group or sweep,
        job_type=task,
        tags=tuple(config.tags),
    )


def send(run: Run, config: TrackerConfig, tracker: Tracker) -> None:
    """What a run came to, whole or not, and the end.

    Args:
        run: the run, ended.
        config: the section ``tracker``.
        tracker: its sinks.
    """
    tracker.summary(run.values)
    for name, rows in run.tables.items():
        if rows:
            tracker.table(name, rows)
    for path in sorted(run.directory.glob("*.png")):
        tracker.image(path.stem, path)
    if config.artifacts:
        for kind, pattern in ARTIFACTS.items():
            for path in sorted(run.directory.glob(pattern)):
                if path.name not in NOT_KEPT:
                    tracker.artifact(path.name, path, kind)
    tracker.finish(run.status)

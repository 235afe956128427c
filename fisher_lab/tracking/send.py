"""What the trackers get at the beginning and at the end of a run."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.results import labels
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run, strict
from fisher_lab.tracking.base import Start, Tracker

NAME_FILE = "tracker.json"
DIRECTORY = "tracker"
"""The directory of the sinks' own files, in the directory of the run."""

ARTIFACTS = {"factors": "*.safetensors", "tables": "*.csv", "spectra": "*.json"}
"""The kind of an artifact and the files of the run directory that belong to it."""

NOT_KEPT = ("state.safetensors", NAME_FILE, "run.json", "metrics.json")
"""Files that only the run itself needs, or whose content is sent otherwise."""

METRICS_TABLE = "metrics.csv"
SPECTRUM_FILE = "spectral.json"
NAME_LENGTH = 128
NO_SETTINGS = ("sweeps", "sweep", "hydra", "tracker", "cache_dir", "resume", "progress")
"""The beginnings of overrides that say nothing of what a run computes."""


def name_of(directory: Path, run_id: str) -> tuple[str, int]:
    """The name of a run in the trackers, and the number of this attempt, from 1.

    ``run_id`` says what a run computes: two repeats share it, and would overwrite each other in a
    service that knows runs by their names. The name is therefore ``run_id`` with a random suffix.
    It is drawn when a run directory is first used, and every later attempt reads it there.

    Args:
        directory: the run directory.
        run_id: of the run; if it has changed since the last attempt, a new name is drawn.
    """
    path = directory / NAME_FILE
    try:
        known = atomic.read_object(path)
        if known["run_id"] != run_id:
            raise ValueError("another run used this directory")
        name, attempt = str(known["id"]), int(known["attempt"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        name, attempt = f"{run_id}-{secrets.token_hex(4)}", 1
    atomic.write_json(path, {"run_id": run_id, "id": name, "attempt": attempt})
    return name, attempt


def start_of(run: Run, config: TrackerConfig, *, task: str, overrides: Sequence[str]) -> Start:
    """What the sinks get when a run begins.

    Args:
        run: the run.
        config: the section ``tracker``.
        task: the run's task.
        overrides: as typed; they name the run if the configuration gives no name.
    """
    tracker_id, attempt = name_of(run.directory, run.run_id)
    directory = Path(config.directory) if config.directory else run.directory / DIRECTORY
    name = config.run_name or in_words(overrides) or task
    above = run.directory.resolve().parent
    sweep = above.name if (above / "sweep.json").exists() else None
    return Start(
        run_id=run.run_id,
        tracker_id=tracker_id,
        attempt=attempt,
        config=strict(run.record["config"]),
        directory=directory.absolute(),
        name=name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…",
        cell=in_words(one for one in overrides if not one.startswith("seed=")) or task,
        group=config.group or sweep,
        job_type=task,
        tags=tuple(config.tags),
    )


def in_words(overrides: Iterable[str]) -> str:
    """Settings as figures name them: ``damping=1e-4, policy=auto``; nothing of where runs lie."""
    pairs = [one.lstrip("+").partition("=") for one in overrides]
    shown = [
        f"{labels.setting(key.replace('/', '.')).short}={value}" if sign else key
        for key, sign, value in pairs
        if key.partition(".")[0].partition("/")[0] not in NO_SETTINGS
    ]
    return ", ".join(shown)


def eigenvalues(file: Path) -> list[dict[str, Any]]:
    """One row per eigenvalue of each block in a file of spectra; none if there is no such file."""
    try:
        blocks = atomic.read_object(file)["per_block"]
        return [
            {"block": name, "index": index, "eigenvalue": value}
            for name, block in blocks.items()
            for index, value in enumerate(block["eigenvalues"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _in_words(run: Run) -> list[dict[str, Any]]:
    """The metrics of a run with their words, units and directions."""
    entries = {name: labels.metric(name) for name in run.values}
    return [
        {"metric": name, "words": e.label, "value": run.values[name], "unit": e.unit,
         "better": None if e.better is None else str(e.better)}
        for name, e in entries.items()
    ]  # fmt: skip


def send(run: Run, config: TrackerConfig, tracker: Tracker) -> None:
    """Send what a run has produced, whatever its status, and end it.

    Args:
        run: the run, ended.
        config: the section ``tracker``.
        tracker: the run's tracker.
    """
    directory = run.directory.resolve()
    tracker.summary(run.values)
    if run.values:
        tracker.table(METRICS_TABLE, _in_words(run))
    for name, rows in run.tables.items():
        if rows:
            tracker.table(name, rows)
    for path in sorted(directory.glob("*.png")):
        tracker.image(path.stem, path)
    spectrum = eigenvalues(directory / SPECTRUM_FILE)
    if spectrum:
        tracker.table("spectrum.csv", spectrum)
    if config.artifacts:
        for kind, pattern in ARTIFACTS.items():
            for path in sorted(directory.glob(pattern)):
                if path.name not in NOT_KEPT:
                    tracker.artifact(path.name, path, kind)
    tracker.finish(run.status.value)

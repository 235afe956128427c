"""What a run tells its trackers at its beginning and at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs.record import Run
from fisher_lab.tracking import identity
from fisher_lab.tracking.base import Start, Tracker

DIRECTORY = "tracker"
"""Of the sinks' own files, in the run directory."""

ARTIFACTS = {"factors": "*.safetensors", "tables": "*.csv", "spectra": "*.json"}
"""Kind of an artifact -> which files of the run directory it is made of."""

NOT_KEPT = ("state.safetensors", identity.FILE, "run.json", "metrics.json")
"""What only the run itself needs, or what is sent otherwise."""

SPECTRUM_FILE = "spectral.json"
NAME_LENGTH = 128


SWEEP_FILES = ("sweep.json", "multirun.yaml")
"""What the directory over a run's own holds where that is a sweep's; the latter are Hydra's."""


def sweep_of(directory: Path) -> str | None:
    """The name of the sweep that a run directory lies in, or None."""
    above = directory.resolve().parent
    for name in SWEEP_FILES:
        if (above / name).exists():
            return above.name if name == SWEEP_FILES[0] else "/".join(above.parts[-2:])
    return None


def start_of(run: Run, config: TrackerConfig, *, task: str, overrides: Sequence[str]) -> Start:
    """What the sinks are told of a run that begins.

    Args:
        run: the run.
        config: the section ``tracker``.
        task: its task.
        overrides: as typed; the run's name where the configuration gives none.
    """
    tracker_id, attempt = identity.claim(run.directory, run.run_id)
    directory = Path(config.directory) if config.directory else run.directory / DIRECTORY
    cell = " ".join(one for one in overrides if not one.startswith("seed="))
    name = config.run_name or " ".join(overrides) or task
    return Start(
        run_id=run.run_id,
        tracker_id=tracker_id,
        attempt=attempt,
        config=run.record["config"],
        directory=directory.absolute(),
        name=name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…",
        cell=cell or task,
        group=config.group or sweep_of(run.directory),
        job_type=task,
        tags=tuple(config.tags),
    )


def eigenvalues(file: Path) -> list[dict[str, Any]]:
    """A row for each eigenvalue of each block in a file of spectra; none where there is no file."""
    try:
        blocks = json.loads(file.read_text(encoding="utf-8"))["per_block"]
        return [
            {"block": name, "index": index, "eigenvalue": value}
            for name, block in blocks.items()
            for index, value in enumerate(block["eigenvalues"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


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
    spectrum = eigenvalues(run.directory / SPECTRUM_FILE)
    if spectrum:
        tracker.table("spectrum.csv", spectrum)
    if config.artifacts:
        for kind, pattern in ARTIFACTS.items():
            for path in sorted(run.directory.glob(pattern)):
                if path.name not in NOT_KEPT:
                    tracker.artifact(path.name, path, kind)
    tracker.finish(run.status.value)

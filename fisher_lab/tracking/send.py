"""What the trackers get at the beginning and at the end of a run, and at the end of a sweep."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run, strict
from fisher_lab.runs.status import Status
from fisher_lab.tracking.base import Start, Tracker
from fisher_lab.tracking.process import SinkProcess
from fisher_lab.tracking.wandb import disabled

log = logging.getLogger(__name__)

NAME_FILE = "tracker.json"
DIRECTORY = "tracker"
"""The directory of the sinks' own files, in the directory of the run or of the sweep."""

ARTIFACTS = {"factors": "*.safetensors", "tables": "*.csv", "spectra": "*.json"}
"""The kind of an artifact and the files of the run directory that belong to it."""

NOT_KEPT = ("state.safetensors", NAME_FILE, "run.json", "metrics.json")
"""Files that only the run itself needs, or whose content is sent otherwise."""

SPECTRUM_FILE = "spectral.json"
NAME_LENGTH = 128
SWEEP_FILES = ("sweep.json", "multirun.yaml")
"""Files by which the parent of a run directory is known to be a sweep's; the latter is Hydra's."""

AGGREGATE = "aggregate"
"""The job type of a sweep's table as a run of its own, and the name of that table."""
GROUPS = "groups"
"""Prefix of the rows of a sweep's table in the summary, from where a bar chart can take them."""
SENT_FILE = "aggregate.json"
"""The file of a sweep's tracker directory that says which table was sent last."""


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
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["run_id"] != run_id:
            raise ValueError("another run used this directory")
        name, attempt = str(known["id"]), int(known["attempt"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        name, attempt = f"{run_id}-{secrets.token_hex(4)}", 1
    atomic.write_json(path, {"run_id": run_id, "id": name, "attempt": attempt})
    return name, attempt


def sweep_of(directory: Path) -> str | None:
    """The name of the sweep that a run directory lies in, or None."""
    above = directory.resolve().parent
    for name in SWEEP_FILES:
        if (above / name).exists():
            return above.name if name == SWEEP_FILES[0] else "/".join(above.parts[-2:])
    return None


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
    cell = " ".join(one for one in overrides if not one.startswith("seed="))
    name = config.run_name or " ".join(overrides) or task
    return Start(
        run_id=run.run_id,
        tracker_id=tracker_id,
        attempt=attempt,
        config=strict(run.record["config"]),
        directory=directory.absolute(),
        name=name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…",
        cell=cell or task,
        group=config.group or sweep_of(run.directory),
        job_type=task,
        tags=tuple(config.tags),
    )


def eigenvalues(file: Path) -> list[dict[str, Any]]:
    """One row per eigenvalue of each block in a file of spectra; none if there is no such file."""
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
    """Send what a run has produced, whatever its status, and end it.

    Args:
        run: the run, ended.
        config: the section ``tracker``.
        tracker: the run's tracker.
    """
    directory = run.directory.resolve()
    tracker.summary(run.values)
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


def aggregate(directory: Path) -> list[dict[str, Any]]:
    """The table of a sweep, averaged over seeds, which W&B's own table of runs does not show.

    Args:
        directory: of the sweep.

    Returns:
        One row per cell: the settings that differ, and for every metric ``METRIC/mean``, its
        standard deviation ``/sd``, Student's 95 % interval ``/low`` and ``/high``, and the number
        of runs ``/n``. Deviation and interval of a single run are None. Empty if no run is
        completed.

    Raises:
        ResultsError: a run's metrics or its record cannot be read.
    """
    from fisher_lab import results
    from fisher_lab.results.values import ResultsError

    runs = results.load(directory)
    for run in runs.loc[runs["status"] == Status.CORRUPT].itertuples():
        raise ResultsError(f"{run.directory}: {run.reason}")
    if Status.COMPLETED not in set(runs["status"]):
        return []
    table = results.tabulate(runs, metrics=runs.attrs["metrics"])
    rows = []
    for key in table.rows:
        row = dict(zip(table.row_names, key, strict=True))
        for metric, column in table.columns:
            s = table.cells[key, metric, column].summary
            numbers = {"mean": s.mean, "sd": s.std, "low": s.low, "high": s.high, "n": s.n}
            row |= {f"{metric}/{name}": strict(value) for name, value in numbers.items()}
        rows.append(row)
    return rows


def send_sweep(directory: Path, config: TrackerConfig) -> bool:
    """Send the table of a sweep to W&B, as a run of its own, unless the same table was sent before.

    Whatever goes wrong is one warning, and no error.

    Args:
        directory: of the sweep, whose name is the run's group.
        config: the section ``tracker``; this function waits for at most ``budget_s``.

    Returns:
        Whether it is sent, or written where `scripts/wandb_sync.sh` finds it.
    """
    directory = directory.resolve()
    if "wandb" not in config.sinks or disabled(config, os.environ):
        return False
    try:
        rows = aggregate(directory)
        content = [config.entity, config.project, directory.name, *rows]
        text = json.dumps(content, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        mark = directory / DIRECTORY / SENT_FILE
        if not rows:
            return False
        if mark.exists() and json.loads(mark.read_bytes()) == {"rows": digest}:
            return True
        sink = SinkProcess("wandb", config, config.budget_s)
        where = Path(config.directory) if config.directory else directory / DIRECTORY
        sink.start(
            Start(
                run_id=digest,
                tracker_id=f"{AGGREGATE}-{digest}",
                attempt=1,
                config={"sweep": directory.name},
                directory=where.absolute(),
                name=f"{directory.name}: {AGGREGATE}",
                group=config.group or directory.name,
                job_type=AGGREGATE,
                tags=tuple(config.tags),
            )
        )
        _send_table(sink, rows, directory)
        if sink.finished:  # otherwise the next end of the sweep tries again
            atomic.write_json(mark, {"rows": digest})
        return sink.finished
    except Exception as error:
        log.warning("the aggregated table of %s was not sent: %s", directory, error)
        return False


def _send_table(sink: Tracker, rows: list[dict[str, Any]], directory: Path) -> None:
    for number, row in enumerate(rows):
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        sink.log(numbers, number)
        sink.summary({f"{GROUPS}/{number}/{key}": value for key, value in numbers.items()})
    sink.table(f"{AGGREGATE}.csv", rows)
    for path in (directory / "table.csv", directory / "table.tex"):
        if path.exists():
            sink.artifact(path.name, path, "tables")
    for path in sorted((directory / "figures").glob("*.png")):
        sink.image(path.stem, path)
    sink.finish(Status.COMPLETED.value)

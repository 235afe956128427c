"""A sweep's table as a tracker's run of its own: mean, deviation and interval over the seeds.

W&B's own table of runs shows neither deviation nor interval. At the end of a sweep whose cells
were tracked by W&B its aggregate is sent too (job type ``aggregate``);
`scripts/wandb_dashboard.py` sends that of any directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fisher_lab import tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status
from fisher_lab.tracking import RemoteTracker, Start

log = logging.getLogger(__name__)

JOB_TYPE = "aggregate"
TABLE = "aggregate.csv"
SENT_FILE = "aggregate.json"
"""In the tracker's directory of the sweep: what was sent last."""

STATISTICS = ("mean", "sd", "low", "high", "n")
GROUPS = "groups"
"""Before the number of a row and a name, in the summary: what a bar chart can show."""
KEPT = ("table.csv", "table.tex")
FIGURES = "figures"
"""What the end of a sweep leaves beside its runs (`fisher_lab.results.finishing`)."""


def at_end(directory: Path, config: TrackerConfig) -> bool:
    """Send the aggregate of a sweep that has ended, unless the same was sent before.

    Whatever goes wrong is one warning, and no error.

    Args:
        directory: of the sweep.
        config: the section ``tracker`` of its cells.

    Returns:
        Whether it was sent, or written where `scripts/wandb_sync.sh` finds it.
    """
    if "wandb" not in config.sinks or tracking.disabled(config, os.environ):
        return False
    try:
        rows = aggregate(directory)
        mark = directory / "tracker" / SENT_FILE
        if not rows or _sent(mark) == digest_of(rows):
            return False
        if not send(rows, directory, config):
            return False  # it was warned of; the next end of the sweep tries again
        atomic.write_json(mark, {"rows": digest_of(rows)})
    except Exception as error:
        log.warning("the aggregate of %s was not sent: %s", directory, error)
        return False
    return True


def cells(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Configuration and metrics of every completed run under a directory."""
    for file in sorted(directory.rglob("run.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        metrics = file.with_name("metrics.json")
        if record["status"] == Status.COMPLETED and metrics.exists():
            yield record["config"], json.loads(metrics.read_text(encoding="utf-8"))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``kfac.damping`` and so on; lists as text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found


def aggregate(directory: Path) -> list[dict[str, Any]]:
    """A row a group: the settings that differ, then mean, deviation and 95 % interval.

    Args:
        directory: of the sweep.

    Returns:
        Columns ``<metric>/mean``, ``/sd``, ``/low``, ``/high`` and ``/n`` for every metric; a
        deviation and an interval need two seeds at least.
    """
    found = [(flat(config), metrics) for config, metrics in cells(directory)]
    keys = {key for config, _ in found for key in config} - {"seed"}
    differ = sorted(k for k in keys if len({json.dumps(c.get(k)) for c, _ in found}) > 1)
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for config, metrics in found:
        groups.setdefault(json.dumps([config.get(k) for k in differ]), []).append((config, metrics))
    rows = []
    for members in groups.values():
        row: dict[str, Any] = {key: members[0][0].get(key) for key in differ}
        for name in dict.fromkeys(name for _, metrics in members for name in metrics):
            values = [m[name] for _, m in members if m.get(name) is not None]
            row |= {f"{name}/{key}": value for key, value in moments(values).items()}
        rows.append(row)
    return rows


def moments(values: list[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation and Student's 95 % interval of some numbers."""
    from scipy import stats

    n = len(values)
    mean = statistics.fmean(values) if n else None
    result: dict[str, float | int | None] = {
        "mean": mean, "sd": None, "low": None, "high": None, "n": n,
    }  # fmt: skip
    if n > 1 and mean is not None:
        deviation = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
        result |= {"sd": deviation, "low": mean - half, "high": mean + half}
    return result


def send(rows: list[dict[str, Any]], directory: Path, config: TrackerConfig) -> bool:
    """Send an aggregate to W&B as a run, whose name is that of its content.

    Args:
        rows: of :func:`aggregate`.
        directory: of the sweep; its name is the run's group.
        config: the section ``tracker``; this waits for ``budget_s`` at most.

    Returns:
        Whether all was done within that time.

    Raises:
        fisher_lab.tracking.Stopped: the sink failed.
    """
    digest = digest_of([directory.name, *rows])
    group = config.group or directory.resolve().name
    where = Path(config.directory) if config.directory else directory / "tracker"
    config = dataclasses.replace(config, sinks=["wandb"])
    tracker = RemoteTracker("wandb", config, config.budget_s)
    tracker.start(
        Start(
            run_id=digest,
            tracker_id=f"{JOB_TYPE}-{digest}",
            attempt=1,
            config={"sweep": directory.resolve().name},
            directory=where.absolute(),
            name=f"{directory.resolve().name}: aggregate",
            group=group,
            job_type=JOB_TYPE,
            tags=tuple(config.tags),
        )
    )
    for number, row in enumerate(rows):
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        tracker.log(numbers, number)
        found = {k: v for k, v in numbers.items() if k.rpartition("/")[2] in STATISTICS}
        tracker.summary({f"{GROUPS}/{number}/{name}": value for name, value in found.items()})
    tracker.table(TABLE, rows)
    for name in KEPT:
        if (directory / name).exists():
            tracker.artifact(name, directory / name, "tables")
    for path in sorted((directory / FIGURES).glob("*.png")):
        tracker.image(path.stem, path)
    tracker.finish("completed")
    return tracker.finished


def digest_of(content: list[Any]) -> str:
    """Changes with any number of an aggregate."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sent(mark: Path) -> str | None:
    try:
        return json.loads(mark.read_bytes())["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None

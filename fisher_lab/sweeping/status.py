"""How a sweep stands, from its files and the queue; neither torch nor its launcher is needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs import record

from .layout import SWEEP_FILE, Layout
from .scheduler import is_active
from .supervisor import brief, tail

QUEUED, LOST = "queued", "lost"
ENDED = ("completed", "failed")
LOGS = ("fisher_lab.log", "job.log")


@dataclass(frozen=True)
class CellStatus:
    """One cell, as far as its files tell.

    Attributes:
        run_id: its identity, the name of its directory.
        label: its axes as on the command line.
        state: of `layout.Layout.state`, or ``queued``, or ``lost`` with the job that had it.
        seconds: that it took, or has taken so far; None where it has not begun.
        metrics: what it has measured.
        log: path of its log; None where there is none yet.
        last_line: of the log.
        reason: why it failed or ended early.
        job: its number in the queue.
    """

    run_id: str
    label: str
    state: str
    seconds: float | None
    metrics: Mapping[str, Any]
    log: str | None
    last_line: str
    reason: str | None
    job: str | None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def find(name: str) -> Layout:
    """The sweep of a directory, or of a name under ``results/``.

    Raises:
        ConfigError: there is no sweep there.
    """
    for directory in (Path(name), Path("results") / name):
        if (directory / SWEEP_FILE).is_file():
            return Layout(directory.resolve())
    raise ConfigError(
        f"{name} is no sweep: give the directory of one (with a {SWEEP_FILE}) or its name under "
        "results/"
    )


def look(layout: Layout) -> list[CellStatus]:
    """Every cell of the sweep's last launch.

    Raises:
        ConfigError: ``sweep.json`` cannot be read.
    """
    try:
        cells = json.loads(layout.sweep_file.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{layout.sweep_file} cannot be read: {error}") from None
    jobs = _jobs(layout)
    return [_cell(layout, one, jobs) for one in cells]


def _jobs(layout: Layout) -> dict[str, tuple[str, str | None]]:
    if not any(entry["event"] == "submitted" for entry in layout.journal.read()):
        return {}
    from . import slurm

    return slurm.last_jobs(layout)


def _cell(
    layout: Layout, entry: Mapping[str, Any], jobs: Mapping[str, tuple[str, str | None]]
) -> CellStatus:
    run_id = str(entry["run_id"])
    directory = layout.run_directory(run_id)
    state = layout.state(run_id)
    job, job_state = jobs.get(run_id, (None, None))
    lost = None
    if job is not None and state not in ("running", *ENDED):
        if is_active(job_state):
            state = QUEUED
        elif job_state is not None and state in ("missing", "interrupted"):
            state, lost = LOST, f"the job {job} ended as {job_state} and left no result"
    found = _record(directory)
    log = next((directory / name for name in LOGS if (directory / name).is_file()), None)
    reason = lost or (brief(directory) if state == "failed" else found.get("reason"))
    return CellStatus(
        run_id=run_id,
        label=" ".join(f"{key}={value}" for key, value in entry["axes"].items()) or run_id,
        state=state,
        seconds=_seconds(found, state),
        metrics=_metrics(directory),
        log=str(log) if log else None,
        last_line=(tail(log).splitlines() or [""])[-1] if log else "",
        reason=reason,
        job=job if is_active(job_state) else None,
    )


def _record(directory: Path) -> dict[str, Any]:
    try:
        return record.read(directory)
    except (OSError, ValueError):
        return {}


def _metrics(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / record.METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(found: Mapping[str, Any], state: str) -> float | None:
    try:
        began = datetime.fromisoformat(found["started"])
        ended = found.get("finished")
        if ended is None and state != "running":
            return None
        until = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
    except (KeyError, TypeError, ValueError):
        return None
    return (until - began).total_seconds()


def counts(cells: Sequence[CellStatus]) -> Counter[str]:
    """How many cells are in which state."""
    return Counter(cell.state for cell in cells)


def eta_s(cells: Sequence[CellStatus]) -> float | None:
    """Seconds until the last cell, at the pace of those that are done; None where nobody can say.

    As many as run now are taken to run from here on.
    """
    done = [cell.seconds for cell in cells if cell.state == "completed" and cell.seconds]
    running = [cell for cell in cells if cell.state == "running"]
    waiting = sum(cell.state not in ("running", *ENDED) for cell in cells)
    if not done or not running:
        return None
    each = sum(done) / len(done)
    left = sum(max(0.0, each - (cell.seconds or 0.0)) for cell in running) + each * waiting
    return left / len(running)

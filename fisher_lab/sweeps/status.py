"""How a sweep stands, from its files and the queue; neither torch nor its launcher is needed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs import record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import slurm
from fisher_lab.sweeps.cell import FrozenCell, label_of
from fisher_lab.sweeps.directory import JOB_LOG, LAUNCH_FILE, RUN_LOG, SWEEP_FILE, Layout
from fisher_lab.sweeps.slurm import is_active
from fisher_lab.sweeps.worker_process import tail

LOGS = (RUN_LOG, JOB_LOG)
LOOK_AGAIN_S = 2.0
"""Seconds after which a job that has left no result is looked for once more before its cell has
failed: records travel slowly over network file systems."""
STARTING_S = 30.0
"""Seconds that the launcher of a detached sweep may take until it shows that it lives."""


@dataclass(frozen=True)
class CellStatus:
    """One cell, as far as its files tell.

    Attributes:
        run_id: its identity, the name of its directory.
        label: its axes as on the command line.
        state: of ``Layout.state``, or ``queued``, or ``lost`` with the job that had it.
        seconds: that it took, or has taken so far; None where it has not begun.
        metrics: what it has measured.
        log: path of its log; None where there is none yet.
        last_line: of the log.
        reason: why it failed or ended early.
        job: its number in the queue.
        lost: the number of a job that has ended and left no result, and how the queue says that it
            ended.
    """

    run_id: str
    label: str
    state: Status
    seconds: float | None
    metrics: Mapping[str, Any]
    log: str | None
    last_line: str
    reason: str | None
    job: str | None
    lost: tuple[str, str] | None = None

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
    jobs, frozen = slurm.Jobs.of(layout), layout.frozen()
    known = slurm.states(jobs.last.values()) or {}
    return [_cell(layout, one, jobs, known, frozen.get(str(one["run_id"]))) for one in cells]


def settle(layout: Layout, before: Sequence[CellStatus]) -> list[CellStatus]:
    """Look again, and end the records of cells that were lost and still are.

    Where nobody waits for the jobs (``sweep.detach=true``) there is nobody else to do it.

    Args:
        layout: of the sweep.
        before: what :func:`look` has found some time ago.
    """
    lost = {cell.run_id: cell.lost for cell in before if cell.lost is not None}
    cells = look(layout)
    if layout.has_launcher():
        return cells  # it is the launcher's business
    still = {
        cell.run_id: cell.lost
        for cell in cells
        if cell.lost is not None and cell.lost == lost.get(cell.run_id)
    }
    if not still:
        return cells
    frozen = layout.frozen()
    for run_id, job in still.items():
        slurm.end_cell(FrozenCell.load(frozen[run_id]), *job)
    return look(layout)


def is_over(layout: Layout, cells: Sequence[CellStatus]) -> bool:
    """Whether all is said: no cell runs, is queued or has yet to be settled, no launcher lives."""
    if all(cell.state.is_final for cell in cells):
        return True
    if any(cell.state in (Status.RUNNING, Status.QUEUED, Status.LOST) for cell in cells):
        return False
    return not is_launched(layout)


def is_launched(layout: Layout) -> bool:
    """Whether a launcher of the sweep lives, or has only just been started."""
    files = layout.submissions.glob(f"*/{LAUNCH_FILE}")
    return layout.has_launcher() or any(
        time.time() - file.stat().st_mtime < STARTING_S for file in files
    )


def _cell(
    layout: Layout,
    entry: Mapping[str, Any],
    jobs: slurm.Jobs,
    job_states: Mapping[str, str],
    file: Path | None,
) -> CellStatus:
    run_id = str(entry["run_id"])
    directory = layout.run_directory(run_id)
    frozen = FrozenCell.load(file) if file is not None else None
    state = layout.state(run_id, frozen.stale_after_s) if frozen else layout.state(run_id)
    job = jobs.last.get(run_id)
    job_state = job_states.get(job) if job is not None else None
    lost = why = None
    if job is not None and is_active(job_state) and not (state.is_final or state is Status.RUNNING):
        state = Status.QUEUED
    elif frozen is not None and frozen.cancelled and state is Status.MISSING:
        state = Status.CANCELLED
    elif frozen is not None and state.is_waiting:
        current = frozen.cancelled or job not in jobs.past
        if job is not None and job_state is not None and current:
            state, lost = Status.LOST, (job, job_state)
            why = f"the job {job} ended as {job_state} and left no result"
    found = _record(directory)
    log = next((directory / name for name in LOGS if (directory / name).is_file()), None)
    reason = why or (record.brief(directory) if state is Status.FAILED else found.get("reason"))
    return CellStatus(
        run_id=run_id,
        label=label_of(entry["axes"]) or run_id,
        state=state,
        seconds=_seconds(found, state),
        metrics=_metrics(directory),
        log=str(log) if log else None,
        last_line=(tail(log).splitlines() or [""])[-1] if log else "",
        reason=reason,
        job=job if is_active(job_state) else None,
        lost=lost,
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


def _seconds(found: Mapping[str, Any], state: Status) -> float | None:
    try:
        began = datetime.fromisoformat(found["started"])
        ended = found.get("finished")
        if ended is None and state is not Status.RUNNING:
            return None
        until = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
    except (KeyError, TypeError, ValueError):
        return None
    return (until - began).total_seconds()


def counts(cells: Sequence[CellStatus]) -> Counter[Status]:
    """How many cells are in which state."""
    return Counter(cell.state for cell in cells)


def eta_s(cells: Sequence[CellStatus]) -> float | None:
    """Seconds until the last cell, at the pace of those that are done; None where nobody can say.

    As many as run now are taken to run from here on.
    """
    done = [cell.seconds for cell in cells if cell.state is Status.COMPLETED and cell.seconds]
    running = [cell for cell in cells if cell.state is Status.RUNNING]
    waiting = sum(cell.state.is_waiting for cell in cells)
    if not done or not running:
        return None
    each = sum(done) / len(done)
    left = sum(max(0.0, each - (cell.seconds or 0.0)) for cell in running) + each * waiting
    return left / len(running)

"""``fisher-lab status`` and ``cancel``: how a sweep stands, from its files and the queue.

Neither torch nor the launcher is needed. A look writes nothing: whoever looks may be another user,
on another cluster, or not allowed to write, and what SLURM does not know *here* is unknown.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.live import Live

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs import atomic, record
from fisher_lab.runs.lock import STALE_AFTER
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import retry, slurm
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, label_of
from fisher_lab.sweeps.directory import LAUNCH_FILE, SWEEP_FILE, Layout, tail
from fisher_lab.sweeps.status_table import CellStatus, screen

LOOK_AGAIN_S = 2.0
"""Seconds after which a job that has left no result is looked for once more: records travel slowly
over network file systems."""
STARTING_S = 30.0
"""Seconds that the launcher of a detached sweep may take until it shows that it lives."""


def _sweep(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The parsed arguments of a command, with the sweep's layout."""

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {parser.prog} --help shows what is allowed")

    parser.error = fail
    parser.add_argument("sweep", help="a sweep's directory, or its name under results/")
    chosen = parser.parse_args(arguments)
    for directory in (Path(chosen.sweep), Path("results") / chosen.sweep):
        if (directory / SWEEP_FILE).is_file():
            chosen.layout = Layout(directory.resolve())
            return chosen
    raise ConfigError(
        f"{chosen.sweep} is no sweep: give the directory of one (with a {SWEEP_FILE}) or its name "
        "under results/"
    )


def status(arguments: Sequence[str]) -> int:
    """Show the cells of a sweep; returns the exit code.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
    """
    parser = ArgumentParser("fisher-lab status", description="How the cells of a sweep stand.")
    again = "again and again, until nothing runs or waits any more"
    parser.add_argument("--watch", action="store_true", help=again)
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--metrics", metavar="A,B", help="default: those of the claims")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    chosen = _sweep(parser, arguments)
    layout: Layout = chosen.layout
    metrics = None if chosen.metrics is None else list(filter(None, chosen.metrics.split(",")))
    cells = look_twice(layout)
    if chosen.json:
        print(json.dumps([asdict(cell) for cell in cells], indent=2, ensure_ascii=False))
        return 0
    from fisher_lab.results.console import standard_output

    console = standard_output()
    if not chosen.watch:
        console.print(screen(layout, cells, metrics))
    else:
        live = Live(console=console, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), live:
            live.update(screen(layout, cells, metrics), refresh=True)
            while not is_over(layout, cells):
                time.sleep(max(0.1, chosen.every))
                cells = look_twice(layout)
                live.update(screen(layout, cells, metrics), refresh=True)
    if any(cell.state in (Status.LOST, Status.UNKNOWN) for cell in cells):
        print("run the sweep's command again, where its jobs are known, to go on with such cells")
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """Cancel what runs and what waits of a sweep; returns the exit code.

    Launchers and workers find the mark that is left in their submissions; processes of this machine
    and jobs of SLURM are signalled at once. Cells save their state, and the same sweep can be run
    again.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
    """
    parser = ArgumentParser("fisher-lab cancel", description="End the running cells of a sweep.")
    layout: Layout = _sweep(parser, arguments).layout
    before = look(layout)
    open_cells = [cell for cell in before if cell.state in (Status.RUNNING, Status.QUEUED)]
    for submission in [*layout.submissions.glob("*"), *layout.controls.submissions.glob("*")]:
        (submission / CANCELLED_FILE).touch()
    layout.journal.append("cancel", cells=[cell.run_id for cell in open_cells])
    jobs = [cell.job for cell in before if cell.job is not None]
    if not slurm.cancel(jobs):
        print(f"fisher_lab: scancel failed for {', '.join(jobs)}", file=sys.stderr)
        return 1
    frozen = layout.frozen()
    asked = sum(
        layout.ask_holder(cell.run_id, _stale_after_s(_frozen(frozen.get(cell.run_id))))
        for cell in open_cells
        if cell.job is None
    )
    print(
        f"cancelled {len(open_cells)} cells of {layout.directory.name}: {len(jobs)} jobs of "
        f"SLURM, {asked} processes on this machine"
    )
    return 0


def look(layout: Layout) -> list[CellStatus]:
    """Every cell of the sweep's last launch.

    Raises:
        ConfigError: ``sweep.json`` cannot be read.
    """
    cells = atomic.read_json(layout.sweep_file).get("cells")
    if not isinstance(cells, list) or not all(_is_entry(one) for one in cells):
        raise ConfigError(f"{layout.sweep_file} cannot be read")
    jobs, files = slurm.Jobs.of(layout), layout.frozen()
    failed = retry.failures(layout.journal.read())
    frozen = {one["run_id"]: _frozen(files.get(one["run_id"])) for one in cells}
    states = {name: layout.state(name, _stale_after_s(cell)) for name, cell in frozen.items()}
    asked = {jobs.last[name] for name in states if name in jobs.last and not states[name].is_final}
    known = (slurm.states(jobs.here(asked, slurm.cluster())) or {}) if asked else {}
    return [
        _cell(
            layout,
            one,
            states[one["run_id"]],
            jobs,
            known,
            frozen[one["run_id"]],
            failed.get(one["run_id"], []),
        )
        for one in cells
    ]


def _is_entry(cell: Any) -> bool:
    """Whether an entry of ``sweep.json`` names a cell, and no directory elsewhere."""
    known = isinstance(cell, dict) and isinstance(cell.get("axes"), dict)
    return known and atomic.is_name(cell.get("run_id"))


def look_twice(layout: Layout) -> list[CellStatus]:
    """:func:`look`, and once more after a while where a job seems to have left no result."""
    cells = look(layout)
    if any(cell.state in (Status.LOST, Status.UNKNOWN) for cell in cells):
        time.sleep(LOOK_AGAIN_S)
        cells = look(layout)
    return cells


def is_over(layout: Layout, cells: Sequence[CellStatus]) -> bool:
    """Whether all is said: no cell runs or is queued, and no launcher lives."""
    if all(cell.state.is_final for cell in cells):
        return True
    if any(cell.state in (Status.RUNNING, Status.QUEUED) for cell in cells):
        return False
    files = layout.submissions.glob(f"*/{LAUNCH_FILE}")  # one may only just have been started
    starting = any(time.time() - file.stat().st_mtime < STARTING_S for file in files)
    return not (starting or layout.has_launcher())


def _frozen(file: Path | None) -> Cell | None:
    """The frozen cell of a file; None where there is none that this version can read."""
    with contextlib.suppress(ValueError):
        return Cell.load(file) if file is not None else None
    return None


def _stale_after_s(cell: Cell | None) -> float:
    return cell.config.resume.stale_after_s if cell is not None else STALE_AFTER


def _cell(
    layout: Layout,
    entry: Mapping[str, Any],
    state: Status,
    jobs: slurm.Jobs,
    job_states: Mapping[str, str],
    frozen: Cell | None,
    failures: Sequence[Mapping[str, Any]],
) -> CellStatus:
    run_id = str(entry["run_id"])
    directory = layout.run_directory(run_id)
    job = jobs.last.get(run_id)
    job_state = job_states.get(job) if job is not None else None
    is_last_word = frozen is not None and (frozen.cancelled or job not in jobs.past)
    why = None
    if slurm.is_active(job_state) and not (state.is_final or state is Status.RUNNING):
        state = Status.QUEUED
    elif frozen is not None and frozen.cancelled and state is Status.MISSING:
        state = Status.CANCELLED
    elif job and state.is_waiting and is_last_word:
        if job_state in (None, slurm.GONE):
            state = Status.UNKNOWN
            why = f"its job {job} is not known here{_place(jobs.clusters.get(job))}"
        elif job_state == "CANCELLED":
            state = Status.CANCELLED
        else:
            state, why = Status.LOST, slurm.lost_message(layout, job, job_state)
    found = atomic.read_json(directory / record.RUN_FILE)
    logs = layout.logs(run_id)
    reason = why or (record.brief(directory) if state is Status.FAILED else found.get("reason"))
    return CellStatus(
        run_id=run_id,
        label=label_of(entry["axes"]) or run_id,
        state=state,
        seconds=_seconds(found, state),
        metrics=atomic.read_json(directory / record.METRICS_FILE),
        log=str(logs[0]) if logs else None,
        last_line=(tail(logs[0]).splitlines() or [""])[-1] if logs else "",
        reason=reason,
        job=job if slurm.is_active(job_state) else None,
        failures=failures,
    )


def _place(cluster: str | None) -> str:
    return f" (it was submitted to the cluster {cluster})" if cluster else ""


def _seconds(found: Mapping[str, Any], state: Status) -> float | None:
    began, ended = found.get("started"), found.get("finished")
    if began is None or (ended is None and state is not Status.RUNNING):
        return None
    until = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
    return (until - datetime.fromisoformat(began)).total_seconds()

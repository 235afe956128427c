"""One frozen cell, run under its lock: ``python -m fisher_lab.sweeps.worker FILE``.

A worker runs the cell only where it holds the lock and nobody has completed the cell; it appends
what happened to the journal; and its exit code says how it ended. A worker that is killed leaves a
record with the status ``running`` and a lock whose holder is gone, which is how everybody else
knows. On several nodes each has a worker: the others than that of node 0 only run their ranks.
"""

from __future__ import annotations

import contextlib
import logging
import logging.config
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_lab.distributed import launch
from fisher_lab.runs import atomic, record, screen
from fisher_lab.runs.lock import LockLost
from fisher_lab.runs.signals import Interrupted, Watch, leave
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell, death

if TYPE_CHECKING:
    from fisher_lab.runs.lock import Lock

Append = Callable[..., None]
"""Notes an event: `Journal.append`, or what stands for it."""

COMPLETED, FAILED, HELD, PREEMPTED, CANCELLED = 0, 1, 3, 75, 76
"""Exit codes. ``HELD``: somebody else runs the cell."""

SCHEDULED = "FISHER_LAB_SCHEDULED"
"""Set where a scheduler runs the worker: its SIGTERM is no wish of the user's."""


def main(arguments: list[str]) -> int:
    """Run the frozen cell of a file; returns the exit code."""
    return perform(lambda: Cell.load(Path(arguments[0])))


def perform(load: Callable[[], Cell], append: Append | None = None) -> int:
    """Run a frozen cell in a process that is there for it; returns the exit code.

    Args:
        load: gives the cell.
        append: of :func:`run`.
    """
    try:
        with Watch():
            cell = load()
            if os.path.isdir(cell.cwd):  # where relative paths are meant from
                os.chdir(cell.cwd)
            return run(cell, append)
    except Interrupted as stop:
        return PREEMPTED if stop.status is Status.PREEMPTED else CANCELLED


def node_of(cell: Cell) -> int:
    """This node among those of a cell.

    Raises:
        LaunchError: the environment does not say it.
    """
    given = cell.config.distributed
    return launch.place(given.nproc, given.nodes, os.environ).node


def run(cell: Cell, append: Append | None = None) -> int:
    """Run a frozen cell in this process.

    Args:
        cell: on one node, or on several of which this is one.
        append: notes an event, its name and its details; None: in the journal.

    Returns:
        One of the exit codes above.

    Raises:
        Interrupted: a signal ended the cell; everything is recorded.
    """
    if cell.config.distributed.nodes == 1:
        return _run(cell, append)
    from fisher_lab.distributed.nodes import NodeError
    from fisher_lab.tasks import ranks

    is_first = node_of(cell) == 0
    try:
        with ranks.connected_nodes(cell.config) as nodes:
            if nodes is None or nodes.is_first:
                return _run(cell)
            # Once node 0 holds the lock of the cell.
            directory = nodes.directory()
            if directory is None:
                return HELD
            log_file = ranks.node_log(nodes.where.node, directory)
            with _logging(cell, ranks.log_of(cell.own_logging(), log_file)):
                return COMPLETED if _begin(cell, directory) is Status.COMPLETED else FAILED
    except NodeError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return _run(cell, problem=error) if is_first else FAILED


def _begin(cell: Cell, directory: Path) -> Status:
    from fisher_lab.tasks import runner
    from fisher_lab.tasks.run_spec import RunSpec

    spec = RunSpec(cell.config, directory, tuple(cell.overrides), cell.content)
    return runner.begin(spec, cell.own_logging()).status


def _run(cell: Cell, append: Append | None = None, problem: Exception | None = None) -> int:
    """Run a cell under its lock, or record there why it cannot be run."""
    lock = cell.lock
    if not lock.acquire():
        return HELD
    with lock:
        if record.status_of(cell.directory) is Status.COMPLETED:
            cell.layout.note(cell.run_id, Status.COMPLETED)
            return COMPLETED
        if cell.cancelled:  # it was in a queue when the user cancelled, and came back
            return CANCELLED
        about = {"run_id": cell.run_id, "pid": os.getpid(), "host": os.uname().nodename}
        append = append or partial(cell.layout.journal.append_unless, lock.check)
        try:
            append("started", **about)
            if (cell.directory / record.RUN_FILE).exists():  # it says nothing of this attempt
                given = {"config": asdict(cell.config), "overrides": cell.overrides}
                record.Run.start(cell.directory, **given, identity=cell.content)
            return _perform(cell, lock, append, problem)
        except LockLost:
            return HELD


def _perform(cell: Cell, lock: Lock, append: Append, problem: Exception | None) -> int:
    stopped: Interrupted | None = None
    with _logging(cell, cell.own_logging()):
        try:
            if problem is not None:
                raise problem
            _begin(cell, cell.directory)
        except Interrupted as stop:
            stopped = stop
            _amend(cell, stop)
        except Exception as error:  # before or after the task, which handles its own
            if isinstance(error, OSError) and error.errno in atomic.DISK_ERRORS:
                raise  # there is no room for its record either, nor for the next cell's
            logging.getLogger(__name__).exception("the cell failed")
            described = record.describe(error)
            cell.end_record(Status.FAILED, record.headline(described), described)
    if lock.lost.is_set():
        # Frozen for so long that somebody else has taken the cell: it is theirs to speak of.
        return HELD
    status = record.status_of(cell.directory) or Status.FAILED
    if status is Status.RUNNING:  # the disk was full when it was to be ended: perhaps still
        status, reason = Status.FAILED, "its record could not be ended"
        cell.end_record(status, reason, death(f"{reason}; its log says why"))
    reason = {"reason": stopped.signum.name} if stopped is not None else {}
    append(**cell.layout.end_of(cell.run_id, status, **reason))
    if stopped is not None and status is not Status.COMPLETED:
        raise stopped
    return COMPLETED if status is Status.COMPLETED else FAILED


def _amend(cell: Cell, stop: Interrupted) -> None:
    """What a signal means depends on who sent it: a scheduler ends jobs that may come back."""
    if stop.status is Status.CANCELLED and os.environ.get(SCHEDULED) and not cell.cancelled:
        cell.end_record(Status.PREEMPTED, stop.signum.name)
    elif record.status_of(cell.directory) in (None, Status.RUNNING):  # before the record was begun
        cell.end_record(stop.status, stop.signum.name)


@contextlib.contextmanager
def _logging(cell: Cell, settings: Mapping[str, Any]) -> Iterator[None]:
    """Log into the run directory; what was set up before is set up again afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    cell.directory.mkdir(parents=True, exist_ok=True)
    logging.config.dictConfig(dict(settings))
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


if __name__ == "__main__":
    screen.install()
    leave(main(sys.argv[1:]))

"""One frozen cell, run under its lock: ``python -m fisher_lab.sweeps.worker FILE``.

Whoever starts a worker can rely on this: it runs the cell only where it holds the lock and nobody
has completed the cell; it appends what happened to the journal; and its exit code says how it
ended. A worker that is killed leaves a record with the status ``running`` and a lock whose holder
is gone, which is how everybody else knows. On several nodes each has a worker: that of node 0 does
all this, and the others run their ranks for it.
"""

from __future__ import annotations

import contextlib
import logging
import logging.config
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_lab.runs import atomic, record
from fisher_lab.runs.signals import Interrupted, Watch, leave
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import FrozenCell

if TYPE_CHECKING:
    from fisher_lab.distributed.nodes import Nodes
    from fisher_lab.runs.lock import Lock
    from fisher_lab.tasks.run_spec import Work

COMPLETED, FAILED, HELD, PREEMPTED, CANCELLED = 0, 1, 3, 75, 76
"""Exit codes. ``HELD``: somebody else runs the cell."""

SCHEDULED = "FISHER_LAB_SCHEDULED"
"""Set where a scheduler runs the worker: its SIGTERM is no wish of the user's."""


def main(arguments: list[str]) -> int:
    """Run the frozen cell of a file; returns the exit code."""
    try:
        with Watch():
            frozen = FrozenCell.load(Path(arguments[0]))
            if os.path.isdir(frozen.data["cwd"]):  # where relative paths are meant from
                os.chdir(frozen.data["cwd"])
            return run(frozen)
    except Interrupted as stop:
        return PREEMPTED if stop.status is Status.PREEMPTED else CANCELLED


def run(frozen: FrozenCell) -> int:
    """Run a frozen cell in this process.

    Returns:
        One of the exit codes above.

    Raises:
        Interrupted: a signal ended the cell; everything is recorded.
    """
    if frozen.nodes == 1:
        return _run(frozen)
    from fisher_lab.distributed.nodes import NodeError
    from fisher_lab.tasks import ranks

    is_first = frozen.node == 0
    try:
        with ranks.connected_nodes(frozen.config) as nodes:
            if nodes is None or nodes.is_first:
                return _run(frozen)
            return _run_ranks(frozen, nodes)
    except NodeError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        if is_first:
            return _run(frozen, error)
        return FAILED


def _run_ranks(frozen: FrozenCell, nodes: Nodes) -> int:
    """Runs the ranks of another node than the first, once node 0 holds the lock of the cell."""
    from fisher_lab.tasks import ranks, runner

    directory = nodes.directory()
    if directory is None:
        return HELD
    log_file = ranks.node_log(nodes.where.node, directory)
    with _logging(frozen, ranks.log_of(frozen.logging(), log_file)):
        outcome = runner.begin(_work(frozen, directory), frozen.logging())
    return COMPLETED if outcome.status == "completed" else FAILED


def _run(frozen: FrozenCell, problem: Exception | None = None) -> int:
    """Run a cell under its lock, or record there why it cannot be run."""
    layout, run_id = frozen.layout, frozen.run_id
    lock = layout.lock(run_id, frozen.stale_after_s)
    if not lock.acquire():
        return HELD
    with lock:
        if record.status_of(frozen.directory) is Status.COMPLETED:
            layout.note(run_id, Status.COMPLETED)
            return COMPLETED
        if frozen.cancelled:  # it was in a queue when the user cancelled, and came back
            return CANCELLED
        atomic.clear_leftovers(frozen.directory)
        (frozen.directory / record.RUN_FILE).unlink(missing_ok=True)
        layout.journal.append("started", run_id=run_id, pid=os.getpid(), host=os.uname().nodename)
        return _perform(frozen, lock, problem)


def _work(frozen: FrozenCell, directory: Path) -> Work:
    from fisher_lab.tasks.run_spec import Work

    overrides, content = tuple(frozen.data["overrides"]), frozen.data["content"]
    return Work(frozen.config, directory, overrides, content)


def _perform(frozen: FrozenCell, lock: Lock, problem: Exception | None = None) -> int:
    from fisher_lab.tasks import runner

    stopped: Interrupted | None = None
    with _logging(frozen, frozen.logging()):
        try:
            if problem is not None:
                raise problem
            runner.begin(_work(frozen, frozen.directory), frozen.logging())
        except Interrupted as stop:
            stopped = stop
            _amend(frozen, stop)
        except Exception as error:  # before or after the task, which handles its own
            logging.getLogger(__name__).exception("the cell failed")
            _fail(frozen, error)
    status = record.status_of(frozen.directory) or Status.FAILED
    if lock.lost.is_set():
        # Frozen for so long that somebody else has taken the cell: it is theirs to speak of.
        return HELD
    reason = {"reason": stopped.signum.name} if stopped is not None else {}
    frozen.layout.journal.append(status, run_id=frozen.run_id, **reason)
    if stopped is not None and status is not Status.COMPLETED:
        raise stopped
    return COMPLETED if status is Status.COMPLETED else FAILED


def _amend(frozen: FrozenCell, stop: Interrupted) -> None:
    """What a signal means depends on who sent it: a scheduler ends jobs that may come back."""
    directory, status = frozen.directory, record.status_of(frozen.directory)
    if stop.status is Status.CANCELLED and os.environ.get(SCHEDULED) and not frozen.cancelled:
        record.end_from_outside(directory, Status.PREEMPTED, stop.signum.name)
    elif status in (None, Status.RUNNING):  # it came before the record was begun
        record.end_from_outside(directory, stop.status, stop.signum.name, otherwise=frozen.record())


def _fail(frozen: FrozenCell, error: Exception) -> None:
    described = record.describe(error)
    record.end_from_outside(
        frozen.directory,
        Status.FAILED,
        record.headline(described),
        error=described,
        otherwise=frozen.record(),
    )


@contextlib.contextmanager
def _logging(frozen: FrozenCell, settings: Mapping[str, Any]) -> Iterator[None]:
    """Log into the run directory; what was set up before is set up again afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    frozen.directory.mkdir(parents=True, exist_ok=True)
    logging.config.dictConfig(dict(settings))
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

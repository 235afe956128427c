"""``hydra/launcher=serial``: one cell after the other, in the launching process.

The libraries are imported once, a debugger works, and nothing has to be set up: the default. A cell
that takes the process down takes the sweep with it, until it is started again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from fisher_lab.runs import record
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import FrozenCell
from fisher_lab.sweeps.directory import RUN_LOG
from fisher_lab.sweeps.queue import Executor
from fisher_lab.sweeps.tally import Outcome, say
from fisher_lab.sweeps.worker_process import keep_tail, tail


class InProcess(Executor):
    """Runs a cell to its end in ``start``."""

    def __init__(self) -> None:
        self._started = 0
        self._ended: list[tuple[FrozenCell, Outcome]] = []

    @property
    def running(self) -> list[FrozenCell]:
        """The cell that has ended and was not yet reported."""
        return [cell for cell, _ in self._ended]

    def start(self, cells: Sequence[FrozenCell]) -> None:
        """Run cells.

        Raises:
            Interrupted: a signal ended a cell; its record says so.
        """
        for cell in cells:
            say(f"#{self._started} : {cell.label}")
            self._started += 1
            self._ended.append((cell, _run(cell)))

    def ended(self) -> list[tuple[FrozenCell, Outcome]]:
        """What :meth:`start` has run."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self, cells: Sequence[FrozenCell]) -> None:
        """Nothing runs while the queue is at work."""

    @contextlib.contextmanager
    def signals(self, watch: Watch) -> Iterator[Pending]:
        """They are raised at once, in the cell that runs."""
        yield Pending()


def _run(cell: FrozenCell) -> Outcome:
    began = time.monotonic()
    code = worker.run(cell)
    if code == worker.HELD:
        return Outcome(Status.HELD)
    if code == worker.CANCELLED:  # the user has cancelled the sweep at this very moment
        return Outcome(Status.NOT_STARTED)
    status, message = record.status_of(cell.directory) or Status.FAILED, None
    if status is Status.FAILED:
        message = record.brief(cell.directory)
        lock = cell.layout.lock(cell.run_id, cell.stale_after_s)
        if lock.acquire():
            with lock:
                keep_tail(cell.directory, tail(cell.directory / RUN_LOG))
    return Outcome(status, message, time.monotonic() - began)

"""``hydra/launcher=serial`` and ``local``: cells in the launching process, or in others beside it.

``serial`` is the default: one cell after the other, the libraries are imported once, and a debugger
works. A cell that takes the process down takes the sweep with it, until it is started again.
``local`` runs a bounded number of worker processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from fisher_lab.config.launchers import LocalSettings, SerialSettings
from fisher_lab.runs import record
from fisher_lab.runs.provenance import allowed_cpus
from fisher_lab.runs.signals import Interrupted, Pending, Watch
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import Cell, Outcome
from fisher_lab.sweeps.queue import Executor, say
from fisher_lab.sweeps.worker_process import WorkerProcess

GRACE_S = 30.0
"""Seconds that a cell in a process of its own has to save its state, with the serial launcher."""


class InProcess(Executor):
    """Runs a cell to its end in ``start``; one whose times are compared in another process."""

    has_bar = False

    def __init__(self, settings: SerialSettings) -> None:
        self._started = 0
        self._ended: list[tuple[Cell, Outcome]] = []

    @property
    def running(self) -> list[Cell]:
        """The cells that have ended and were not yet reported."""
        return [cell for cell, _ in self._ended]

    def start(self, cells: Sequence[Cell]) -> None:
        """Run cells.

        Raises:
            Interrupted: a signal ended a cell; its record says so.
        """
        for cell in cells:
            say(f"#{self._started} : {cell.label}")
            self._started += 1
            if cell.alone:
                self._ended.append((cell, self._in_a_process(cell)))
                continue
            began, code = time.monotonic(), worker.run(cell)
            if code in (worker.HELD, worker.CANCELLED):  # by the user, at this very moment
                status = Status.HELD if code == worker.HELD else Status.NOT_STARTED
                self._ended.append((cell, Outcome(status)))
                continue
            status = record.status_of(cell.directory) or Status.FAILED
            message = record.brief(cell.directory) if status is Status.FAILED else None
            self._ended.append((cell, Outcome(status, message, time.monotonic() - began)))

    def _in_a_process(self, cell: Cell) -> Outcome:
        """Run a cell whose times are compared: their unit is a process.

        What cells before it have imported, compiled and cached is none of its own.
        """
        process = WorkerProcess(cell, threads=None, grace_s=GRACE_S)
        try:
            while (outcome := process.poll()) is None:
                time.sleep(self.pause_s)
        except Interrupted as stop:
            process.ask(stop.signum)
            while process.poll() is None:
                time.sleep(self.pause_s)
            raise
        return outcome

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """What :meth:`start` has run."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self, cells: Sequence[Cell]) -> None:
        """Nothing runs while the queue is at work."""

    def signals(self, watch: Watch) -> AbstractContextManager[Pending]:
        """They are raised at once, in the cell that runs."""
        return contextlib.nullcontext(Pending())


class LocalProcesses(Executor):
    """A worker process for each cell.

    Args:
        settings: of the launcher.
    """

    def __init__(self, settings: LocalSettings) -> None:
        self.limit = settings.n_jobs
        self._threads = threads_for(settings)
        self._grace_s = settings.grace_s
        self._processes: list[WorkerProcess] = []

    @property
    def running(self) -> list[Cell]:
        """The cells of the processes."""
        return [process.cell for process in self._processes]

    def start(self, cells: Sequence[Cell]) -> None:
        """Start a process for each cell."""
        for cell in cells:
            process = WorkerProcess(cell, threads=self._threads, grace_s=self._grace_s)
            self._processes.append(process)

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Enforce the limits of the processes; those that have ended, with their outcome."""
        outcomes = [(process, process.poll()) for process in self._processes]
        self._processes = [process for process, outcome in outcomes if outcome is None]
        return [(process.cell, outcome) for process, outcome in outcomes if outcome is not None]

    def stop(self, cells: Sequence[Cell]) -> None:
        """Send SIGTERM, and SIGKILL after the grace period."""
        for process in self._processes:
            if process.cell in cells:
                process.ask(signal.SIGTERM)

    def abandon(self) -> None:
        """End the processes."""
        self.stop(self.running)
        for process in self._processes:
            process.end()

    @contextlib.contextmanager
    def signals(self, watch: Watch) -> Iterator[Pending]:
        """As always; the launcher also goes on when its terminal is closed."""
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
                stack.callback(signal.signal, signal.SIGHUP, before)
            yield stack.enter_context(watch.deferred())


def threads_for(settings: LocalSettings) -> int:
    """Threads that a cell gets."""
    if settings.threads is not None:
        return settings.threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, (allowed_cpus() or 1) // settings.n_jobs)

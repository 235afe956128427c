"""``hydra/launcher=local``: a bounded number of worker processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

from fisher_lab.config.launchers import LocalSettings
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.sweeps.cell import FrozenCell
from fisher_lab.sweeps.queue import Executor
from fisher_lab.sweeps.tally import Outcome
from fisher_lab.sweeps.worker_process import WorkerProcess


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
    def running(self) -> list[FrozenCell]:
        """The cells of the processes."""
        return [process.cell for process in self._processes]

    def start(self, cells: Sequence[FrozenCell]) -> None:
        """Start a process for each cell."""
        for cell in cells:
            process = WorkerProcess(cell, threads=self._threads, grace_s=self._grace_s)
            self._processes.append(process)

    def ended(self) -> list[tuple[FrozenCell, Outcome]]:
        """Enforce the limits of the processes; those that have ended, with their outcome."""
        outcomes = [(process, process.poll()) for process in self._processes]
        self._processes = [process for process, outcome in outcomes if outcome is None]
        return [(process.cell, outcome) for process, outcome in outcomes if outcome is not None]

    def stop(self, cells: Sequence[FrozenCell]) -> None:
        """Send SIGTERM, and SIGKILL after the grace period."""
        for process in self._processes:
            if process.cell in cells:
                process.ask(signal.SIGTERM)

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
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (allowed or 1) // settings.n_jobs)

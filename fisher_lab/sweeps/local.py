"""``hydra/launcher=local``: a bounded pool of worker processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fisher_lab.config.launchers import LocalSettings
from fisher_lab.runs.signals import Watch
from fisher_lab.sweeps.cell import Cell, Frozen
from fisher_lab.sweeps.tally import Tally
from fisher_lab.sweeps.waiting import Waiting
from fisher_lab.sweeps.worker_process import Job, give_up

TICK_S = 0.02


def run(
    cells: Sequence[Cell], frozen: Sequence[Frozen], tally: Tally, settings: LocalSettings
) -> None:
    """Run cells, at most ``n_jobs`` at a time.

    Args:
        cells: what is to be done, in this order.
        frozen: the same, as submitted.
        tally: is told how each ended.
        settings: of the launcher.

    Raises:
        Interrupted: a signal came; the jobs have saved their state and ended.
    """
    pool = _Pool(list(zip(cells, frozen, strict=True)), tally, settings)
    with _without_terminal(), Watch() as watch, watch.deferred() as pending:
        while pool.busy:
            pool.step()
            if pending():
                pool.stop()
                pending.stop()
            time.sleep(TICK_S)


def threads_for(settings: LocalSettings) -> int:
    """Threads that a cell gets."""
    if settings.threads is not None:
        return settings.threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (allowed or 1) // settings.n_jobs)


@contextlib.contextmanager
def _without_terminal() -> Iterator[None]:
    """Go on when the terminal is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


class _Pool:
    """Who runs and who waits."""

    def __init__(
        self, work: list[tuple[Cell, Frozen]], tally: Tally, settings: LocalSettings
    ) -> None:
        self._waiting = Waiting(work, tally)
        self._running: list[tuple[Cell, Job]] = []
        self._requeues: Counter[str] = Counter()
        self._tally = tally
        self._settings = settings
        self._threads = threads_for(settings)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> None:
        """Take note of what has ended or is no longer wanted; start what there is room for."""
        for cell, job in list(self._running):
            ending = job.poll()
            if ending is None:
                continue
            self._running.remove((cell, job))
            if ending.status == "cancelled":
                self._waiting.look_soon()
            if ending.status == "held":
                self._waiting.elsewhere.add(cell, job.frozen)
            elif ending.status == "preempted":
                self._preempted(cell, job)
            else:
                self._end(cell, ending.status, ending.message, job.seconds)
        self._ask(self._waiting.drop_cancelled())
        self._waiting.refill()
        while (work := self._next()) is not None:
            self._start(*work)

    def stop(self) -> None:
        """Ask every job to save and end, and wait until they have."""
        self._ask(self._waiting.submissions)
        while self._running:
            for cell, job in list(self._running):
                if (ending := job.poll()) is not None:
                    self._running.remove((cell, job))
                    self._tally.end(cell, ending.status, ending.message, job.seconds)
            time.sleep(TICK_S)
        self._waiting.drop(self._waiting.submissions)

    def _start(self, cell: Cell, frozen: Frozen) -> None:
        if cell.layout.claim(cell.run_id, frozen.stale_after_s).alive() is not None:
            self._waiting.elsewhere.add(cell, frozen)
            return
        job = Job(frozen, threads=self._threads, grace_s=self._settings.grace_s)
        self._running.append((cell, job))

    def _next(self) -> tuple[Cell, Frozen] | None:
        return self._waiting.next([cell for cell, _ in self._running], self._settings.n_jobs)

    def _preempted(self, cell: Cell, job: Job) -> None:
        self._requeues[str(job.frozen.path)] += 1
        if self._requeues[str(job.frozen.path)] <= cell.config.sweep.max_requeues:
            self._waiting.append(cell, job.frozen)
            return
        message = f"preempted more often than sweep.max_requeues={cell.config.sweep.max_requeues}"
        give_up(job.frozen, "max_requeues", message)
        self._end(cell, "failed", message, job.seconds)

    def _end(self, cell: Cell, status: str, message: str | None, seconds: float) -> None:
        self._tally.end(cell, status, message, seconds)
        if status == "failed" and cell.config.sweep.fail_fast:
            self._waiting.drop(self._waiting.submissions)
            self._ask(self._waiting.submissions)

    def _ask(self, submissions: set[Path]) -> None:
        for _, job in self._running:
            if job.frozen.submission in submissions:
                job.ask(signal.SIGTERM)

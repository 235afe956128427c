"""``hydra/launcher=slurm_debug``: the path of a SLURM job, with submitit's local executor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fisher_lab.config.launchers import SlurmSettings
from fisher_lab.runs.signals import Watch
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Frozen
from fisher_lab.sweeps.slurm import executor, job_of
from fisher_lab.sweeps.tally import Tally
from fisher_lab.sweeps.waiting import Waiting
from fisher_lab.sweeps.worker_process import ask_owner, brief, give_up, importable

TICK_S = 0.05


def run(
    cells: Sequence[Cell], frozen: Sequence[Frozen], tally: Tally, settings: SlurmSettings
) -> None:
    """Run cells, at most ``array_parallelism`` at a time.

    Raises:
        Interrupted: a signal; the jobs that run go on, the others are left as they are.
    """
    queue = _Queue(list(zip(cells, frozen, strict=True)), tally, settings)
    with Watch() as watch, watch.deferred() as pending:
        while queue.busy:
            queue.step()
            if pending():
                pending.stop()
            time.sleep(TICK_S)


class _Queue:
    """Who runs and who waits."""

    def __init__(
        self, work: list[tuple[Cell, Frozen]], tally: Tally, settings: SlurmSettings
    ) -> None:
        self._waiting = Waiting(work, tally)
        self._running: list[tuple[Cell, Frozen, Any]] = []
        self._tally = tally
        self._settings = settings

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> None:
        """Take note of what has ended or is no longer wanted; start what there is room for."""
        for one in list(self._running):
            if one[2].done():
                self._running.remove(one)
                self._end(*one[:2])
        self._waiting.drop_cancelled()
        self._waiting.refill()
        while (work := self._next()) is not None:
            self._start(*work)

    def _start(self, cell: Cell, frozen: Frozen) -> None:
        folder, requeues = frozen.submission / "slurm" / "%j", cell.config.sweep.max_requeues
        made = executor(self._settings, folder, requeues, alone=cell.alone)
        with importable():
            job = made.submit(job_of(self._settings), str(frozen.path))
        self._running.append((cell, frozen, job))

    def _next(self) -> tuple[Cell, Frozen] | None:
        running = [cell for cell, _, _ in self._running]
        return self._waiting.next(running, self._settings.array_parallelism)

    def _end(self, cell: Cell, frozen: Frozen) -> None:
        state = cell.layout.state(cell.run_id, frozen.stale_after_s)
        if state in ("missing", "interrupted"):
            give_up(frozen, "died", "the job ended and left no result")
            state = cell.layout.state(cell.run_id, frozen.stale_after_s)
        if state == "running":
            self._waiting.elsewhere.add(cell, frozen)
            return
        message = brief(frozen.directory) if state == "failed" else None
        self._tally.end(cell, state, message, None)
        self._waiting.look_soon()
        if state == "failed" and cell.config.sweep.fail_fast:
            for submission in self._waiting.submissions:
                (submission / CANCELLED_FILE).touch()  # for jobs that have not come to their cell
            for _, other, _ in self._running:
                ask_owner(other.layout, other.run_id, other.stale_after_s)

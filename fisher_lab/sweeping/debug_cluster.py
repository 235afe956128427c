"""``hydra/launcher=slurm_debug``: the path of a SLURM job, with submitit's local executor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.launcher_schema import SlurmSettings
from fisher_lab.runs.signals import Watch

from .cell import CANCELLED_FILE, Cell, Frozen
from .elsewhere import Elsewhere
from .progress import Tally
from .slurm import executor, job_of
from .supervisor import ask_owner, brief, give_up, importable

TICK_S = 0.05
LOOK_EVERY_S = 0.5
"""Seconds between two looks for a wish to cancel."""


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
    """Who runs, who waits, and who is run by others."""

    def __init__(
        self, work: list[tuple[Cell, Frozen]], tally: Tally, settings: SlurmSettings
    ) -> None:
        self._waiting = deque(work)
        self._running: list[tuple[Cell, Frozen, Any]] = []
        self._elsewhere = Elsewhere()
        self._tally = tally
        self._settings = settings
        self._submissions = {frozen.submission for _, frozen in work}
        self._looked = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running or self._elsewhere.cells)

    def step(self) -> None:
        """Take note of what has ended or is no longer wanted; start what there is room for."""
        for one in list(self._running):
            if one[2].done():
                self._running.remove(one)
                self._end(*one[:2])
        self._look_for_wishes()
        if self._tally.exhausted:
            self._drop(self._submissions)
        self._waiting.extend(self._elsewhere.look(self._tally))
        while self._waiting and self._has_room(self._waiting[0][0]):
            self._start(*self._waiting.popleft())

    def _start(self, cell: Cell, frozen: Frozen) -> None:
        folder, requeues = frozen.submission / "slurm" / "%j", cell.config.sweep.max_requeues
        made = executor(self._settings, folder, requeues, alone=cell.alone)
        with importable():
            job = made.submit(job_of(self._settings), str(frozen.path))
        self._running.append((cell, frozen, job))

    def _has_room(self, cell: Cell) -> bool:
        if cell.alone or any(other.alone for other, _, _ in self._running):
            return not self._running
        return len(self._running) < self._settings.array_parallelism

    def _end(self, cell: Cell, frozen: Frozen) -> None:
        state = cell.layout.state(cell.run_id, frozen.stale_after_s)
        if state in ("missing", "interrupted"):
            give_up(frozen, "died", "the job ended and left no result")
            state = cell.layout.state(cell.run_id, frozen.stale_after_s)
        if state == "running":
            self._elsewhere.add(cell, frozen)
            return
        message = brief(frozen.directory) if state == "failed" else None
        self._tally.end(cell, state, message, None)
        self._looked = 0.0  # perhaps the whole sweep is cancelled: look before the next one starts
        if state == "failed" and cell.config.sweep.fail_fast:
            for submission in self._submissions:
                (submission / CANCELLED_FILE).touch()  # for jobs that have not come to their cell
            for _, other, _ in self._running:
                ask_owner(other.layout, other.run_id, other.stale_after_s)

    def _look_for_wishes(self) -> None:
        """Whether a sweep of ours is cancelled."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self._drop({one for one in self._submissions if (one / CANCELLED_FILE).exists()})

    def _drop(self, submissions: set[Path]) -> None:
        for cell, frozen in [one for one in self._waiting if one[1].submission in submissions]:
            self._waiting.remove((cell, frozen))
            self._tally.end(cell, "not started", None, None)

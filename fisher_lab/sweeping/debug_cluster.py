"""``hydra/launcher=slurm_debug``: the path of a SLURM job, with submitit's local executor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from fisher_lab.config.launcher_schema import SlurmSettings
from fisher_lab.runs import record
from fisher_lab.runs.signals import Watch

from .cell import Cell, Frozen
from .progress import Tally
from .slurm import executor, job_of
from .supervisor import brief, give_up, importable

TICK_S = 0.05


def run(
    cells: Sequence[Cell], frozen: Sequence[Frozen], tally: Tally, settings: SlurmSettings
) -> None:
    """Run cells, at most ``array_parallelism`` at a time.

    Raises:
        Interrupted: a signal; the jobs that run go on, the others are left as they are.
    """
    waiting = deque(zip(cells, frozen, strict=True))
    running: list[tuple[Cell, Frozen, Any]] = []
    with Watch() as watch, watch.deferred() as pending:
        while waiting or running:
            for cell, file, job in list(running):
                if job.done():
                    running.remove((cell, file, job))
                    _end(cell, file, tally)
            while waiting and not tally.exhausted and _has_room(waiting[0][0], running, settings):
                cell, file = waiting.popleft()
                folder = file.submission / "slurm" / "%j"
                made = executor(settings, folder, cell.config.sweep.max_requeues, alone=cell.alone)
                with importable():
                    running.append((cell, file, made.submit(job_of(settings), str(file.path))))
            if tally.exhausted:
                while waiting:
                    tally.end(waiting.popleft()[0], "not started", None, None)
            if pending():
                pending.stop()
            time.sleep(TICK_S)


def _has_room(cell: Cell, running: list[tuple[Cell, Frozen, Any]], settings: SlurmSettings) -> bool:
    if cell.alone or any(other.alone for other, _, _ in running):
        return not running
    return len(running) < settings.array_parallelism


def _end(cell: Cell, file: Frozen, tally: Tally) -> None:
    status = record.status_of(file.directory)
    if status in (None, "running"):
        give_up(file, "died", "the job ended and left no result")
        status = record.status_of(file.directory)
    message = brief(file.directory) if status == "failed" else None
    tally.end(cell, status or "failed", message, None)

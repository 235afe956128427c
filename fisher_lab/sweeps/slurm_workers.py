"""``hydra.launcher.workers``: workers as jobs of SLURM, instead of a job for every cell."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from submitit.helpers import DelayedSubmission

from fisher_lab.config.launchers import SlurmSettings
from fisher_lab.runs import environment, record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import slurm, work
from fisher_lab.sweeps.cell import Cell, Outcome
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.queue import Executor, say
from fisher_lab.sweeps.slurm import SubmititJobs
from fisher_lab.sweeps.workers import LOOK_AT_ALL_S, Workers, key_of

_REQUEUES = 1000
"""How often a worker may go back to the queue: as long as there are cells for it."""


def executor(settings: SlurmSettings) -> Executor:
    """A job for each cell, or workers."""
    return slurm.executor(settings) if settings.workers is None else SubmittedWorkers(settings)


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Runs a worker in a job of SLURM; pickled by submitit, by reference to this module.

    Attributes:
        directories: of the sweeps.
        options: of the worker.
        command: what Python is given to run one.
    """

    directories: tuple[str, ...]
    options: tuple[str, ...]
    command: tuple[str, ...]

    def __call__(self, number: int) -> int:
        """Work until no cell is left, or the time of the job is over; then it is queued again.

        Returns:
            The worker's exit code.
        """
        asked: list[int] = []
        requeue = signal.signal(signal.SIGUSR2, lambda signum, _: asked.append(signum))
        before = signal.signal(signal.SIGTERM, lambda signum, _: asked.append(signum))
        process = subprocess.Popen(
            [sys.executable, *self.command, *self.directories, *self.options],
            stdin=subprocess.DEVNULL, start_new_session=True, env=environment.child(in_job=True),
        )  # fmt: skip
        said = 0
        while (code := process.poll()) is None:
            for signum in asked[said:]:
                process.send_signal(signum)
            said = len(asked)
            time.sleep(slurm.TICK_S)
        signal.signal(signal.SIGTERM, before)
        if code in (work.LEFT, 128 + signal.SIGUSR2):
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # ends this process
        return code

    def checkpoint(self, number: int) -> DelayedSubmission:
        """What submitit queues again."""
        return DelayedSubmission(self, number)


class SubmittedWorkers(Workers):
    """Workers in jobs of SLURM, all in one array.

    Jobs whose time is over go back to the queue by themselves. What is gone in another way is
    replaced as long as cells come to their end; a worker that the user has cancelled is not.

    Args:
        settings: of the launcher.
    """

    def __init__(self, settings: SlurmSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._wanted = settings.workers or 1
        self._jobs: dict[str, int] = {}
        self._cluster: str | None = None
        self._last = ("", "")
        self._has_progress = True
        self._single = SubmititJobs(settings)

    def start(self, cells: Sequence[Cell]) -> None:
        """Submit as many workers as are wanted, but for those that are in the queue already.

        Raises:
            ConfigError: there is no SLURM here, or it does not take the jobs.
        """
        if not self._offsets:
            self._cluster = slurm.cluster()
            layouts = dict.fromkeys(cell.layout for cell in cells)
            known = {job for layout in layouts for job in _jobs_of(layout, self._cluster)}
            states = slurm.states(known) or {}
            self._jobs = {job: 0 for job in known if slurm.is_active(states[job])}
            if self._jobs:
                say(f"{len(self._jobs)} workers are in the queue already")
        super().start(cells)
        self._has_progress = True
        self._submit_missing()

    def _announce(self, cells: Sequence[Cell]) -> None:
        """The jobs are announced when they are submitted."""

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Ask the journal and the queue, at most every ``poll_s``; the cells that have ended."""
        looked = self._looked
        found = [*super().ended(), *self._single.ended()]
        self._has_progress |= bool(found)
        if self._looked == looked or not self._cells or not self._look_at_jobs():
            return found
        self._submit_missing()
        return found if self._jobs else [*found, *self._given_up()]

    @property
    def running(self) -> list[Cell]:
        """The cells that have not ended, also those that have a job of their own."""
        return [*super().running, *self._single.running]

    def _has_failed(self, cell: Cell) -> bool:
        """One that needs more than a worker has gets a job of its own."""
        again = cell.again
        if again.is_due and again.is_raised:
            say(f"failed ({again.said}), runs again in a job of its own: {cell.label}")
            del self._cells[key_of(cell)]
            self._single.start([cell])
        return not again.is_due

    def _look_at_jobs(self) -> bool:
        """Forget jobs that are gone for good; whether any is."""
        states = slurm.states(self._jobs)
        if states is None:
            return False
        for job, state in states.items():
            self._jobs[job] = 0 if slurm.is_active(state) else self._jobs[job] + 1
        gone = [job for job, looks in self._jobs.items() if looks >= slurm.PATIENCE]
        for job in gone:
            del self._jobs[job]
            self._last = job, states[job]
            self._wanted -= states[job] == "CANCELLED"
        if gone:
            self._looked_at_all = -LOOK_AT_ALL_S
        return bool(gone) or not self._jobs

    def _submit_missing(self) -> None:
        missing = min(self._wanted, len(self._cells)) - len(self._jobs)
        if missing < 1 or not self._has_progress:
            return
        self._has_progress = False
        cell = next(iter(self._cells.values()))
        options = {
            "--threads": self._settings.threads or self._settings.cpus_per_task,
            "--notice": max(1, self._settings.signal_delay_s),
            "--grace": self._settings.grace_s,
            "--poll": self._settings.poll_s,
        }
        job = WorkerJob(
            directories=tuple(str(layout.directory) for layout in self._offsets),
            options=tuple(map(str, (word for pair in options.items() for word in pair))),
            command=work.WORK,
        )
        jobs = slurm.submit_array(job, list(range(missing)), self._settings, cell, _REQUEUES)
        numbers = [one.job_id for one in jobs]
        self._jobs |= dict.fromkeys(numbers, 0)
        where = {"cluster": self._cluster} if self._cluster else {}
        for layout in self._offsets:
            layout.journal.append("workers", workers=numbers, **where)
        say(f"submitted {missing} workers as {numbers[0].partition('_')[0]}")

    def _given_up(self) -> list[tuple[Cell, Outcome]]:
        """End the cells that are left; no worker is, and the last ones have ended none."""
        found = []
        for key, cell in list(self._cells.items()):
            state = cell.state
            if state is Status.RUNNING:  # somebody else's worker, or its lock is not stale yet
                continue
            if state is Status.INTERRUPTED:
                state = slurm.end_cell(cell, *self._last)
            why = record.brief(cell.directory) if state is Status.FAILED else None
            # One that a worker has handed back waits for the next launch: nobody has it run again.
            ended = state.has_ended and state is not Status.PREEMPTED
            found.append((cell, Outcome(state if ended else Status.NOT_STARTED, why)))
            del self._cells[key]
        return found

    def stop(self, cells: Sequence[Cell]) -> None:
        """Ask the workers to end, and cancel their jobs."""
        self._single.stop(cells)
        super().stop(cells)
        slurm.cancel(self._jobs)


def _jobs_of(layout: Layout, here: str | None) -> set[str]:
    """The jobs of workers that were submitted for a sweep, on this cluster."""
    found = set()
    for event in layout.journal.read():
        if event["event"] == "workers" and event.get("cluster", here) == here:
            found.update(job for job in event.get("workers") or [] if isinstance(job, str))
    return found

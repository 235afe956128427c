"""What a SLURM job runs: one worker process, watched over, with a way back into the queue.

The worker is a process of its own, so that whatever kills it leaves somebody who writes down what
happened and who ends with an error that SLURM sees. SIGUSR2 (before a preemption or at the time
limit) is passed on; once the worker has saved its state and ended, submitit puts the job back.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.helpers import DelayedSubmission

from fisher_lab.runs import record

from . import worker
from .cell import Frozen
from .supervisor import Ending, Job, give_up

TICK_S = 0.05
RESUMABLE = ("train",)
"""Tasks that go on where they were; any other that reached its time limit would reach it again."""

_MARGIN_S = 60.0
"""SLURM may send the signal this much earlier than it was asked to."""


class CellFailed(RuntimeError):
    """The cell did not complete; SLURM is to see the job as failed."""


class CellJob:
    """Runs the frozen cell of a file; pickled by submitit, by reference to this module.

    Args:
        threads: of the numerical libraries.
        grace_s: seconds that a worker has for saving its state.
        limit_s: the job's time limit, seconds.
        signal_delay_s: how long before it SLURM sends SIGUSR2.
        command: what Python is given to run a worker.
    """

    def __init__(
        self,
        *,
        threads: int,
        grace_s: float,
        limit_s: float,
        signal_delay_s: float,
        command: tuple[str, ...],
    ) -> None:
        self.threads = threads
        self.grace_s = grace_s
        self.limit_s = limit_s
        self.signal_delay_s = signal_delay_s
        self.command = command

    def __call__(self, path: str) -> str:
        """Run the cell.

        Returns:
            The status of its record: ``completed``, or ``held`` where somebody else runs it. On
            another node than the first, how its own worker ended: node 0 speaks for all of them.

        Raises:
            CellFailed: it did not complete.
        """
        frozen = Frozen.load(Path(path))
        asked: list[int] = []

        def note(signum: int, _: FrameType | None) -> None:
            asked.append(signum)

        node = frozen.node
        requeue = signal.signal(signal.SIGUSR2, note)
        job = Job(
            frozen,
            threads=self.threads,
            grace_s=self.grace_s,
            environment={worker.SCHEDULED: "slurm"},
            command=self.command,
            node=node,
        )
        while (ending := job.poll()) is None:
            if asked:
                job.ask(signal.SIGUSR2)
            time.sleep(TICK_S)
        if node > 0 or ending.status in ("completed", "held"):
            return ending.status
        if ending.status == "preempted" and self._may_come_back(frozen, job):
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # ends this process
        raise CellFailed(self._why(frozen, ending))

    def checkpoint(self, path: str) -> Any:
        """What submitit queues again: the same, which finds the state that the worker saved."""
        return DelayedSubmission(self, path)

    def _may_come_back(self, frozen: Frozen, job: Job) -> bool:
        if record.read(frozen.directory).get("reason") != signal.SIGUSR2.name:
            if self._at_the_limit(job):
                give_up(frozen, "timeout", self._limit_text())
            return False  # SIGTERM: if the scheduler wants the job back, it does so itself
        if frozen.cancelled:
            return False
        if self._at_the_limit(job) and frozen.config.task.name not in RESUMABLE:
            give_up(frozen, "timeout", self._limit_text())
            return False
        allowed = frozen.config.sweep.max_requeues
        if _preemptions(frozen) > allowed:
            message = f"preempted more often than sweep.max_requeues={allowed}"
            give_up(frozen, "max_requeues", message)
            return False
        frozen.layout.journal.append("requeued", run_id=frozen.run_id)
        return True

    def _at_the_limit(self, job: Job) -> bool:
        return job.seconds > self.limit_s - self.signal_delay_s - _MARGIN_S

    def _limit_text(self) -> str:
        return f"reached the job's time limit (hydra.launcher.timeout_min={self.limit_s / 60:g})"

    def _why(self, frozen: Frozen, ending: Ending) -> str:
        status = record.status_of(frozen.directory) or ending.status
        return f"{frozen.run_id}: {status}: {ending.message or ''}; see {frozen.directory}"


def _preemptions(frozen: Frozen) -> int:
    """How often this cell was preempted since it was last submitted."""
    count = 0
    for entry in frozen.layout.journal.read():
        if entry["event"] == "submitted" and frozen.run_id in entry.get("jobs", {}):
            count = 0
        elif entry["event"] == "preempted" and entry.get("run_id") == frozen.run_id:
            count += 1
    return count

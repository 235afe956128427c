"""The states of a run, and of the cell of a sweep that the run belongs to."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """How a run or a cell stands. The values are written to ``run.json`` and shown to users."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    PREEMPTED = "preempted"
    """A scheduler ended the run, which may come back."""
    CANCELLED = "cancelled"
    """The user ended the run."""

    MISSING = "missing"
    """There is no record of the run."""
    INTERRUPTED = "interrupted"
    """The record says ``running``, and no process holds the lock of the cell any more."""
    CORRUPT = "corrupt"
    """The record, or the metrics of a completed run, cannot be read."""
    DIVERGED = "diverged"
    """The run has completed, and the metric in question is NaN or infinite."""

    QUEUED = "queued"
    """SLURM has a job for the cell."""
    LOST = "lost"
    """The job of the cell has ended and left no result."""
    UNKNOWN = "unknown"
    """The cell was submitted, and the SLURM that is reached from here does not know its job."""
    HELD = "held"
    """Another launcher runs the cell."""
    NOT_STARTED = "not started"
    """The launcher ended before it came to the cell."""

    @property
    def is_recorded(self) -> bool:
        """Whether ``run.json`` may hold this status."""
        return self.has_ended or self is Status.RUNNING

    @property
    def has_ended(self) -> bool:
        """Whether the record of the run has been brought to an end."""
        return self.is_final or self in (Status.PREEMPTED, Status.CANCELLED)

    @property
    def is_final(self) -> bool:
        """Whether the run has come to a result: it is not run again unless the user asks for it."""
        return self in (Status.COMPLETED, Status.FAILED)

    @property
    def is_resumable(self) -> bool:
        """Whether the next launch of the sweep runs the cell."""
        return self in (
            Status.MISSING, Status.PREEMPTED, Status.CANCELLED, Status.INTERRUPTED
        )  # fmt: skip

    @property
    def is_waiting(self) -> bool:
        """Whether the present launch, where there is one, has yet to run the cell."""
        return self in (Status.MISSING, Status.QUEUED, Status.PREEMPTED, Status.INTERRUPTED)


UNFINISHED = (Status.RUNNING, Status.PREEMPTED, Status.MISSING)
"""States of a run, as a table of results shows them, that may still come to a number."""

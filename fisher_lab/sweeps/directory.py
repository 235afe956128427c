"""Where everything of a sweep lies.

Under ``results/<sweep>/``:

``sweep.json``
    What the sweep is: its file, axes, claims and cells.
``events.jsonl``
    What happened to which cell, append-only.
``<run_id>/``
    A cell's run directory; ``job.log`` in it is what its processes printed.
``.sweep/locks/``
    Who runs a cell now.
``.sweep/submissions/``
    The frozen cells of every launch, and the launch's own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fisher_lab.runs import record
from fisher_lab.runs.journal import Journal
from fisher_lab.runs.lock import STALE_AFTER, Lock
from fisher_lab.runs.status import Status

SWEEP_FILE = "sweep.json"
EVENTS_FILE = "events.jsonl"
JOB_LOG, RUN_LOG = "job.log", "fisher_lab.log"
LAUNCH_FILE = "launch.json"
"""Who launched what, in each submission."""
LAUNCHER = "launcher"
"""What a launcher locks, in the directory of each of its submissions, for as long as it lives."""
SCHEMA = "fisher_lab.sweep/1"


@dataclass(frozen=True)
class Layout:
    """The directory of a sweep."""

    directory: Path

    @property
    def sweep_file(self) -> Path:
        """What the sweep is."""
        return self.directory / SWEEP_FILE

    @property
    def hidden(self) -> Path:
        """What no reader of results needs."""
        return self.directory / ".sweep"

    @property
    def locks(self) -> Path:
        """The locks on cells and on the journal."""
        return self.hidden / "locks"

    @property
    def submissions(self) -> Path:
        """A directory for every launch."""
        return self.hidden / "submissions"

    @property
    def journal(self) -> Journal:
        """What happened."""
        return Journal(self.directory / EVENTS_FILE, self.locks)

    def run_directory(self, run_id: str) -> Path:
        """Where a cell's record lies."""
        return self.directory / run_id

    def job_log(self, run_id: str, node: int = 0) -> Path:
        """What the processes of a cell printed on a node, one attempt after the other."""
        if node > 0:
            return self.run_directory(run_id) / "ranks" / f"node{node}.{JOB_LOG}"
        return self.run_directory(run_id) / JOB_LOG

    def lock(self, run_id: str, stale_after: float = STALE_AFTER) -> Lock:
        """The lock of a cell."""
        return Lock(self.locks / run_id, stale_after)

    def note(self, run_id: str, status: Status) -> None:
        """Append how a cell ended, where its worker was killed before it could do so itself."""
        events = [e["event"] for e in self.journal.read() if e.get("run_id") == run_id]
        if not events or events[-1] != status:
            self.journal.append(status, run_id=run_id, late=True)

    def frozen(self) -> dict[str, Path]:
        """Identity -> the cell as it was last submitted."""
        files = sorted(self.submissions.glob("*/cells/*.json"))  # their names sort by time
        return {file.stem: file for file in files}

    def has_launcher(self) -> bool:
        """Whether a launcher of the sweep lives."""
        files = self.submissions.glob(f"*/{LAUNCHER}.lock.*")
        return any(Lock(file.parent / LAUNCHER).holder() is not None for file in files)

    def state(self, run_id: str, stale_after: float = STALE_AFTER) -> Status:
        """How a cell stands.

        Returns:
            ``missing``, ``interrupted``, or one that a record may hold.
        """
        status = record.status_of(self.run_directory(run_id))
        if status is Status.COMPLETED:
            return status
        if self.lock(run_id, stale_after).holder() is not None:
            return Status.RUNNING
        # It may have ended between the two looks.
        status = record.status_of(self.run_directory(run_id))
        if status is None:
            return Status.MISSING
        return Status.INTERRUPTED if status is Status.RUNNING else status

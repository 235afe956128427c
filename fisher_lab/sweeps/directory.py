"""Where everything of a sweep lies.

Under ``results/<sweep>/``:

``sweep.json``
    What the sweep is: its file, axes, claims and cells.
``registration.json``
    What of it was fixed before the first result.
``events.jsonl``
    What happened to which cell, append-only (`runs/journal.py`).
``<run_id>/``
    A cell's run directory; ``job.log`` in it is what its processes printed.
``.sweep/locks/``
    Who runs a cell now.
``.sweep/submissions/``
    The frozen cells of every launch, and the launch's own files.
``.sweep/code/``
    The code that they were submitted with.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic, digests, record
from fisher_lab.runs.journal import Journal
from fisher_lab.runs.lock import STALE_AFTER, Lock
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.retry import kind_of

SWEEP_FILE = "sweep.json"
REGISTRATION_FILE = "registration.json"
"""What was fixed before the first result (`results/registration.py`)."""
EVENTS_FILE = "events.jsonl"
JOB_LOG, RUN_LOG = "job.log", "fisher_lab.log"
LAUNCH_FILE = "launch.json"
"""Who launched what, in each submission."""
LAUNCHER = "launcher"
"""What a launcher locks, in the directory of each of its submissions, for as long as it lives."""
SCHEMA = "fisher_lab.sweep/1"
CONTROLS = "controls"
"""Read by ``results/loading.py``, too."""

TAIL_LINES, TAIL_BYTES = 20, 4096


@dataclass(frozen=True)
class Layout:
    """The directory of a sweep."""

    directory: Path

    @property
    def title(self) -> str:
        """Its name and where it lies."""
        return f"{self.directory.name}: {self.directory}"

    @property
    def sweep_file(self) -> Path:
        """What the sweep is."""
        return self.directory / SWEEP_FILE

    @property
    def locks(self) -> Path:
        """The locks on cells and on the journal."""
        return self.directory / ".sweep" / "locks"

    @property
    def submissions(self) -> Path:
        """A directory for every launch."""
        return self.directory / ".sweep" / "submissions"

    @property
    def sweep(self) -> Path:
        """The directory of the sweep, of which this may be the directory of its controls."""
        return self.directory.parent if self.is_of_controls else self.directory

    @property
    def is_of_controls(self) -> bool:
        """Whether cells lie here that are compared with themselves."""
        return self.directory.name == CONTROLS

    @property
    def controls(self) -> Layout:
        """Where some cells of the sweep lie once more."""
        return Layout(self.directory / CONTROLS)

    @property
    def repeated(self) -> Path:
        """Run directories whose times were measured again."""
        return self.directory / ".sweep" / "repeated"

    @property
    def code(self) -> Path:
        """The copies of the code that cells were submitted with."""
        return self.directory / ".sweep" / "code"

    @property
    def journal(self) -> Journal:
        """What happened."""
        return Journal(self.directory / EVENTS_FILE, self.locks)

    def run_directory(self, run_id: str) -> Path:
        """Where a cell's record lies."""
        return self.directory / run_id

    def job_log(self, run_id: str, node: int = 0) -> Path:
        """What the processes of a cell printed on a node, one attempt after the other."""
        name = f"ranks/node{node}.{JOB_LOG}" if node > 0 else JOB_LOG
        return self.run_directory(run_id) / name

    def logs(self, run_id: str) -> list[Path]:
        """The logs that a cell has: that of its run before that of its processes."""
        directory = self.run_directory(run_id)
        return [directory / name for name in (RUN_LOG, JOB_LOG) if (directory / name).is_file()]

    def lock(self, run_id: str, stale_after: float = STALE_AFTER) -> Lock:
        """The lock of a cell."""
        return Lock(self.locks / run_id, stale_after, self.run_directory(run_id))

    def ask_holder(self, run_id: str, stale_after: float) -> bool:
        """Ask the process that runs a cell on this machine to save and end; was there one?"""
        holder = self.lock(run_id, stale_after).holder()
        if holder is None or not holder.is_here():
            return False
        try:
            os.kill(holder.pid, signal.SIGTERM)
        except ProcessLookupError:
            return False
        return True

    def note(self, run_id: str, status: Status) -> None:
        """Append how a cell ended, where its worker was killed before it could do so itself."""

        def is_there() -> bool:
            events = [e["event"] for e in self.journal.read() if e.get("run_id") == run_id]
            return Status.COMPLETED in events or events[-1:] == [status]

        self.journal.append_unless(is_there, **self.end_of(run_id, status, late=True))

    def journal_end(self, run_id: str, status: Status, **more: Any) -> None:
        """Append how a cell ended (:meth:`end_of`)."""
        self.journal.append(**self.end_of(run_id, status, **more))

    def end_of(self, run_id: str, status: Status, **more: Any) -> dict[str, Any]:
        """The event of a cell's end, with the digest of its record, which no later edit reaches."""
        file = self.run_directory(run_id) / record.RUN_FILE
        digest = digests.of_file(file) if file.is_file() else None
        if status is Status.FAILED:
            found = atomic.read_json(file)
            more = {"kind": kind_of(found), "message": record.brief(file.parent), **more}
        return {"event": status, "run_id": run_id, "record": digest, **more}

    def frozen(self) -> dict[str, Path]:
        """Identity -> the cell as it was last submitted.

        The journal says which launch was the last one: the names of the submissions are times of
        the hosts that launched, whose clocks differ.
        """
        launched = [e.get("submission") for e in self.journal.read() if e["event"] == "launched"]
        order = {name: number for number, name in enumerate(launched)}
        files = self.submissions.glob("*/cells/*.json")
        in_order = sorted(files, key=lambda file: (order.get(file.parts[-3], -1), file.parts[-3]))
        return {file.stem: file for file in in_order}

    def has_launcher(self) -> bool:
        """Whether a launcher of the sweep lives."""
        files = self.submissions.glob(f"*/{LAUNCHER}.lock.*")
        return any(Lock(file.parent / LAUNCHER).holder() is not None for file in files)

    def finish_if_last(self) -> None:
        """Write the table of a sweep whose launcher is gone, where its last cell has now ended."""
        if self.has_launcher():
            return
        cells = atomic.read_json(self.sweep_file).get("cells") or []
        found = (record.status_of(self.run_directory(str(cell["run_id"]))) for cell in cells)
        lock = Lock(self.locks / "finish")
        if all(one is not None and one.is_final for one in found) and lock.acquire():
            from fisher_lab.results import finishing

            with lock:
                finishing.at_end(self.directory)

    def state(
        self, run_id: str, stale_after: float = STALE_AFTER, *, probe: bool = False
    ) -> Status:
        """How a cell stands.

        Args:
            run_id: of the cell.
            stale_after: of its lock, seconds.
            probe: of `Lock.holder`.

        Returns:
            ``missing``, ``interrupted``, or one that a record may hold.
        """
        status = record.status_of(self.run_directory(run_id))
        if status is Status.COMPLETED:
            return status
        if self.lock(run_id, stale_after).holder(probe=probe) is not None:
            return Status.RUNNING
        # It may have ended between the two looks.
        status = record.status_of(self.run_directory(run_id))
        if status is None:
            return Status.MISSING
        return Status.INTERRUPTED if status is Status.RUNNING else status


def tail(path: Path, offset: int = 0) -> str:
    """The last lines of a log from ``offset`` on, at most :data:`TAIL_BYTES`."""
    try:
        with atomic.open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-TAIL_LINES:])

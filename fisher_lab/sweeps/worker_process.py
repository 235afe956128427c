"""Watching over one worker process: time limit, signals, and what it died of.

A process that was killed cannot say so itself. Whoever watches it writes that into the cell's
record, under the cell's lock, unless another launcher has taken the cell in the meantime.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic, processes, record, signals
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import FrozenCell
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.tally import Outcome

WORKER = ("-m", "fisher_lab.sweeps.worker")
"""What Python is given to run a worker."""

_OF_CODES = {
    worker.COMPLETED: Status.COMPLETED,
    worker.PREEMPTED: Status.PREEMPTED,
    worker.CANCELLED: Status.CANCELLED,
}

TAIL_LINES = 20
TAIL_BYTES = 4096
_LOCK_TIMEOUT_S = 30.0
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class WorkerProcess:
    """A worker in a session of its own, so that no closed terminal ends it.

    Args:
        cell: what it runs.
        threads: of the numerical libraries; None leaves the environment as it is.
        grace_s: seconds between asking it to end and killing it.
        environment: further variables.
        command: what Python is given to run a worker; by default :data:`WORKER`.
        node: of several that run the cell together; that of node 0 alone settles how it ended.
    """

    def __init__(
        self,
        cell: FrozenCell,
        *,
        threads: int | None,
        grace_s: float,
        environment: Mapping[str, str] | None = None,
        command: tuple[str, ...] | None = None,
        node: int = 0,
    ) -> None:
        self.cell = cell
        self._node = node
        self.started = time.monotonic()
        self._since = datetime.now(UTC) - timedelta(milliseconds=1)  # records have no finer
        self._grace_s = grace_s
        self._limit = cell.sweep["timeout_s"] if node == 0 else None
        self._asked: float | None = None
        self._asked_with = 0
        self._timed_out = False
        self._log = cell.layout.job_log(cell.run_id, node)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        variables = {**os.environ, "PYTHONPATH": processes.python_path(), **(environment or {})}
        self._scheduled = bool(variables.get(worker.SCHEDULED))
        if threads is not None:
            variables.update(dict.fromkeys(_THREADS, str(threads)))
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(command or WORKER), str(cell.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=variables,
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started

    def ask(self, signum: int) -> None:
        """Ask it, once, to save and end; it is killed where it has not after the grace period."""
        if self._asked is None:
            self._asked, self._asked_with = time.monotonic(), signum
            self._signal(signum)

    def poll(self) -> Outcome | None:
        """Enforce the limits; how it ended, or None while it runs."""
        if self._has_exited():
            self._signal(signal.SIGKILL)  # ranks or others that it has left behind
            status, message = self._settle(self.process.wait())
            return Outcome(status, message, self.seconds)
        if self._limit is not None and not self._timed_out and self.seconds > self._limit:
            self._timed_out = True
            self.ask(signal.SIGTERM)
        if self._asked is not None and time.monotonic() - self._asked > self._grace_s:
            self._signal(signal.SIGKILL)
        return None

    def _has_exited(self) -> bool:
        """Whether it has ended; it stays a zombie, so that its number is nobody else's."""
        if self.process.returncode is not None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def _signal(self, signum: int) -> None:
        """To the worker alone, which tells its ranks; SIGKILL to its whole session."""
        try:
            if signum == signal.SIGKILL:
                os.killpg(self.process.pid, signum)
            else:
                self.process.send_signal(signum)
        except (ProcessLookupError, PermissionError):
            pass

    def _settle(self, code: int) -> tuple[Status, str | None]:
        """How the cell has ended; its record says so afterwards."""
        if code == worker.HELD:
            return Status.HELD, None
        if self._node > 0:
            return _OF_CODES.get(code, Status.FAILED), None
        lock = self.cell.layout.lock(self.cell.run_id, self.cell.stale_after_s)
        if not lock.acquire_within(_LOCK_TIMEOUT_S):
            return Status.HELD, None
        with lock:
            return self._complete_record(code)

    def _complete_record(self, code: int) -> tuple[Status, str | None]:
        """Make the record say what happened, where the worker did not."""
        directory, layout = self.cell.directory, self.cell.layout
        status = record.status_of(directory)
        if status is Status.COMPLETED:
            layout.note(self.cell.run_id, status)
            return status, None
        if self._timed_out:
            return self._fail("timeout", f"ran longer than sweep.timeout_s={self._limit:g}", code)
        if status is not None and status.has_ended and self._is_of_now(directory):
            layout.note(self.cell.run_id, status)
            if status is not Status.FAILED:
                return status, None
            keep_tail(directory, tail(self._log, self._offset))
            return status, record.brief(directory)
        if (interrupted := self._interrupted(code)) is not None:
            settle(self.cell, *interrupted, None)
            return interrupted[0], None
        return self._fail(*_death(code), code)

    def _interrupted(self, code: int) -> tuple[Status, str] | None:
        """Status and reason of a worker that was ended before it had a record to say so in.

        A signal in its first moments, or a cell whose launch the user had cancelled before the
        worker came to it.
        """
        if code == -signal.SIGKILL and self._asked_with == signal.SIGTERM:
            name = "SIGKILL"  # by us: it had not ended within the grace period
        elif -code in signals.STATUS:
            name = signal.Signals(-code).name
        elif code in (worker.PREEMPTED, worker.CANCELLED):
            name = "SIGUSR2" if code == worker.PREEMPTED else "SIGTERM"
        else:
            return None
        if self.cell.cancelled:
            return Status.CANCELLED, "cancel" if code == worker.CANCELLED else name
        # A scheduler sends SIGTERM to jobs that may come back: the user has not asked for it.
        preempted = name == "SIGUSR2" or self._scheduled
        return Status.PREEMPTED if preempted else Status.CANCELLED, name

    def _is_of_now(self, directory: Path) -> bool:
        """Whether the record is this attempt's, and not that of an earlier one."""
        try:
            return datetime.fromisoformat(record.read(directory)["started"]) >= self._since
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _fail(self, reason: str, message: str, code: int) -> tuple[Status, str]:
        error = death(
            message,
            signal=signal.Signals(-code).name if code < 0 else None,
            exit_code=code if code >= 0 else None,
            log_tail=tail(self._log, self._offset),
        )
        settle(self.cell, Status.FAILED, reason, error)
        return Status.FAILED, message


def _death(code: int) -> tuple[str, str]:
    """Reason and message for a process that left no record of its end."""
    if code >= 0:
        return "exit", f"the process ended with exit code {code} and left no record of it"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return name, f"killed by {name}, as the kernel does where memory runs out"
    return name, f"the process died of {name}"


def death(message: str, **details: Any) -> dict[str, Any]:
    """The error of a cell whose process could not say it itself."""
    return {"type": "JobDied", "message": message, "traceback": "", **details}


def settle(cell: FrozenCell, status: Status, reason: str, error: Mapping[str, Any] | None) -> None:
    """End the record of a cell from outside; for the holder of its lock."""
    record.end_from_outside(cell.directory, status, reason, error=error, otherwise=cell.record())
    cell.layout.journal.append(status, run_id=cell.run_id, reason=reason)


def end_lost(
    cell: FrozenCell, status: Status, reason: str, error: Mapping[str, Any] | None = None
) -> bool:
    """End the record of a cell that nobody runs; false where somebody runs or has completed it."""
    lock = cell.layout.lock(cell.run_id, cell.stale_after_s)
    if not lock.acquire_within(_LOCK_TIMEOUT_S):
        return False
    with lock:
        if record.status_of(cell.directory) is Status.COMPLETED:
            return False
        settle(cell, status, reason, error)
    return True


def give_up(cell: FrozenCell, reason: str, message: str) -> bool:
    """Make a cell that nobody runs ``failed``; false where somebody runs or has completed it."""
    return end_lost(cell, Status.FAILED, reason, death(message))


def ask_holder(layout: Layout, run_id: str, stale_after_s: float) -> bool:
    """Ask the process that runs a cell on this machine to save and end; whether there was one."""
    holder = layout.lock(run_id, stale_after_s).holder()
    if holder is None or not holder.is_here():
        return False
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


def keep_tail(directory: Path, text: str) -> None:
    """Add the end of the log to the error of a failed cell; for the holder of its lock."""
    found = record.read(directory)
    if text and found["error"] is not None and "log_tail" not in found["error"]:
        found["error"]["log_tail"] = text
        atomic.write_json(directory / record.RUN_FILE, found)


def tail(path: Path, offset: int = 0) -> str:
    """The last lines of a log from ``offset`` on, at most :data:`TAIL_BYTES`."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-TAIL_LINES:])

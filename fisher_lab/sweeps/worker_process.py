"""Watching over one worker process: time limit, signals, and what it died of.

A process that was killed cannot say so itself. The supervisor writes it into the cell's record,
under the cell's claim, unless somebody else has taken the cell in the meantime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic, record, signals
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import Frozen
from fisher_lab.sweeps.directory import Layout

WORKER = ("-m", "fisher_lab.sweeps.worker")
"""What Python is given to run a worker."""

_OF_CODES = {
    worker.COMPLETED: "completed",
    worker.PREEMPTED: "preempted",
    worker.CANCELLED: "cancelled",
}

TAIL_LINES = 20
TAIL_BYTES = 4096
_CLAIM_TIMEOUT = 30.0
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        status: of the cell's record, or ``held`` where somebody else runs it.
        message: why it failed, in one line.
    """

    status: str
    message: str | None = None


class Job:
    """A worker process in a session of its own, so that no terminal takes it along.

    Args:
        frozen: what it runs.
        threads: of the numerical libraries; None leaves the environment as it is.
        grace_s: seconds between asking it to end and killing it.
        environment: further variables.
        command: what Python is given to run a worker; by default :data:`WORKER`.
        node: of several that run the cell together; that of node 0 alone settles how it ended.
    """

    def __init__(
        self,
        frozen: Frozen,
        *,
        threads: int | None,
        grace_s: float,
        environment: dict[str, str] | None = None,
        command: tuple[str, ...] | None = None,
        node: int = 0,
    ) -> None:
        self.frozen = frozen
        self._node = node
        self.started = time.monotonic()
        self._since = datetime.now(UTC) - timedelta(milliseconds=1)  # records have no finer
        self._grace_s = grace_s
        self._limit = frozen.timeout_s if node == 0 else None
        self._asked: float | None = None
        self._asked_with = 0
        self._timed_out = False
        layout, run_id = frozen.layout, frozen.run_id
        self._log = layout.job_log(run_id) if node == 0 else layout.node_log(run_id, node)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        variables = {**os.environ, "PYTHONPATH": _python_path(), **(environment or {})}
        self._scheduled = bool(variables.get(worker.SCHEDULED))
        if threads is not None:
            variables.update(dict.fromkeys(_THREADS, str(threads)))
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(command or WORKER), str(frozen.path)],
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

    def poll(self) -> Ending | None:
        """Enforce the limits; how it ended, or None while it runs."""
        if self._exited():
            self._signal(signal.SIGKILL)  # ranks or others that it has left behind
            self.process.wait()
            return self._ending()
        if self._limit is not None and not self._timed_out and self.seconds > self._limit:
            self._timed_out = True
            self.ask(signal.SIGTERM)
        if self._asked is not None and time.monotonic() - self._asked > self._grace_s:
            self._signal(signal.SIGKILL)
        return None

    def _exited(self) -> bool:
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

    def _ending(self) -> Ending:
        code = self.process.returncode
        if code == worker.HELD:
            return Ending("held")
        if self._node > 0:
            return Ending(_OF_CODES.get(code, "failed"))
        claim = self.frozen.layout.claim(self.frozen.run_id, self.frozen.stale_after_s)
        if not claim.acquire_within(_CLAIM_TIMEOUT):
            return Ending("held")
        with claim:
            return self._settle(code)

    def _settle(self, code: int) -> Ending:
        """Make the record say what happened, where the worker did not."""
        directory = self.frozen.directory
        status = record.status_of(directory)
        if status == "completed":
            worker.note_completed(self.frozen.layout.journal, self.frozen.run_id)
            return Ending("completed")
        if self._timed_out:
            return self._fail("timeout", f"ran longer than sweep.timeout_s={self._limit:g}", code)
        if status in ("failed", "preempted", "cancelled") and self._is_recent(directory):
            if not self._is_noted(status):  # killed on its way out
                self.frozen.layout.journal.append(status, run_id=self.frozen.run_id)
            if status != "failed":
                return Ending(status)
            keep_tail(directory, tail(self._log, self._offset))
            return Ending(status, brief(directory))
        if (interrupted := self._interrupted(code)) is not None:
            settle(self.frozen, *interrupted, None)
            return Ending(interrupted[0])
        return self._fail(*_death(code), code)

    def _interrupted(self, code: int) -> tuple[str, str] | None:
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
        if self.frozen.cancelled:
            return "cancelled", "cancel" if code == worker.CANCELLED else name
        # A scheduler's SIGTERM is no wish of the user's.
        return ("preempted" if name == "SIGUSR2" or self._scheduled else "cancelled"), name

    def _is_recent(self, directory: Path) -> bool:
        """Whether the record is this attempt's, and not that of an earlier one."""
        try:
            return datetime.fromisoformat(record.read(directory)["started"]) >= self._since
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _is_noted(self, status: str) -> bool:
        """Whether the journal ends, for this cell, with its status."""
        for entry in reversed(self.frozen.layout.journal.read()):
            if entry.get("run_id") == self.frozen.run_id:
                return entry["event"] == status
        return False

    def _fail(self, reason: str, message: str, code: int) -> Ending:
        error = died(
            message,
            signal=signal.Signals(-code).name if code < 0 else None,
            exit_code=code if code >= 0 else None,
            log_tail=tail(self._log, self._offset),
        )
        settle(self.frozen, "failed", reason, error)
        return Ending("failed", message)


def _python_path() -> str:
    """Where the worker finds this very package, whatever its working directory is."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Processes that are started meanwhile, here or by a scheduler, find this very package."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _python_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def died(message: str, **details: Any) -> dict[str, Any]:
    """The error of a cell whose process could not say it itself."""
    return {"type": "JobDied", "message": message, "traceback": "", **details}


def settle(frozen: Frozen, status: str, reason: str, error: dict[str, Any] | None) -> None:
    """End the record of a cell from outside; for the holder of its claim."""
    record.end_from_outside(
        frozen.directory, status, reason, error=error, otherwise=worker.beginnings(frozen)
    )
    frozen.layout.journal.append(status, run_id=frozen.run_id, reason=reason)


def give_up(frozen: Frozen, reason: str, message: str, **details: Any) -> bool:
    """Make a cell that nobody runs ``failed``; false where somebody runs or has completed it."""
    return end_lost(frozen, "failed", reason, died(message, **details))


def end_lost(frozen: Frozen, status: str, reason: str, error: dict[str, Any] | None = None) -> bool:
    """End the record of a cell that nobody runs; false where somebody runs or has completed it."""
    claim = frozen.layout.claim(frozen.run_id, frozen.stale_after_s)
    if not claim.acquire_within(_CLAIM_TIMEOUT):
        return False
    with claim:
        if record.status_of(frozen.directory) == "completed":
            return False
        settle(frozen, status, reason, error)
    return True


def ask_owner(layout: Layout, run_id: str, stale_after_s: float) -> bool:
    """Ask the process that runs a cell on this machine to save and end; whether there was one."""
    owner = layout.claim(run_id, stale_after_s).alive()
    if owner is None or not owner.is_here():
        return False
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


def keep_tail(directory: Path, text: str) -> None:
    """Add the end of the log to the error of a failed cell; for the holder of its claim."""
    found = record.read(directory)
    if text and found["error"] is not None and "log_tail" not in found["error"]:
        found["error"]["log_tail"] = text
        atomic.write_json(directory / record.RUN_FILE, found)


def _death(code: int) -> tuple[str, str]:
    """Reason and message for a process that left no record of its end."""
    if code >= 0:
        return "exit", f"the process ended with exit code {code} and left no record of it"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return name, f"killed by {name}, as the kernel does where memory runs out"
    return name, f"the process died of {name}"


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


def brief(directory: Path) -> str:
    """Why a cell failed, in one line."""
    try:
        found = record.read(directory)
        return record.headline(found["error"] or {"type": str(found["reason"]), "message": ""})
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no record"

"""Watching over one worker process: time limit, signals, and what it died of.

A process that was killed cannot say so itself. Whoever watches it writes that into the cell's
record, under the cell's lock, unless another launcher has taken the cell in the meantime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fisher_lab.runs import atomic, environment, record, signals
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import LOCK_TIMEOUT_S, Cell, Outcome, death
from fisher_lab.sweeps.directory import tail

WORKER = ("-m", "fisher_lab.sweeps.worker")
"""What Python is given to run a worker."""

_OF_CODES = {
    worker.COMPLETED: Status.COMPLETED,
    worker.PREEMPTED: Status.PREEMPTED,
    worker.CANCELLED: Status.CANCELLED,
}
_SIGNAL_OF_CODES = {
    worker.PREEMPTED: "SIGUSR2",
    worker.CANCELLED: "SIGTERM",
    **{-signum: signum.name for signum in signals.STATUS},
}
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUMTHREADS",
)


def start_python(
    arguments: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    *,
    root: Path | None = None,
    in_job: bool = False,
) -> subprocess.Popen[bytes]:
    """Start Python in a session of its own, so that no closed terminal ends it.

    Args:
        arguments: of Python, which imports this very package.
        log: the file to which its output is appended.
        variables: of its environment, besides those of `environment.child`.
        root: the directory from which it imports this package; None: from which this one does.
        in_job: whether it is a part of the SLURM job that this process is.
    """
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment.child(variables, root=root, in_job=in_job),
        )


class Process(Protocol):
    """What a worker's process is asked; that of `subprocess` is one."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns what `subprocess.Popen.returncode` says."""
        ...

    def send_signal(self, sig: int) -> None:
        """Signal it, unless it has ended."""
        ...


class WorkerProcess:
    """A worker in a session of its own.

    Args:
        cell: what it runs.
        threads: of the numerical libraries; None leaves the environment as it is.
        grace_s: seconds between asking it to end and killing it.
        scheduled: whether a scheduler runs it, whose SIGTERM is no wish of the user's.
        command: what Python is given to run a worker; by default :data:`WORKER`.
        node: of several that run the cell together; that of node 0 alone settles how it ended.
        start: starts the worker with its log and variables of its environment; None: a Python of
            its own.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        threads: int | None,
        grace_s: float,
        scheduled: bool = False,
        command: tuple[str, ...] | None = None,
        node: int = 0,
        start: Callable[[Path, Mapping[str, str]], Process] | None = None,
    ) -> None:
        self.cell = cell
        self._node = node
        self._started = time.monotonic()
        self._earlier = atomic.read_json(cell.directory / record.RUN_FILE)
        self._grace_s = grace_s
        limit_s = cell.config.sweep.timeout_s if node == 0 else None
        self._limit_s = None if limit_s is None else limit_s * cell.again.time
        self._scheduled = scheduled
        self._asked: float | None = None
        self._asked_with = 0
        self._timed_out = False
        self._log = cell.layout.job_log(cell.run_id, node)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        variables: dict[str, str] = {worker.SCHEDULED: "1"} if scheduled else {}
        if threads is not None:
            variables.update(dict.fromkeys(THREADS, str(threads)))
        self._process: Process
        if start is not None:
            self._process = start(self._log, variables)
        else:
            arguments = [*(command or WORKER), str(cell.path)]
            self._process = start_python(
                arguments, self._log, variables, root=cell.code_root, in_job=scheduled
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def ask(self, signum: int) -> None:
        """Ask it, once, to save and end; it is killed where it has not after the grace period."""
        if self._asked is None:
            self._asked, self._asked_with = time.monotonic(), signum
            self._signal(signum)

    def poll(self) -> Outcome | None:
        """Enforce the limits; how it ended, or None while it runs."""
        # It stays a zombie until its session is dealt with, so that its number is nobody else's.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        pid, code = self._process.pid, self._process.returncode
        if code is not None or os.waitid(os.P_PID, pid, options) is not None:
            self._signal(signal.SIGKILL)  # ranks or others that it has left behind
            status, message = self._settle(self._process.wait())
            return Outcome(status, message, self.seconds)
        self.enforce_limits()
        return None

    def enforce_limits(self) -> None:
        """Ask a worker to end whose time is over, and kill one that was asked and has not."""
        limit_s = self._limit_s
        if limit_s is not None and not self._timed_out and self.seconds > limit_s:
            self._timed_out = True
            self.ask(signal.SIGTERM)
        if self._asked is not None and time.monotonic() - self._asked > self._grace_s:
            self._signal(signal.SIGKILL)

    def end(self) -> None:
        """Ask it to save and end, and wait until it has ended; its record stays as it is."""
        self.ask(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace_s)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, signum: int) -> None:
        """To the worker alone, which tells its ranks; SIGKILL to its whole session."""
        try:
            if signum == signal.SIGKILL:
                os.killpg(self._process.pid, signum)
            else:
                self._process.send_signal(signum)
        except (ProcessLookupError, PermissionError):
            pass

    def _settle(self, code: int) -> tuple[Status, str | None]:
        """How the cell has ended; its record says so afterwards."""
        if code == worker.HELD:
            return Status.HELD, None
        if code == worker.COMPLETED and record.status_of(self.cell.directory) is Status.COMPLETED:
            return Status.COMPLETED, None  # and so says the journal
        if self._node > 0:
            return _OF_CODES.get(code, Status.FAILED), None
        lock = self.cell.lock
        if not lock.acquire_within(LOCK_TIMEOUT_S):
            return Status.HELD, None
        with lock:
            return self._complete_record(code)

    def _complete_record(self, code: int) -> tuple[Status, str | None]:
        """Make the record say what happened, where the worker did not."""
        cell = self.cell
        status = record.status_of(cell.directory)
        if status is Status.COMPLETED:
            cell.layout.note(cell.run_id, status)
            return status, None
        if self._timed_out:
            message = f"ran longer than sweep.timeout_s={self._limit_s:g}"
            return self._fail("timeout", message, code)
        is_of_now = atomic.read_json(cell.directory / record.RUN_FILE) != self._earlier
        if status is not None and status.has_ended and is_of_now:
            cell.layout.note(cell.run_id, status)
            return status, record.brief(cell.directory) if status is Status.FAILED else None
        if (interrupted := self._interrupted(code)) is not None:
            cell.settle(*interrupted)
            return interrupted[0], None
        if code >= 0:
            message = f"the process ended with exit code {code} and left no record of it"
            return self._fail("exit", message, code)
        name = signal.Signals(-code).name
        message = f"the process died of {name}"
        if -code == signal.SIGKILL:
            message = f"killed by {name}, as the kernel does where memory runs out"
        return self._fail(name, message, code)

    def _interrupted(self, code: int) -> tuple[Status, str] | None:
        """Status and reason of a worker that was ended before it had a record to say so in.

        A signal in its first moments, or a cell whose launch the user had cancelled before the
        worker came to it.
        """
        name = _SIGNAL_OF_CODES.get(code)
        if code == -signal.SIGKILL and self._asked_with == signal.SIGTERM:
            name = "SIGKILL"  # by us: it had not ended within the grace period
        if name is None:
            return None
        if self.cell.cancelled:
            return Status.CANCELLED, "cancel" if code == worker.CANCELLED else name
        # A scheduler sends SIGTERM to jobs that may come back: the user has not asked for it.
        preempted = name == "SIGUSR2" or self._scheduled
        return Status.PREEMPTED if preempted else Status.CANCELLED, name

    def _fail(self, reason: str, message: str, code: int) -> tuple[Status, str]:
        error = death(
            message,
            signal=signal.Signals(-code).name if code < 0 else None,
            exit_code=code if code >= 0 else None,
            log_tail=tail(self._log, self._offset),
        )
        self.cell.settle(Status.FAILED, reason, error)
        return Status.FAILED, message

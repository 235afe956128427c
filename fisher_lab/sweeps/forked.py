"""A cell in a child that is forked from a process which has imported what cells need.

What a child does cannot reach its parent or the next child, as with a Python of its own; what its
Python would import anew for every cell is there already. That is safe as long as the parent has no
threads: it imports, and computes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fisher_lab.runs import environment, journal
from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import Cell

_PAUSE_S = 0.002
_VICTIM = "500"
"""For the kernel where memory runs out: this child before its parent."""


def possible() -> bool:
    """Whether a child may be forked from this process."""
    return sys.platform == "linux" and threading.active_count() == 1


class Forked:
    """A child that runs one cell; a `worker_process.Process`.

    Args:
        cell: frozen.
        log: to which its output is appended.
        variables: of its environment.

    Attributes:
        events: of the cell that the child has handed over, with their time, instead of writing
            them into the journal: many go there in one piece.
    """

    def __init__(self, cell: Cell, log: Path, variables: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.events: list[dict[str, Any]] = []
        self._is_closed = False
        self._text = b""
        self._modules: list[str] = []
        self._pipe, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _child(cell, log, variables, writing)
        os.close(writing)

    def has_ended(self, seconds: float) -> bool:
        """Whether it has ended, and nothing that it has said is unheard; waits for news.

        Args:
            seconds: that this takes at most, where there is none.
        """
        # A process that it has left behind may keep the pipe open.
        ended = self.returncode is not None or self._is_zombie()
        while self._hear(0.0 if ended else seconds) and ended:
            pass
        return ended

    def _is_zombie(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None

    def _hear(self, seconds: float) -> bool:
        """Read what it says; whether it has said something."""
        if self._is_closed:
            time.sleep(min(seconds, _PAUSE_S))
            return False
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        content = os.read(self._pipe, 1 << 16) if ready else b""
        if ready and not content:
            self._close()
        *lines, self._text = (self._text + content).split(b"\n")
        for line in map(json.loads, lines):
            self._modules += line.pop("modules", [])
            self.events += [line] if line else []
        return bool(content)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns what `subprocess.Popen.returncode` says.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self._close()
            elif until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            else:
                time.sleep(_PAUSE_S)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Signal it, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, sig)

    def warm(self) -> None:
        """Import here what the child has imported, so that the next one finds it."""
        for name in self._modules:
            with contextlib.suppress(Exception):  # the next child imports it as this one did
                import_module(name)
        self._modules = []

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self._pipe)


def _child(cell: Cell, log: Path, variables: Mapping[str, str], pipe: int) -> NoReturn:
    """Run the cell in this new process, and leave it."""
    code = worker.FAILED
    try:
        os.setsid()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_VICTIM)
        _redirect(log)
        new = environment.child(
            variables, root=cell.code_root, in_job=worker.SCHEDULED in variables
        )
        os.environ.clear()
        os.environ.update(new)
        known = set(sys.modules)

        def say(line: Mapping[str, Any]) -> None:
            os.write(pipe, json.dumps(line).encode() + b"\n")

        def append(event: str, **fields: Any) -> None:
            try:
                say({"time": journal.now(), "event": event, **fields})
            except BrokenPipeError:  # the parent has been killed, which is no reason to end
                cell.layout.journal.append(event, **fields)

        code = worker.perform(lambda: cell, append)
        with contextlib.suppress(BrokenPipeError):
            say({"modules": [name for name in sys.modules if name not in known]})
    except BaseException:
        traceback.print_exc()
    leave(code)


def _redirect(log: Path) -> None:
    """Append the output of this process to a file, and give it no input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, number in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, number)
    os.close(nothing)
    os.close(target)
    for number, name in ((1, "stdout"), (2, "stderr")):
        encoding, _, errors = environment.OUTPUT.partition(":")
        stream = open(number, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)

"""A sink in a process of its own, so that nothing it does can hold up or end the run.

The run writes one line of JSON a call into a pipe, from a thread; the other process
(:mod:`fisher_lab.tracking.worker`) has the library. A service that hangs, a library that raises or
calls ``exit``, a process that is killed: the run sees a pipe that is no longer read. A run that is
killed itself leaves a pipe that ends, and the other process then finishes what it has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fisher_lab
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs.record import strict
from fisher_lab.tracking.base import Numbers, Start

log = logging.getLogger(__name__)

WAITING = 20_000
"""Calls that may wait to be written; past them the sink counts as one that has stopped reading."""

MARGIN_S = 0.3
"""Of the budget, kept for what is not a wait: starting and ending the process, handing calls on."""

COMMAND = (sys.executable, "-m", "fisher_lab.tracking.worker")


class Stopped(RuntimeError):
    """The other process failed, ended, or no longer reads."""


class RemoteTracker:
    """Hands every call to a sink in another process; no call waits for it but ``finish``.

    Args:
        kind: the sink, a key of :data:`fisher_lab.tracking.worker.SINKS`.
        config: the section ``tracker``.
        budget_s: seconds that this sink may hold up the run in all.
    """

    def __init__(self, kind: str, config: TrackerConfig, budget_s: float) -> None:
        self.name = kind
        self._config = config
        self._left = budget_s
        self._process: subprocess.Popen[bytes] | None = None
        self._calls: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._problem: str | None = None
        self._finished = False
        self._warned = False
        self._threads: list[threading.Thread] = []

    @property
    def finished(self) -> bool:
        """Whether the other process has said that all is done."""
        return self._finished

    @property
    def pid(self) -> int | None:
        """Of the other process, once it was started."""
        return None if self._process is None else self._process.pid

    def start(self, start: Start) -> None:
        """Start the other process; what comes of it shows in the calls that follow."""
        began = time.monotonic()
        root = str(Path(fisher_lab.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [*COMMAND, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # the terminal's Ctrl-C is for the run
        )
        for target in (self._write, self._read):
            thread = threading.Thread(target=target, name=f"{self.name}-tracker", daemon=True)
            thread.start()
            self._threads.append(thread)
        content = asdict(start) | {"directory": str(start.directory), "tags": list(start.tags)}
        self._call("start", strict({"start": content, "config": asdict(self._config)}))
        self._left -= time.monotonic() - began

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Numbers at a step."""
        self._call("log", {"values": strict(values), "step": step})

    def summary(self, values: Numbers) -> None:
        """Numbers of the whole run."""
        self._call("summary", {"values": strict(values)})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table."""
        self._call("table", {"name": name, "rows": [strict(row) for row in rows]})

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        self._call("image", {"name": name, "path": str(Path(path).resolve())})

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """A file or directory."""
        where = str(Path(path).resolve())
        self._call("artifact", {"name": name, "path": where, "kind": kind})

    def finish(self, status: str) -> None:
        """End, and wait as long as the budget allows.

        A process that has everything and is still busy then (uploading) is left to itself: it ends
        on its own, at the latest after ``tracker.grace_s``. One that no longer reads is ended.
        """
        self._call("finish", {"status": status})
        self._calls.put_nowait(None)
        until = time.monotonic() + max(self._left - MARGIN_S, 0.0)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        writer, reader = self._threads
        if self._problem is not None:
            self._end()
            raise Stopped(self._problem)
        if writer.is_alive():
            self._end()
            raise Stopped("it no longer takes what the run sends; its process was ended")
        if reader.is_alive():
            log.log(
                logging.INFO if self._warned else logging.WARNING,  # one warning is enough
                "the tracker %s is still busy; it goes on by itself for %g s at most",
                self.name,
                self._config.grace_s,
            )
            return
        assert self._process is not None
        # Its output has ended: so has the process, within a moment.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(until - time.monotonic(), 0.1))

    # ---- the two threads ---------------------------------------------------------------------

    def _call(self, name: str, arguments: Mapping[str, Any]) -> None:
        if self._problem is not None:
            raise Stopped(self._problem)
        line = json.dumps({"call": name, **arguments}, allow_nan=False) + "\n"
        try:
            self._calls.put_nowait(line.encode())
        except queue.Full:
            self._problem = "it no longer takes what the run sends"
            self._end()
            raise Stopped(self._problem) from None

    def _write(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            while (line := self._calls.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                self._calls.task_done()
            self._process.stdin.close()
        except OSError:
            pass  # the reader says why

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            try:
                told = json.loads(raw)
            except ValueError:
                continue
            if "failed" in told:
                self._problem = str(told["failed"])
            elif "said" in told:
                level = logging.WARNING if told.get("warning") else logging.INFO
                self._warned |= level == logging.WARNING
                log.log(level, "%s: %s", self.name, told["said"])
            elif "finished" in told:
                self._finished = True
        if not self._finished and self._problem is None:
            self._problem = "its process ended before the run did"

    def _end(self) -> None:
        """End the other process, which was started here; its own children see its pipes close."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

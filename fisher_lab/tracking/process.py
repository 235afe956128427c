"""A sink in a process of its own, so that nothing it does can hold up or fail the run.

W&B's own service process does not suffice (wandb 0.31): a run that is killed by SIGKILL loses the
last numbers that it logged, and the library's exit hook keeps the run's process from ending while
a server does not answer. A child of `multiprocessing` cannot outlive the run to end its upload.

The run writes its calls, pickled, into a pipe, from a thread. A run that is killed leaves a pipe
that ends, and the child then ends the W&B run as ``killed``.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from typing import IO

from typing_extensions import override

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import environment, record
from fisher_lab.tracking.base import Start, Tracker

log = logging.getLogger(__name__)

QUEUE_SIZE = 20_000
"""Calls that may wait to be written; with more of them the child counts as stuck."""

MARGIN_S = 0.3
"""Seconds of the budget that are kept for starting and ending the child and for queueing calls."""

COMMAND = (sys.executable, "-c", "from fisher_lab.tracking.process import main; main()")

IGNORED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Signals for the run that a scheduler sends to every process; the child ends with its input."""


class SinkProcess(Tracker):
    """The run's side of a sink: calls are queued, and only ``finish`` waits for the child.

    Args:
        name: the sink: a module of this package with a class ``Sink``.
        config: the section ``tracker``.
        budget_s: seconds for which this sink may hold up the run in all.
    """

    def __init__(self, name: str, config: TrackerConfig, budget_s: float) -> None:
        self.name = name
        self.problem: str | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._config = config
        self._left = budget_s
        self._calls: queue.Queue[bytes | None] = queue.Queue(QUEUE_SIZE)
        self._threads: list[threading.Thread] = []

    @override
    def start(self, start: Start) -> None:
        # Whether the child succeeds shows in the calls that follow.
        began = time.monotonic()
        self.child = subprocess.Popen(
            [*COMMAND, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment.child(),
            start_new_session=True,  # Ctrl-C in the terminal is meant for the run
        )
        for target in (self._write, self._read):
            thread = threading.Thread(target=target, args=[self.child], daemon=True)
            thread.start()
            self._threads.append(thread)
        self._call("start", self._config, start)
        self._left -= time.monotonic() - began

    @override
    def finish(self, status: str) -> None:
        """End, and wait as long as the budget allows.

        A child that has everything and is still uploading by then goes on by itself, for
        ``tracker.grace_s`` at most. One that no longer reads is killed.
        """
        self._call("finish", status)
        self._calls.put_nowait(None)
        until = time.monotonic() + max(self._left - MARGIN_S, 0.0)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        writer, reader = self._threads
        if self.problem is None and writer.is_alive():
            self.problem = "it no longer takes what the run sends; its process was killed"
        if self.problem is not None:
            assert self.child is not None
            self.child.kill()  # processes that it started see their pipes close
            raise RuntimeError(self.problem)
        if reader.is_alive():
            log.warning(
                "the tracker %s is still busy; it goes on by itself for at most %g s",
                self.name,
                self._config.grace_s,
            )

    @override
    def _call(self, name: str, *arguments: object) -> None:
        if self.problem is None:
            try:
                return self._calls.put_nowait(pickle.dumps((name, arguments)))
            except queue.Full:
                self.problem = "it no longer takes what the run sends"
                if self.child is not None:
                    self.child.kill()
        raise RuntimeError(self.problem)

    def _write(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        try:
            while (call := self._calls.get()) is not None:
                child.stdin.write(call)
                child.stdin.flush()
                self._calls.task_done()
            child.stdin.close()
        except OSError:
            pass  # the child has ended: the other thread says why

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            level, _, text = line.decode().strip().partition(" ")
            if level == "ERROR":
                self.problem = text
            else:
                log.log(logging.getLevelNamesMapping()[level], "%s: %s", self.name, text)
        if child.wait() != 0 and self.problem is None:
            self.problem = "its process ended before the run did"


# ---- the child -----------------------------------------------------------------------------------


def main() -> None:
    """Serve one run; the name of the sink is the argument of the process."""
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The run reads our log, and nothing that the library prints.
    handler = logging.StreamHandler(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    os.dup2(2, 1)
    logger = logging.getLogger("fisher_lab")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    code = 0
    try:
        serve(sys.argv[1], sys.stdin.buffer)
    except BaseException as error:  # a library may call exit
        log.error("%s", record.headline(record.describe(error)))
        code = 1
    os._exit(code)  # threads and exit hooks of the library must not keep this process


def serve(name: str, calls: IO[bytes]) -> None:
    """Hand calls to a sink until the input ends.

    Args:
        name: of the sink.
        calls: pickled calls. Where they end without ``finish``, the run was killed.
    """
    sink: Tracker | None = None
    grace_s, status = 60.0, "killed"
    while True:
        try:
            call, arguments = pickle.load(calls)
        except (EOFError, pickle.UnpicklingError):
            break
        if call == "start":
            config, start = arguments
            grace_s = config.grace_s
            made: Tracker = import_module(f"fisher_lab.tracking.{name}").Sink(config)
            made.start(start)
            sink = made
        elif call == "finish":
            (status,) = arguments
            break
        else:
            getattr(sink, call)(*arguments)
    if sink is not None:
        timer = threading.Timer(grace_s, os._exit, (1,))
        timer.daemon = True
        timer.start()
        sink.finish(status)

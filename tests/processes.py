"""Processes of a test: waiting for what they do, and the time for which they hold up a thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil


def start_python(
    *arguments: str, environment: Mapping[str, str] | None = None, **more: Any
) -> subprocess.Popen[str]:
    """Start Python, which may import what this process may; ``more`` is for `Popen`."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, *arguments],
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        **more,
    )


def python(
    *arguments: str, text: str | None = None, seconds: float = 120.0, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, ``text`` on its standard input; see `start_python`."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start_python(*arguments, **pipes, **more) as process:
        try:
            out, err = process.communicate(text, timeout=seconds)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def no_child_is_left() -> Iterator[None]:
    """Kill the processes that are begun meanwhile and do not end, and all that they have begun."""
    before = set(psutil.Process().children())
    yield
    left = [one for one in psutil.Process().children() if one not in before]
    family = [other for one in left for other in (*one.children(recursive=True), one)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=20)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (it may be a zombie, or go while one looks)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    """The first true value of a condition; fails after ``seconds``."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        pause.wait(0.02)
    raise AssertionError(f"not within {seconds} s")


class Clock:
    """Seconds since it was made in which this thread ran or waited for something.

    Without those in which it could have run and the machine had no processor for it (Linux): a
    bound on what is waited for says nothing of these.
    """

    def __init__(self) -> None:
        self._began = self._now()

    def __call__(self) -> float:
        return self._now() - self._began

    @staticmethod
    def _now() -> float:
        try:
            held_up_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            held_up_ns = 0
        return time.monotonic() - held_up_ns / 1e9

"""Other processes: whether one still lives, and how a new one finds this very package."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_STATE, _START_TIME = 0, 19
"""Positions in ``/proc/<pid>/stat``, counted from the field after the program's name."""


@functools.cache
def namespace() -> str:
    """A name under which process numbers can be compared: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "|".join(parts)


def start_time(pid: int) -> str:
    """When a process of this namespace began, in clock ticks since boot; empty where unknown.

    It tells a process from a later one with the same number. psutil derives the time of day from
    it, which changes when the clock is set.
    """
    stat = _stat(pid)
    return stat[_START_TIME] if len(stat) > _START_TIME else ""


def is_gone(pid: int, started: str) -> bool:
    """Whether a process of this namespace has certainly ended.

    Args:
        pid: its number.
        started: its :func:`start_time`, when it was known to live.
    """
    import psutil

    stat = _stat(pid)
    if not stat:  # there is no /proc here, or it hides the processes of other users
        return not psutil.pid_exists(pid)
    return stat[_STATE] in ("Z", "X") or stat[_START_TIME] != started


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the program's name, in brackets, may hold spaces


def python_path() -> str:
    """``PYTHONPATH`` with which another process imports this very package, wherever it is run."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([root, *(path for path in known if path and path != root)])


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Processes that are started meanwhile, here or by a scheduler, import this very package."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

"""A lock that one process of many holds, on this host or on others, over any shared file system.

A lock on ``name`` is a file ``name.lock.<generation>`` that was made by an exclusive create. It
says who its holder is, and a heartbeat touches it. The lock is stale when the heartbeat has stopped
for ``stale_after`` seconds by the file system's own clock, or at once when its holder was a process
of this host that has ended. All that is needed of the file system is an exclusive create, a listing
and an unlink, so NFS serves.

A stale lock is never removed first and taken second, because a third process could come in between.
The taker creates the *next* generation, which only one process can, lists again, and gives way
unless everything it sees is what it had judged stale before the create. Of two that have created
something, at least the later one sees the file of the other: both may give way, never both win.

A holder that was frozen for longer than ``stale_after`` cannot be stopped. Its heartbeat notices
and sets ``lost``; what it publishes then must be atomic and harmless, as a directory that is named
by its content is (``atomic.directory``), or lie in the directory that the lock ``guards``. There it
replaces no file any more: it looks at its lock between writing the temporary file and renaming it,
and whoever takes over has removed all temporary files before. Who takes over also sees everything
in that directory as it is, and not as its host remembers it.

flufl.lock breaks a stale lock in two steps between which two processes can both win (it says so),
compares the clocks of hosts, has no heartbeat, and keeps a dead holder's lock until it expires.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fisher_lab.runs import atomic

STALE_AFTER = 60.0
_MOST_BYTES = 4096
_STATE, _START_TIME = 0, 19
"""Positions in ``/proc/<pid>/stat``, counted from the field after the program's name."""
_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.005, 0.5


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as far as its file says.

    Attributes:
        token: The random name of this acquisition; unique.
        host: Name of the host.
        pid: Process number on that host.
        namespace: What makes ``pid`` comparable (``_namespace``).
        started: When the process began, in clock ticks since boot, which tells it from a later one
            with the same number; empty where unknown. (psutil derives the time of day from it,
            which changes when the clock is set.)
        touched: Time of the last heartbeat, by the file system's clock.
    """

    token: str
    host: str = "?"
    pid: int = 0
    namespace: str = "?"
    started: str = ""
    touched: float = 0.0

    @classmethod
    def here(cls) -> Holder:
        """This process, under a new token."""
        pid, stat = os.getpid(), _stat(os.getpid())
        started = stat[_START_TIME] if stat else ""
        return cls(secrets.token_hex(8), socket.gethostname(), pid, _namespace(), started)

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder that a lock file names; None where the file has gone."""
        try:
            with atomic.open_regular(path) as file:  # opened, so that NFS looks afresh
                touched, text = os.fstat(file.fileno()).st_mtime, file.read(_MOST_BYTES)
        except FileNotFoundError:
            return None
        # The file is empty for a moment after its create.
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            return cls(**json.loads(text), touched=touched)
        return cls(f"unreadable: {path.name}", touched=touched)

    def write(self, path: Path) -> bool:
        """Create the lock file; false where it exists."""
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump({k: v for k, v in vars(self).items() if k != "touched"}, file)
        except FileExistsError:
            return False
        except OSError:  # the disk is full: an empty file would hold the lock
            path.unlink(missing_ok=True)
            raise
        return True

    def is_here(self) -> bool:
        """Whether the holder is a process of this host that lives."""
        return self.namespace == _namespace() and not self.is_gone()

    def is_gone(self) -> bool:
        """Whether the holder was a process of this host that has ended."""
        import psutil

        if self.namespace != _namespace():
            return False
        stat = _stat(self.pid)
        if not stat:  # there is no /proc here, or it hides the processes of other users
            return not psutil.pid_exists(self.pid)
        return stat[_STATE] in ("Z", "X") or stat[_START_TIME] != self.started


class LockLost(RuntimeError):
    """Another process has taken over the lock under which a file was to be replaced."""


class Lock:
    """An exclusive lock on a path that expires with its holder.

    Args:
        path: What is locked; the files of the lock are ``<path>.lock.<generation>``.
        stale_after: Seconds without a heartbeat after which others may take over.
        guards: A directory of which only the holder replaces files; made where it is missing.

    Attributes:
        heartbeat: Seconds between two touches.
        lost: Set when another process has taken over the lock that this object held.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        stale_after: float = STALE_AFTER,
        guards: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.stale_after = stale_after
        self.guards = guards
        self._fence = contextlib.ExitStack()
        self.heartbeat = stale_after / 4
        self.lost = threading.Event()
        self._file: Path | None = None
        self._token = ""
        self._stop = threading.Event()
        self._beating = threading.Thread()

    def acquire(self) -> bool:
        """Try once, without waiting; true when the lock is now held.

        Raises:
            RuntimeError: this object holds the lock already.
        """
        if self._file is not None:
            raise RuntimeError(f"the lock on {self.path} is held by this object already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self._holders()
        if before and not self._are_stale(before.values(), self._now()):
            return False
        mine, me = self._generation(max(before, default=-1) + 1), Holder.here()
        if not me.write(mine):
            return False
        known = {me.token, *(holder.token for holder in before.values())}
        if any(holder.token not in known for holder in self._holders().values()):
            mine.unlink(missing_ok=True)
            return False
        for generation in before:
            self._generation(generation).unlink(missing_ok=True)
        try:
            self._look_afresh()
        except OSError:
            mine.unlink(missing_ok=True)
            raise
        self._file, self._token = mine, me.token
        self.lost.clear()
        self._stop.clear()
        self._beating = threading.Thread(
            target=self._beat, args=(mine,), name=f"lock {mine}", daemon=True
        )
        self._beating.start()
        return True

    def acquire_within(self, timeout: float) -> bool:
        """Try until the lock is held, or ``timeout`` seconds are over."""
        until = time.monotonic() + timeout
        return any(self.acquire() for _ in _pauses(until))

    def check(self) -> None:
        """See whether the lock is still held, whatever this host remembers.

        Raises:
            LockLost: it is not.
        """
        self._now()
        if not self._is_still_mine():
            self.lost.set()
            raise LockLost(f"the lock on {self.path} is held by another process by now")

    def release(self) -> None:
        """Give the lock up; without effect where it is not held."""
        if self._file is None:
            return
        self._fence.close()
        self._stop.set()
        self._beating.join()
        if self._is_still_mine():
            self._file.unlink(missing_ok=True)
        self._file = None

    def holder(self, *, probe: bool = False) -> Holder | None:
        """Who holds the lock now; None where it is free or stale.

        Args:
            probe: make and remove a file, as :meth:`acquire` does, to ask the file system for its
                time. Without it nothing is written, and where the clock of the file system and that
                of this host differ, a holder may seem stale too early or too late.
        """
        holders = self._holders()
        if not holders:
            return None
        now = time.time()
        with contextlib.suppress(OSError):  # a folder that nobody may write to
            now = self._now() if probe else now
        return None if self._are_stale(holders.values(), now) else holders[max(holders)]

    def __enter__(self) -> Lock:
        if self._file is None:
            raise RuntimeError("acquire() the lock before entering it")
        if self.guards is not None:
            self._fence.enter_context(atomic.fenced(self.guards, self.check))
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _generation(self, number: int) -> Path:
        return self.path.parent / f"{self.path.name}.lock.{number}"

    def _holders(self) -> dict[int, Holder]:
        """Generation -> holder of every file of the lock."""
        prefix = f"{self.path.name}.lock."
        try:
            names = os.listdir(self.path.parent)
        except FileNotFoundError:
            return {}
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        found = {int(n): Holder.read(self._generation(int(n))) for n in numbers if n.isdecimal()}
        return {number: holder for number, holder in found.items() if holder is not None}

    def _are_stale(self, holders: Iterable[Holder], now: float) -> bool:
        return all(now - one.touched > self.stale_after or one.is_gone() for one in holders)

    def _look_afresh(self) -> None:
        """See everything in the guarded directory, and drop what others have begun to write."""
        if self.guards is not None:
            self.guards.mkdir(parents=True, exist_ok=True)
            self._now(self.guards)
            atomic.remove_leftovers(self.guards)

    def _now(self, folder: Path | None = None) -> float:
        """The present time of the file system: on NFS it is the server's, and clocks differ.

        A host that has changed something in a directory looks at it afresh.
        """
        # Not `.tmp`: the holder's `atomic.remove_leftovers` must not take it away.
        name = f".{self.path.name}.{secrets.token_hex(8)}.now"
        probe = (folder or self.path.parent) / name
        try:
            probe.touch(exist_ok=False)
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _is_still_mine(self) -> bool:
        holder = Holder.read(self._file) if self._file is not None else None
        return holder is not None and holder.token == self._token

    def _beat(self, file: Path) -> None:
        while not self._stop.wait(self.heartbeat):
            try:
                if not self._is_still_mine():
                    self.lost.set()
                    return
                os.utime(file)
            except OSError:
                continue  # ESTALE or EIO on a network file system: the next beat may do better


def once(
    target: str | os.PathLike[str],
    build: Callable[[Path], None],
    *,
    on_wait: Callable[[Holder], None] | None = None,
) -> bool:
    """Have ``target`` built by exactly one of all the processes that ask for it.

    The others wait until it is there. If the builder dies they notice, and one of them builds.

    Args:
        target: What is to be there in the end.
        build: Makes it, atomically (under a temporary name, then renamed). Called with the lock
            held, after what a killed builder left of its temporary files has been removed.
        on_wait: Called once, with the builder's identity, when there is a wait.

    Returns:
        Whether it was built here.

    Raises:
        RuntimeError: ``build`` returned and the target is not there.
    """
    target = Path(target)
    lock = Lock(target)
    for _ in _pauses():
        if target.exists():
            return False
        if lock.acquire():
            break
        if on_wait is not None and (holder := lock.holder()) is not None:
            on_wait(holder)
            on_wait = None
    with lock:
        if target.exists():
            return False
        atomic.remove_leftovers(target.parent, target.name)
        build(target)
        if not target.exists():
            raise RuntimeError(f"{target} is not there although its builder returned")
    return True


def _pauses(until: float = math.inf) -> Iterator[None]:
    """One turn at once, then others after pauses that grow, until the monotonic clock says so."""
    pause = _PAUSE_FIRST_S
    yield
    while time.monotonic() < until:
        time.sleep(pause * random.uniform(0.5, 1.0))  # so that those who wait do not move as one
        pause = min(2 * pause, _PAUSE_LAST_S)
        yield


@functools.cache
def _namespace() -> str:
    """A name under which process numbers can be compared: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "|".join(parts)


def _stat(pid: int) -> list[str]:
    """What ``/proc`` says of a process, after the name of its program; empty where unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the program's name, in brackets, may hold spaces

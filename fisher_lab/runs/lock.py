"""Claims: one process of many does a piece of work, on this host or on others, without file locks.

A claim on ``name`` is a file ``name.claim.<generation>`` made by an exclusive create, with its
owner's identity inside, kept alive by a heartbeat that touches it. It is stale when the heartbeat
has stopped for ``stale_after`` seconds by the file system's own clock, or at once when its owner is
a process of this host that no longer lives. Nothing here needs more of the file system than an
atomic create, a rename and a listing, so NFS serves.

A stale claim is never removed first and taken second: between the two a third process could come
in. The taker creates the *next* generation, which only one can, then lists again, and gives way
unless everything it sees is what it had judged stale *before* the create. Of two that created
something, at least the later one sees the other's file, so both can give way but never both win.

What a claim cannot do is stop an owner that was frozen past ``stale_after`` and wakes up. Its
heartbeat notices and sets ``lost``; what it then publishes must be atomic and harmless, as a
directory named by its content is (`fisher_lab.runs.atomic.directory`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic

__all__ = ["Claim", "ClaimTimeout", "Owner", "once"]

STALE_AFTER = 60.0
_POLL_FIRST, _POLL_LAST = 0.02, 0.5


class ClaimTimeout(TimeoutError):
    """Somebody else held the claim for longer than the caller was ready to wait."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, as far as its file tells.

    Attributes:
        token: The claim's random name; unique.
        host: Host name.
        pid: Process number on that host.
        machine: What makes ``pid`` comparable: boot and process-namespace identity.
        born: The process's start time (kernel ticks since boot), or an empty string.
        age: Seconds since the last heartbeat, by the file system's clock.
    """

    token: str
    host: str
    pid: int
    machine: str
    born: str
    age: float

    def is_here(self) -> bool:
        """Whether ``pid`` is the owner's number on this machine, and the owner lives."""
        return self.machine == _machine() and not self.is_dead()

    def is_dead(self) -> bool:
        """Whether the owner provably no longer lives (false where that cannot be known)."""
        if self.machine != _machine():
            return False
        return not _is_alive(self.pid) or _birth(self.pid) != self.born


class Claim:
    """An exclusive, self-expiring claim on a path.

    Args:
        path: What is claimed; the claim's files are ``<path>.claim.<generation>``.
        stale_after: Seconds without a heartbeat after which others may take over.
        heartbeat: Seconds between two touches; a quarter of ``stale_after`` by default.

    Raises:
        ValueError: ``stale_after`` is not positive, or ``heartbeat`` is not under it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        stale_after: float = STALE_AFTER,
        heartbeat: float | None = None,
    ) -> None:
        heartbeat = stale_after / 4 if heartbeat is None else heartbeat
        if not 0 < heartbeat < stale_after:
            raise ValueError(
                f"stale_after={stale_after} and heartbeat={heartbeat}: "
                "0 < heartbeat < stale_after is needed"
            )
        self.path = Path(path)
        self.stale_after = stale_after
        self.heartbeat = heartbeat
        self.lost = threading.Event()
        self._file: Path | None = None
        self._token = ""
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the claim now."""
        return self._file is not None and not self.lost.is_set()

    def acquire(self) -> bool:
        """Try once, without waiting; true when the claim is now held."""
        if self._file is not None:
            raise RuntimeError(f"the claim on {self.path} is held by this object already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        with self._candidate(token) as candidate:
            before = self._owners(now=_touched(candidate))
            if any(not self._is_stale(owner) for owner in before.values()):
                return False
            mine = self._generation(max(before, default=-1) + 1)
            if not _create(candidate, mine):
                return False
        judged = {owner.token for owner in before.values()}
        others = [owner for owner in self._owners().values() if owner.token != token]
        if any(owner.token not in judged for owner in others):
            mine.unlink(missing_ok=True)
            return False
        for generation in before:
            self._generation(generation).unlink(missing_ok=True)
        self._begin(mine, token)
        return True

    def acquire_within(self, timeout: float) -> bool:
        """Try until it is held, or ``timeout`` seconds are over."""
        until, pause = time.monotonic() + timeout, _POLL_FIRST / 4
        while not self.acquire():
            if time.monotonic() > until:
                return False
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _POLL_LAST)
        return True

    def release(self) -> None:
        """Give the claim up; without effect where it is not held."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        if self._file is not None and self._still_mine():
            self._file.unlink(missing_ok=True)
        self._file = self._beating = None

    def owner(self) -> Owner | None:
        """The present holder, stale or not; None where nobody is."""
        owners = self._owners(now=self._now())
        return owners[max(owners)] if owners else None

    def alive(self) -> Owner | None:
        """The present holder, unless it is stale."""
        owner = self.owner()
        return None if owner is None or self._is_stale(owner) else owner

    def __enter__(self) -> Claim:
        if self._file is None:
            raise RuntimeError("acquire() the claim before entering it")
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- files ---------------------------------------------------------------------------------

    def _generation(self, number: int) -> Path:
        return self.path.parent / f"{self.path.name}.claim.{number}"

    @contextlib.contextmanager
    def _candidate(self, token: str) -> Iterator[Path]:
        """A file with the would-be owner's identity, to be linked into place."""
        identity = {
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "born": _birth(os.getpid()),
            "since": time.time(),
        }
        # Not `.tmp`: the holder's `atomic.remove_leftovers` must not take a rival's candidate away.
        path = self.path.parent / f".{self.path.name}.claim.{token}.new"
        path.write_text(json.dumps(identity), encoding="utf-8")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _owners(self, now: float | None = None) -> dict[int, Owner]:
        """Generation -> owner of every claim file there is. Age is 0 where ``now`` is not given."""
        prefix = f"{self.path.name}.claim."
        owners = {}
        try:
            names = os.listdir(self.path.parent)
        except FileNotFoundError:
            return {}
        for name in names:
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdecimal():
                owner = _read(self.path.parent / name, now)
                if owner is not None:
                    owners[int(number)] = owner
        return owners

    def _now(self) -> float:
        """The file system's own time: on NFS it is the server's, and hosts' clocks differ."""
        if not self.path.parent.is_dir():
            return time.time()
        with self._candidate(secrets.token_hex(8)) as probe:
            return _touched(probe)

    def _is_stale(self, owner: Owner) -> bool:
        return owner.age > self.stale_after or owner.is_dead()

    # -- heartbeat -----------------------------------------------------------------------------

    def _begin(self, file: Path, token: str) -> None:
        self._file, self._token = file, token
        self.lost.clear()
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name=f"claim {file}", daemon=True)
        self._beating.start()

    def _still_mine(self) -> bool:
        assert self._file is not None
        owner = _read(self._file, None)
        return owner is not None and owner.token == self._token

    def _beat(self) -> None:
        assert self._file is not None
        while not self._stop.wait(self.heartbeat):
            try:
                if not self._still_mine():
                    self.lost.set()
                    return
                os.utime(self._file)
            except OSError:
                continue  # ESTALE or EIO on a network file system: the next beat may do better


def once(
    target: str | os.PathLike[str],
    build: Callable[[Path], None],
    *,
    ready: Callable[[Path], bool] = Path.exists,
    stale_after: float = STALE_AFTER,
    timeout: float | None = None,
    on_wait: Callable[[Owner], None] | None = None,
) -> bool:
    """Have ``target`` built by exactly one of all the processes that ask for it.

    The others wait until it is ready. If the builder dies they notice, and one of them builds.

    Args:
        target: What is to be there in the end.
        build: Makes it, atomically (under a temporary name, then renamed). Called with the claim
            held, after what a killed builder left of its temporary files has been removed.
        ready: Says whether the target is there.
        stale_after: Seconds without a heartbeat after which a builder counts as dead; a dead
            builder on the same host is noticed at once.
        timeout: Seconds to wait for somebody else's build; None waits as long as it is alive.
        on_wait: Called once, with the builder's identity, when there is a wait.

    Returns:
        Whether it was built here.

    Raises:
        ClaimTimeout: The wait took longer than ``timeout``.
        RuntimeError: ``build`` returned and the target is not ready.
    """
    target = Path(target)
    if ready(target):
        return False
    claim = Claim(target, stale_after)
    started, pause, told = time.monotonic(), _POLL_FIRST, False
    while not claim.acquire():
        if ready(target):
            return False
        if on_wait is not None and not told and (owner := claim.owner()) is not None:
            told = True
            on_wait(owner)
        if timeout is not None and time.monotonic() - started > timeout:
            raise ClaimTimeout(
                f"{target} was not ready after {timeout:g} s; held by {claim.owner()}"
            )
        time.sleep(pause * random.uniform(0.5, 1.0))  # so that those who wait do not move as one
        pause = min(2 * pause, _POLL_LAST)
    with claim:
        if ready(target):
            return False
        atomic.remove_leftovers(target)
        build(target)
        if not ready(target):
            raise RuntimeError(f"{target} is not ready although its builder returned")
    return True


def _create(candidate: Path, path: Path) -> bool:
    """Make ``path`` with the candidate's content in one step; false where it exists."""
    try:
        os.link(candidate, path)
    except FileExistsError:
        return False
    except OSError:
        # NFS may lose the answer of a link that was made; a file system without links refuses it.
        if candidate.stat().st_nlink > 1:
            return True
    else:
        return True
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(candidate.read_bytes())
    return True


def _read(path: Path, now: float | None) -> Owner | None:
    """The claim in ``path``; None where the file has gone. Opened, so that NFS looks afresh."""
    try:
        with open(path, encoding="utf-8") as file:
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    age = 0.0 if now is None else now - touched
    fields: dict[str, Any] = {}
    # A file without links is empty for a moment after its create; cut short, it is known by name.
    with contextlib.suppress(ValueError):
        loaded = json.loads(text)
        fields = loaded if isinstance(loaded, dict) else {}
    return Owner(
        token=str(fields.get("token", f"unreadable:{path.name}")),
        host=str(fields.get("host", "?")),
        pid=int(fields.get("pid", 0)),
        machine=str(fields.get("machine", "?")),
        born=str(fields.get("born", "")),
        age=age,
    )


def _touched(path: Path) -> float:
    """Set the file's time to the file system's present, and return it."""
    os.utime(path)
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _machine() -> str:
    """A name under which process numbers can be compared: host, boot, process namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return "|".join(parts)


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _state(pid) not in ("Z", "X")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third (state) on; empty where there is no such file."""
    with contextlib.suppress(OSError, IndexError):
        # The second field is the program's name in brackets, and may itself hold spaces.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return []


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _birth(pid: int) -> str:
    """Start time in clock ticks since boot (field 22): tells a process from a later namesake."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""

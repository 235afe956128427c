"""A file server in memory, as the hosts see it that have mounted it.

What a host has seen of a directory it may hold for true for a while (`Host.lag` for listings,
`Host.late` for names), as NFS does with its caches: a file that another host has made is missing,
one that was replaced has its former content, a listing is of a moment ago. What a host itself
changes in a directory it sees at once, with everything else in it, and an exclusive create, a
rename and an unlink are the server's. Times are the server's, by its own clock.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks.simulated.kernel import Host, World

ROOT = "/sim"
FIRST_DESCRIPTOR = 1_000_000


class File:
    """What a file holds, and what of it would outlive the crash of the host that wrote it."""

    def __init__(self, number: int, now: float) -> None:
        self.number, self.mtime = number, now
        self.data, self.durable = bytearray(), b""
        self.writer: Host | None = None


class Directory:
    """Names, and what they stand for."""

    def __init__(self, number: int, now: float) -> None:
        self.number, self.mtime = number, now
        self.names: dict[str, File | Directory] = {}


def failure(number: int, path: str) -> OSError:
    """The error of a call."""
    return OSError(number, os.strerror(number), path)


class Server:
    """The files under :data:`ROOT`.

    Args:
        world: whose clock it has, and whose processes call.
        skew: seconds by which its own clock is ahead.

    Attributes:
        full: whether it takes no more data.
        on_publish: told of every name that comes to stand for a file, and of what that holds.
        on_remove: told of every file that is removed.
        on_short: told of every write of which a part alone was taken.
    """

    def __init__(self, world: World, skew: float) -> None:
        self.world, self.skew = world, skew
        self.numbers = 1
        self.root = Directory(1, 0.0)
        self.full = False
        self.descriptors: dict[int, Handle | Directory] = {}
        self.on_publish: Callable[[str, bytes], None] = lambda path, data: None
        self.on_short: Callable[[], None] = lambda: None
        self.on_remove: Callable[[str, bytes], None] = lambda path, data: None

    @property
    def now(self) -> float:
        """By the server's clock."""
        return 1.7e9 + self.world.now + self.skew

    def find(self, path: str, fresh: bool = False) -> File | Directory:
        """What a path stands for, for the host that asks.

        Raises:
            OSError: nothing.
        """
        found: File | Directory = self.root
        for part in path.removeprefix(ROOT).strip("/").split("/"):
            if not part:
                continue
            if not isinstance(found, Directory):
                raise failure(errno.ENOTDIR, path)
            names = found.names if fresh else self.seen(found, self.world.process.host.late)
            if part not in names:
                raise failure(errno.ENOENT, path)
            found = names[part]
        return found

    def seen(self, directory: Directory, lag: float) -> dict[str, Any]:
        """The names in a directory, as the host that asks sees them."""
        host = self.world.process.host
        if lag <= 0:
            return directory.names
        when, names = host.views.get(directory.number, (-1.0, {}))
        if when < 0 or self.world.now > when:
            until = self.world.now + lag * self.world.random.random()
            names = dict(directory.names)
            host.views[directory.number] = (until, names)
        return names

    def parent(self, path: str) -> tuple[Directory, str]:
        """The directory of a path that is to be changed, and the name in it."""
        folder, _, name = path.rstrip("/").rpartition("/")
        found = self.find(folder)
        if not isinstance(found, Directory):
            raise failure(errno.ENOTDIR, path)
        return found, name

    def changed(self, directory: Directory) -> None:
        """The host that runs has changed a directory, and knows of it."""
        directory.mtime = self.now
        self.world.process.host.views.pop(directory.number, None)

    def open(self, path: str, flags: int) -> Handle:
        """Open or make a file."""
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if flags & os.O_CREAT:
            directory, name = self.parent(path)
            there = directory.names.get(name)
            if there is None:
                if self.full:
                    raise failure(errno.ENOSPC, path)
                self.numbers += 1
                there = directory.names[name] = File(self.numbers, self.now)
                self.changed(directory)
            elif flags & os.O_EXCL:
                self.changed(directory)
                raise failure(errno.EEXIST, path)
        else:
            there = self.find(path)
        if isinstance(there, Directory):
            if writes:
                raise failure(errno.EISDIR, path)
        elif flags & os.O_TRUNC:
            there.data, there.mtime = bytearray(), self.now
        return self.described(Handle(self, path, there, flags))

    def described(self, handle: Handle) -> Handle:
        """Give a handle its number."""
        self.descriptors[handle.number] = handle
        return handle

    def mkdir(self, path: str) -> None:
        directory, name = self.parent(path)
        if name in directory.names:
            self.changed(directory)
            raise failure(errno.EEXIST, path)
        if self.full:
            raise failure(errno.ENOSPC, path)
        self.numbers += 1
        directory.names[name] = Directory(self.numbers, self.now)
        self.changed(directory)

    def unlink(self, path: str) -> None:
        directory, name = self.parent(path)
        if name not in directory.names:
            self.changed(directory)
            raise failure(errno.ENOENT, path)
        gone = directory.names.pop(name)
        self.changed(directory)
        if isinstance(gone, File):
            self.on_remove(path, bytes(gone.data))

    def rename(self, source: str, target: str) -> None:
        one, old = self.parent(source)
        other, new = self.parent(target)
        if old not in one.names:
            self.changed(one)
            raise failure(errno.ENOENT, source)
        moved = one.names.pop(old)
        other.names[new] = moved
        self.changed(one)
        self.changed(other)
        if isinstance(moved, File):
            self.on_publish(target, bytes(moved.data))

    def utime(self, path: str) -> None:
        found = self.find(path)
        found.mtime = self.now

    def stat(self, path: str) -> Any:
        return status(self.find(path))

    def listdir(self, path: str) -> list[str]:
        found = self.find(path)
        if not isinstance(found, Directory):
            raise failure(errno.ENOTDIR, path)
        return list(self.seen(found, self.world.process.host.lag))

    def scandir(self, path: str) -> Scan:
        found = self.find(path)
        if not isinstance(found, Directory):
            raise failure(errno.ENOTDIR, path)
        return Scan(path, dict(self.seen(found, self.world.process.host.lag)))

    def crash(self, host: Host) -> None:
        """A host crashes: what it has written and not flushed is lost."""
        host.views.clear()
        waiting: list[File | Directory] = [self.root]
        while waiting:
            one = waiting.pop()
            if isinstance(one, Directory):
                waiting += one.names.values()
            elif one.writer is host and one.durable != one.data:
                one.data = bytearray(one.durable)


def status(found: File | Directory) -> Any:
    """As ``os.stat`` gives it, as far as anybody asks."""
    is_file = isinstance(found, File)
    mode = stat.S_IFREG | 0o644 if is_file else stat.S_IFDIR | 0o755
    size = len(found.data) if isinstance(found, File) else 0
    return SimpleNamespace(
        st_mode=mode, st_size=size, st_mtime=found.mtime, st_ino=found.number, st_dev=1
    )


class Scan:
    """What ``os.scandir`` returns."""

    def __init__(self, path: str, names: dict[str, Any]) -> None:
        self._entries = iter([Entry(path, name, one) for name, one in names.items()])

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Scan:
        return self

    def __next__(self) -> Entry:
        return next(self._entries)

    def close(self) -> None:
        """As of a scan of the operating system."""


class Entry:
    """One of a :class:`Scan`."""

    def __init__(self, folder: str, name: str, found: File | Directory) -> None:
        self.name, self.path = name, f"{folder.rstrip('/')}/{name}"
        self._is_directory = isinstance(found, Directory)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._is_directory

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return not self._is_directory

    def is_symlink(self) -> bool:
        return False


class Handle(io.RawIOBase):
    """An open file, or an open directory, of one process."""

    def __init__(self, server: Server, path: str, found: File | Directory, flags: int) -> None:
        self.server, self.path, self.found, self.flags = server, path, found, flags
        self.process = server.world.process
        self.number = FIRST_DESCRIPTOR + len(server.descriptors)
        self.position = 0

    def _call(self, name: str) -> bytearray:
        world = self.server.world
        if not world.is_here() or world.process is not self.process:
            raise OSError(errno.EBADF, "of a process that is gone")
        world.call(name, self.path)
        if isinstance(self.found, Directory):
            raise failure(errno.EISDIR, self.path)
        return self.found.data

    def fileno(self) -> int:
        return self.number

    def readable(self) -> bool:
        return not self.flags & os.O_WRONLY

    def writable(self) -> bool:
        return bool(self.flags & (os.O_WRONLY | os.O_RDWR))

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._call("read")
        part = data[self.position : self.position + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self.found.data) if isinstance(self.found, File) else 0
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position}.get(whence, size)
        return self.position

    def tell(self) -> int:
        return self.position

    def write(self, content: Any) -> int:
        """Write; one that is killed, or finds the disk full, in the middle has written a part."""
        piece = bytes(content)
        half = len(piece) // 2
        self._put(piece[:half])
        try:
            self._put(piece[half:])
        except OSError:
            if half:
                self.server.on_short()
                return half
            raise
        return len(piece)

    def _put(self, piece: bytes) -> None:
        data = self._call("write")
        assert isinstance(self.found, File)
        if self.server.full and piece:
            raise failure(errno.ENOSPC, self.path)
        if self.flags & os.O_APPEND:
            self.position = len(data)
        data[self.position : self.position + len(piece)] = piece
        self.position += len(piece)
        self.found.mtime, self.found.writer = self.server.now, self.process.host

    def flush_to_disk(self) -> None:
        """What ``fsync`` does."""
        if isinstance(self.found, File):
            self.found.durable = bytes(self.found.data)

"""The calls to the operating system that a simulated process makes: the table, and its switch.

The code of fisher_lab runs as it is. What it asks of :mod:`os`, :mod:`io`, :mod:`time`,
:mod:`signal`, :mod:`subprocess` and :mod:`socket` is answered by the simulated cluster, where a
simulated process asks, and where the path is one of the simulated file server or of ``/proc``.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.simulated.files import FIRST_DESCRIPTOR, ROOT, Server, failure, status
from benchmarks.simulated.kernel import Process, World
from fisher_lab.runs import lock, signals

PROC = re.compile(r"/proc/(\d+)/stat")
FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


class Environment(MutableMapping[str, str]):
    """``os.environ``: of every process its own."""

    def __init__(self, world: World, real: MutableMapping[str, str]) -> None:
        self._world, self._real = world, real

    @property
    def _own(self) -> MutableMapping[str, str]:
        return self._world.process.environment if self._world.is_here() else self._real

    def __getitem__(self, name: str) -> str:
        return self._own[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._own))

    def __len__(self) -> int:
        return len(self._own)


class Event:
    """``threading.Event`` between simulated threads."""

    def __init__(self, world: World) -> None:
        self._world, self._set, self._waiting = world, False, []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for thread in self._waiting:
            thread.wake = self._world.now

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        world = self._world
        self._waiting.append(world.current)
        try:
            return world.wait(
                world.now + timeout if timeout is not None else float("inf"), self.is_set
            )
        finally:
            self._waiting.remove(world.current)


class ThreadOfProcess:
    """``threading.Thread`` of a simulated process."""

    def __init__(self, world: World, target: Any = None, args: Any = (), **_: Any) -> None:
        self._world, self._target, self._args = world, target, args
        self._thread: Any = None

    def start(self) -> None:
        self._thread = self._world.start(self._world.process, lambda: self._target(*self._args))

    def join(self, timeout: float | None = None) -> None:
        self._thread.joined.append(self._world.current)
        self._world.wait(float("inf"), lambda: self._thread.over)


class Popen:
    """``subprocess.Popen`` of a worker."""

    def __init__(
        self, world: World, program: Callable[[list[str]], int], command: Any, **more: Any
    ):
        self._world = world
        world.call("fork")
        here = world.process
        self.process = Process(
            world, here.host, lambda: program(command), "worker", more.get("env"), here
        )
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return None

    def send_signal(self, signum: int) -> None:
        self._world.call("kill")
        self.process.send(signum)

    def wait(self, timeout: float | None = None) -> int:
        until = float("inf") if timeout is None else self._world.now + timeout
        if not self._world.wait(until, lambda: self.process.code is not None):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        assert self.process.code is not None
        return self.process.code


class Calls:
    """The calls, for one world.

    Args:
        world: of the processes that call.
        server: of the files.
        program: what a worker process runs, given its command line.
        ask: answers the programs of SLURM.
    """

    def __init__(
        self,
        world: World,
        server: Server,
        program: Callable[[list[str]], int],
        ask: Callable[[list[str]], Any],
    ) -> None:
        self.world, self.server, self.program, self.ask = world, server, program, ask

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While this is open simulated processes call these."""
        world = self.world
        threads = SimpleNamespace(
            Thread=lambda **more: ThreadOfProcess(world, **more), Event=lambda: Event(world)
        )
        main = SimpleNamespace(
            current_thread=lambda: world.current, main_thread=lambda: world.process.main
        )
        replaced = [
            *((os, name, self._of_path(name)) for name in OF_PATHS),
            *((os, name, self._of(name)) for name in OF_OS),
            *((time, name, self._of(name)) for name in ("time", "monotonic", "sleep")),
            *((module, "open", self._of("fopen", module.open)) for module in (io, builtins)),
            (signal, "signal", self._of("signal")),
            (socket, "gethostname", self._of("gethostname")),
            (subprocess, "Popen", self._of("Popen")),
            (subprocess, "run", self._of("run")),
            (os, "environ", Environment(world, os.environ)),
            (lock, "threading", threads),
            (lock, "_namespace", lambda: world.process.host.name),
            (signals, "threading", main),
            (signals, "_thread", SimpleNamespace(start_new_thread=lambda *_: None)),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, call in replaced:
                stack.enter_context(mock.patch.object(owner, name, call))
            yield

    def _of(self, name: str, real: Any = None) -> Any:
        """A call by a simulated process, or the real one."""
        if real is None:
            owner = {"time": time, "monotonic": time, "sleep": time, "signal": signal}.get(name)
            owner = owner or {"gethostname": socket, "Popen": subprocess, "run": subprocess}.get(
                name, os
            )
            real = getattr(owner, name)
        ours, is_here = getattr(self, name), self.world.is_here

        def call(*arguments: Any, **more: Any) -> Any:
            if is_here():
                answer = ours(*arguments, **more)
                if answer is not NotImplemented:
                    return answer
            return real(*arguments, **more)

        return call

    def _of_path(self, name: str) -> Any:
        """A call about a path of the server."""
        real, ours, world = getattr(os, name), getattr(self, name), self.world

        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            text = path if isinstance(path, int) else os.fspath(path)
            is_ours = isinstance(text, str) and text.startswith(ROOT)
            if is_ours and world.is_here():
                world.call(name, str(text))
                return ours(text, *arguments, **more)
            return real(path, *arguments, **more)

        return call

    # ---- paths

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        return self.server.open(path, flags).number

    def stat(self, path: str, *, follow_symlinks: bool = True, **_: Any) -> Any:
        return self.server.stat(path)

    def lstat(self, path: str, **_: Any) -> Any:
        return self.server.stat(path)

    def listdir(self, path: str) -> list[str]:
        return self.server.listdir(path)

    def scandir(self, path: str) -> Any:
        return self.server.scandir(path)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self.server.mkdir(path)

    def unlink(self, path: str) -> None:
        self.server.unlink(path)

    def rename(self, source: str, target: Any) -> None:
        self.server.rename(source, os.fspath(target))

    replace = rename

    def utime(self, path: str, times: Any = None) -> None:
        self.server.utime(path)

    # ---- descriptors

    def _handle(self, descriptor: Any) -> Any:
        is_ours = isinstance(descriptor, int) and descriptor >= FIRST_DESCRIPTOR
        return self.server.descriptors.get(descriptor) if is_ours else None

    def close(self, descriptor: int) -> Any:
        return NotImplemented if self._handle(descriptor) is None else None

    def fstat(self, descriptor: int) -> Any:
        handle = self._handle(descriptor)
        if handle is None:
            return NotImplemented
        self.world.call("fstat", handle.path)
        return status(handle.found)

    def fsync(self, descriptor: int) -> Any:
        handle = self._handle(descriptor)
        if handle is None:
            return NotImplemented
        self.world.call("fsync", handle.path)
        handle.flush_to_disk()
        return None

    def fopen(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        *_: Any,
    ) -> Any:
        """``open``: a file of the server, or ``/proc/<pid>/stat``."""
        raw: Any = self._handle(file)
        if raw is None:
            path = os.fspath(file) if not isinstance(file, int) else ""
            if (found := PROC.fullmatch(str(path))) is not None:
                return io.StringIO(self._about(int(found[1])))
            if not str(path).startswith(ROOT):
                return NotImplemented
            self.world.call("open", path)
            kind = next(letter for letter in mode if letter in FLAGS)
            flags = FLAGS[kind] if "+" not in mode else FLAGS[kind] & ~os.O_WRONLY | os.O_RDWR
            raw = self.server.open(path, flags)
        if buffering == 0:
            return raw
        if raw.readable() and raw.writable():
            stream: Any = io.BufferedRandom(raw)
        else:
            stream = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        if "b" in mode:
            return stream
        return io.TextIOWrapper(stream, encoding or "utf-8", errors, newline)

    def _about(self, pid: int) -> str:
        """``/proc/<pid>/stat``: what the state and the beginning of a process are taken from."""
        self.world.call("proc")
        process = self.world.processes.get(pid)
        if process is None or process.host is not self.world.process.host:
            raise failure(errno.ENOENT, f"/proc/{pid}/stat")
        state = "S" if process.code is None else "Z"
        return " ".join([str(pid), "(python)", state, *["0"] * 18, str(pid * 7), "0"])

    # ---- processes, time, programs

    def getpid(self) -> int:
        return self.world.process.pid

    def kill(self, pid: int, signum: int) -> None:
        self.world.call("kill")
        process = self.world.processes.get(pid)
        if process is None or process.code is not None:
            raise ProcessLookupError(errno.ESRCH, "no such process")
        process.send(signum)

    def killpg(self, pid: int, signum: int) -> None:
        self.kill(pid, signum)

    def waitid(self, _kind: int, pid: int, _options: int) -> Any:
        self.world.call("waitid")
        return self.world.processes[pid] if self.world.processes[pid].code is not None else None

    def time(self) -> float:
        return 1.7e9 + self.world.now + self.world.process.host.skew

    def monotonic(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        self.world.call("sleep")
        self.world.sleep(seconds)

    def signal(self, signum: int, handler: Any) -> Any:
        handlers = self.world.process.handlers
        before = handlers.get(signum, signal.SIG_DFL)
        handlers[signum] = handler
        return before

    def gethostname(self) -> str:
        return self.world.process.host.name

    def Popen(self, command: Any, **more: Any) -> Popen:
        return Popen(self.world, self.program, command, **more)

    def run(self, command: list[str], **_: Any) -> Any:
        self.world.call("run", command[0])
        return self.ask(command)


OF_PATHS = (
    "open", "stat", "lstat", "listdir", "scandir", "mkdir", "unlink", "rename", "replace", "utime",
)  # fmt: skip
OF_OS = ("close", "fstat", "fsync", "getpid", "kill", "killpg", "waitid")

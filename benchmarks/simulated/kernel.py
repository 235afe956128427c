"""Processes and time of a simulated cluster, one thread running at any moment.

A simulated thread is a greenlet. It hands over at the calls of :mod:`calls`, where the random
numbers of the seed say so, and while it sleeps; so a seed gives the same course of events again. A
process that is killed runs no call to its end any more: each raises :class:`Killed`, also those in
the ``finally`` of what was going on.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import greenlet

CALL_S = 0.0005
"""Simulated seconds that a call takes."""
MOST_CALLS = 40_000
"""Of one course of events; more of them mean that it does not come to an end."""

DEAD = (signal.SIGKILL, signal.SIGSEGV)


class Killed(BaseException):
    """The process is gone; nothing catches this but the kernel."""


class Stuck(AssertionError):
    """Nothing can run any more, or nothing comes to its end."""


class Thread:
    """A thread of a simulated process.

    Attributes:
        process: that it belongs to.
        wake: the simulated time at which it goes on.
        over: whether it has come to its end.
        joined: threads that wait for that.
    """

    def __init__(self, process: Process, target: Callable[[], None]) -> None:
        self.process = process
        self.target = target
        self.stack: greenlet.greenlet
        self.wake = 0.0
        self.over = False
        self.joined: list[Thread] = []


class Process:
    """A process of a host.

    Attributes:
        pid: its number; no two processes have the same.
        code: its exit code; negative for a signal; None while it runs.
        handlers: signal -> what ``signal.signal`` was given.
        pending: signals that have yet to be handled.
        calls: how many calls it has made.
    """

    def __init__(
        self,
        world: World,
        host: Host,
        main: Callable[[], int],
        name: str,
        environment: dict[str, str] | None = None,
        parent: Process | None = None,
    ) -> None:
        world.pids += 1
        self.pid, self.host, self.name, self.parent = world.pids, host, name, parent
        self.environment = dict(environment or {})
        self.code: int | None = None
        self.died_at: float | None = None
        self.handlers: dict[int, Any] = {}
        self.pending: list[int] = []
        self.calls = 0
        self.threads: list[Thread] = []
        self.world, self._body = world, main
        self.main = world.start(self, self._run)
        world.processes[self.pid] = self

    def _run(self) -> None:
        try:
            code = self._body()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception as error:
            self.world.uncaught.append((self.name, error))
            code = 1
        self.end(code)

    def end(self, code: int) -> None:
        """It has ended, and all its threads with it."""
        if self.code is None:
            self.code, self.died_at = code, self.world.now
            for thread in self.threads:
                thread.wake = self.world.now
            self.world.ended(self)

    def send(self, signum: int) -> None:
        """Send it a signal."""
        if self.code is not None:
            return
        if signum in DEAD:
            self.end(-signum)
        else:
            self.pending.append(signum)
            self.main.wake = self.world.now


class Host:
    """A machine.

    Attributes:
        skew: seconds by which its clock is ahead.
        lag: seconds for which it may take the listing of a directory for what it was.
        late: seconds after which a name may still stand for what it did: a rename arrives late.
        views: directory -> when it was looked at, and what was there.
    """

    def __init__(self, name: str, skew: float = 0.0) -> None:
        self.name, self.skew, self.lag, self.late = name, skew, 0.0, 0.0
        self.views: dict[int, tuple[float, dict[str, Any]]] = {}


class World:
    """One course of events.

    Args:
        seed: everything that happens follows from it.
        mixing: the probability with which another thread goes on after a call.

    Attributes:
        now: seconds.
        current: the thread that runs.
        on_call: told of every call before it happens; may kill, delay or refuse it.
        on_end: told of every process that has ended.
    """

    def __init__(self, seed: int, mixing: float = 0.1) -> None:
        self.random = random.Random(seed)
        self.mixing = mixing
        self.now, self.calls, self.pids = 1000.0, 0, 100
        self.threads: list[Thread] = []
        self.processes: dict[int, Process] = {}
        self.uncaught: list[tuple[str, BaseException]] = []
        self.on_call: Callable[[Process, str, str], None] = lambda process, name, path: None
        self.on_end: list[Callable[[Process], None]] = []
        self.current: Thread
        self.problem: BaseException | None = None
        self._ident, self._hub = 0, greenlet.getcurrent()

    def is_here(self) -> bool:
        """Whether a simulated thread asks."""
        is_ours = threading.get_ident() == self._ident
        return is_ours and greenlet.getcurrent() is not self._hub

    @property
    def process(self) -> Process:
        """The process that runs."""
        return self.current.process

    def start(self, process: Process, target: Callable[[], None]) -> Thread:
        """Start a thread of a process."""
        thread = Thread(process, target)
        thread.wake = self.now
        process.threads.append(thread)
        self.threads.append(thread)

        def body() -> None:
            try:
                if process.code is None:
                    target()
            except Killed:
                pass
            except BaseException as error:  # a fault of the simulation, or of a thread of its own
                self.problem = self.problem or error
            thread.over = True
            self.threads.remove(thread)
            for other in thread.joined:
                other.wake = self.now

        thread.stack = greenlet.greenlet(body, self._hub)
        return thread

    def run(self, host: Host, main: Callable[[], None]) -> None:
        """Run a course of events to its end: that of ``main``, a process of a host.

        Raises:
            Stuck: it does not come to its end.
        """

        def body() -> int:
            main()
            return 0

        Process(self, host, body, "user")
        self._ident = threading.get_ident()
        while self.threads:
            self.current = self._following()
            self.current.stack.switch()
        self._ident = 0
        if self.problem is not None:
            raise self.problem

    def call(self, name: str, path: str = "") -> None:
        """A call begins: faults happen to it, others have their turn, signals are handled."""
        self.calls += 1
        self.now += CALL_S
        process = self.current.process
        if process.code is not None:
            raise Killed
        process.calls += 1
        self.on_call(process, name, path)
        if self.random.random() < self.mixing:
            self._hand_over()
        self._go_on()

    def sleep(self, seconds: float) -> None:
        """The running thread sleeps."""
        self.wait(self.now + max(0.0, seconds), lambda: False)

    def wait(self, until: float, condition: Callable[[], Any], every: float = float("inf")) -> bool:
        """The running thread waits for a condition, or until a time; whether it has come true.

        Args:
            until: simulated time.
            condition: looked at when its turn comes.
            every: seconds after which it looks although nobody has woken it.
        """
        me = self.current
        self._go_on()
        while not condition():
            if self.now >= until:
                return False
            me.wake = min(until, self.now + every)
            self._hand_over()
            self._go_on()
        return True

    def ended(self, process: Process) -> None:
        """A process has ended: those that wait for it look."""
        for thread in self.threads:
            if thread.process is process.parent:
                thread.wake = self.now
        for told in self.on_end:
            told(process)

    def _go_on(self) -> None:
        """What the running thread finds when its turn comes."""
        me = self.current
        process = me.process
        if process.code is not None:
            raise Killed
        if self.problem is not None and process.name != "user":
            raise Killed
        if self.problem is not None:
            raise self.problem
        while process.pending and me is process.main:
            signum = process.pending.pop(0)
            handler = process.handlers.get(signum, signal.SIG_DFL)
            if callable(handler):
                handler(signum, None)
            elif handler != signal.SIG_IGN:
                process.end(-signum)
                raise Killed

    def _hand_over(self) -> None:
        self._hub.switch()

    def _following(self) -> Thread:
        """The thread whose turn it is."""
        if self.calls > MOST_CALLS and self.problem is None:
            self.problem = Stuck(f"no end after {self.calls} calls")
        ready = [one for one in self.threads if one.wake <= self.now]
        if not ready:
            self.now = min(one.wake for one in self.threads)
            ready = [one for one in self.threads if one.wake <= self.now]
        return ready[self.random.randrange(len(ready))] if len(ready) > 1 else ready[0]

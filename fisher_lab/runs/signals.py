"""Signals that end a run: what they make of its status, and how a task saves its state first.

Outside :meth:`Watch.deferred` a signal raises :class:`Interrupted` at once. A task that can save
its state asks for the signal instead::

    with run.signals.deferred() as pending:
        for step in steps:
            ...
            if pending():
                save()
                pending.stop()      # raises Interrupted

A signal that is still pending when the block ends is raised there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from fisher_lab.runs.status import Status

STATUS = {
    signal.SIGINT: Status.CANCELLED,
    signal.SIGTERM: Status.CANCELLED,
    signal.SIGUSR2: Status.PREEMPTED,
}
"""What a signal makes of the run: a cancelled run must not come back, a preempted one may."""


class Interrupted(BaseException):
    """A signal ended the run. No ``Exception``, so that no ``except Exception`` swallows it.

    Attributes:
        signum: the signal.
        status: ``cancelled`` or ``preempted``.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        self.status = STATUS[self.signum]
        super().__init__(f"{self.status} by {self.signum.name}")


class Pending:
    """Whether a signal has come: ``pending()`` is its number, or 0."""

    def __init__(self) -> None:
        self._signum = 0

    def __call__(self) -> int:
        """The number of the first signal that came, or 0."""
        return self._signum

    def stop(self) -> NoReturn:
        """End the run for the signal that came (SIGTERM where none did).

        Raises:
            Interrupted: always.
        """
        raise Interrupted(self._signum or signal.SIGTERM)

    def note(self, signum: int) -> None:
        """Keep the first signal: a scheduler that warns and then terminates has preempted."""
        self._signum = self._signum or signum


class Watch:
    """Handlers for the signals in :data:`STATUS`, installed while the context is open.

    Python allows handlers in the main thread only; in any other thread nothing is installed. Where
    the context is not open, :meth:`deferred` installs them for as long as it lasts.
    """

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._before: dict[int, Any] = {}
        self._ending = False

    def __enter__(self) -> Watch:
        if not self._before and threading.current_thread() is threading.main_thread():
            for signum in STATUS:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def ending(self) -> None:
        """From here on the run is being brought to its end: only SIGINT still breaks in."""
        self._ending = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[Pending]:
        """Note signals instead of raising, until the block ends.

        Yields:
            What says whether a signal has come.

        Raises:
            Interrupted: a signal came and the block ended without having raised for it.
        """
        if self._pending is not None:
            yield self._pending
            return
        opened = not self._before
        pending = self._pending = Pending()
        if opened:
            self.__enter__()
        try:
            yield pending
        finally:
            self._pending = None
            self._ending = self._ending or pending() != 0
            if opened:
                self.__exit__()
        if pending():
            pending.stop()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._pending is not None:
            self._pending.note(signum)
        elif signum == signal.SIGINT or not self._ending:
            # Schedulers repeat themselves; a second signal must not break into the ending of the
            # run. Whoever presses the interrupt key again means it.
            self._ending = True
            raise Interrupted(signum)


def leave(code: int) -> NoReturn:
    """End the process at once, without the interpreter's teardown; everything is written by now.

    Taking a model and its libraries apart takes seconds. It can also abort the process ("terminate
    called without an active exception"): a thread of a process group may still be winding up while
    C++ takes its statics down, and a completed run would be a failed one.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

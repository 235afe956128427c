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

import _thread
import atexit
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from fisher_lab.runs.status import Status

STATUS = {
    signal.SIGINT: Status.CANCELLED,
    signal.SIGTERM: Status.CANCELLED,
    signal.SIGUSR2: Status.PREEMPTED,
}
"""What a signal makes of the run: a cancelled run must not come back, a preempted one may."""


AGAIN_S = 0.05
"""Seconds after which a signal is raised again that something has swallowed."""


class Interrupted(BaseException):
    """A signal ended the run. No ``Exception``, so that no ``except Exception`` swallows it.

    Args:
        signum: the signal.
        swallowed: called once nothing refers to this exception any more: it has been dealt with,
            or something on its way has swallowed it.

    Attributes:
        signum: the signal.
        status: ``cancelled`` or ``preempted``.
    """

    def __init__(self, signum: int, swallowed: Callable[[], None] | None = None) -> None:
        self.signum = signal.Signals(signum)
        self.status = STATUS[self.signum]
        super().__init__(f"{self.status} by {self.signum.name}")
        if swallowed is not None:
            weakref.finalize(self, swallowed).atexit = False


def interruption(error: BaseException | None) -> Interrupted | None:
    """The interruption that an error is, or that it was raised on account of, if any.

    A library on the way may have put an error of its own in its place.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


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

    An exception that is raised while Python runs a ``__del__`` or the callback of a weak reference
    is printed and goes no further; others swallow what they should not. So it is raised
    again, until the context is left or :meth:`ending` is called.

    Attributes:
        received: the first signal that came, also where nothing was raised for it, or 0.
    """

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._before: dict[int, Any] = {}
        self._ending = False
        self._seen = False
        self.received = 0

    def __enter__(self) -> Watch:
        if not self._before and threading.current_thread() is threading.main_thread():
            for signum in STATUS:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._seen = True
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def ending(self) -> None:
        """From here on the run is being brought to its end: only SIGINT still breaks in."""
        self._ending = self._seen = True

    def check(self) -> None:
        """Where a signal came, and nobody has ended for it.

        Raises:
            Interrupted: it did, here or in a context inside this one.
        """
        if self.received and self._pending is None:
            raise Interrupted(self.received)

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
        self._note(signum)
        if self._pending is not None:
            self._pending.note(signum)
        elif signum == signal.SIGINT or not self._ending:
            # Schedulers repeat themselves; a second signal must not break into the ending of the
            # run. Whoever presses the interrupt key again means it.
            self._ending, self._seen = True, False
            raise Interrupted(signum, functools.partial(self._swallowed, signum))

    def _note(self, signum: int) -> None:
        """Keep the signal, for the contexts around this one too."""
        self.received = self.received or signum
        outer = getattr(self._before.get(signum), "__self__", None)
        if isinstance(outer, Watch):
            outer._note(signum)

    def _swallowed(self, signum: int) -> None:
        """Raise again, in a moment, unless somebody has seen the signal by then.

        In a thread of its own, and a plain one: this is called wherever an object happens to go.
        """
        if not self._seen:
            _thread.start_new_thread(self._raise_again, (signum,))

    def _raise_again(self, signum: int) -> None:
        time.sleep(AGAIN_S)
        if not self._seen:
            self._ending = False
            # Without effect where the handler is not Python's any more.
            _thread.interrupt_main(signal.Signals(signum))


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

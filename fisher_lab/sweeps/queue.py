"""The queue of a launch: which cell runs next, on whatever executor, and what stops the rest.

An executor runs the cells that the queue gives it: in this process (``serial``), in processes of
this machine (``local``), or as jobs of SLURM (``slurm``). Cells that another launcher runs are
looked at now and then; the queue takes those whose process has ended without a result.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from fisher_lab.runs import record
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import FrozenCell
from fisher_lab.sweeps.tally import Outcome, Tally, say
from fisher_lab.sweeps.worker_process import give_up

LOOK_EVERY_S = 0.5
"""Seconds between two looks for a request to cancel, and at cells that another launcher runs."""


class Executor(ABC):
    """Where cells run.

    Attributes:
        limit: how many cells run at once; None where all are handed over together.
        pause_s: seconds between two looks at what runs.
        outlives: whether the cells go on when the launcher is interrupted.
    """

    limit: int | None = 1
    pause_s = 0.02
    outlives = False

    @property
    @abstractmethod
    def running(self) -> list[FrozenCell]:
        """The cells that were started and whose end was not yet reported."""

    @abstractmethod
    def start(self, cells: Sequence[FrozenCell]) -> None:
        """Run cells: one, or all where there is no limit."""

    @abstractmethod
    def ended(self) -> list[tuple[FrozenCell, Outcome]]:
        """The cells that have ended since the last call, and how."""

    @abstractmethod
    def stop(self, cells: Sequence[FrozenCell]) -> None:
        """Ask running cells to save their state and to end."""

    def withdraw(self) -> None:  # noqa: B027 (most executors begin what they are given at once)
        """Cells that were handed over and have not begun are not to begin."""

    @contextlib.contextmanager
    def signals(self, watch: Watch) -> Iterator[Pending]:
        """How signals to the launcher are noticed while the executor works."""
        with watch.deferred() as pending:
            yield pending


class Queue:
    """What has yet to run, what runs, and what another launcher runs.

    Args:
        cells: in the order in which they are to be started.
        executor: runs them.
        tally: learns how each has ended.
    """

    def __init__(self, cells: Sequence[FrozenCell], executor: Executor, tally: Tally) -> None:
        self._waiting = deque(cells)
        self._held: list[FrozenCell] = []
        self._executor = executor
        self._tally = tally
        self._preemptions: Counter[FrozenCell] = Counter()
        self._looked = time.monotonic()

    def run(self) -> None:
        """Work until every cell has ended.

        Raises:
            Interrupted: a signal. Cells that run have saved their state and ended, or go on where
                the executor outlives the launcher; the others are left as they are.
        """
        with Watch() as watch, self._executor.signals(watch) as pending:
            while self._waiting or self._held or self._executor.running:
                if not self.step():
                    time.sleep(self._executor.pause_s)
                if pending():
                    self._interrupt()
                    pending.stop()

    def step(self) -> bool:
        """Note what has ended, and start what there is room for; whether anything happened."""
        ended = self._executor.ended()
        for cell, outcome in ended:
            self._note(cell, outcome)
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._look()
        if self._tally.exhausted:
            self._drop()
            self._executor.withdraw()
        started = False
        while batch := self._next():
            self._executor.start(batch)
            started = True
        return started or bool(ended)

    def _next(self) -> list[FrozenCell]:
        """Take what is to be started now out of the queue."""
        if self._executor.limit is None:
            batch = list(self._waiting)
            self._waiting.clear()
            return batch
        while self._waiting and self._has_room(self._waiting[0]):
            cell = self._waiting.popleft()
            if cell.cancelled:
                self._tally.end(cell, Outcome(Status.NOT_STARTED))
            elif cell.layout.lock(cell.run_id, cell.stale_after_s).holder() is not None:
                self._held.append(cell)
            else:
                return [cell]
        return []

    def _has_room(self, cell: FrozenCell) -> bool:
        running = self._executor.running
        if cell.alone or any(other.alone for other in running):
            return not running
        return len(running) < (self._executor.limit or 1)

    def _note(self, cell: FrozenCell, outcome: Outcome) -> None:
        if outcome.status is Status.HELD:
            self._held.append(cell)
            return
        if outcome.status is Status.PREEMPTED:
            self._preemptions[cell] += 1
            allowed = cell.sweep["max_requeues"]
            if self._preemptions[cell] <= allowed:
                self._waiting.append(cell)
                return
            message = f"preempted more often than sweep.max_requeues={allowed}"
            give_up(cell, "max_requeues", message)
            outcome = Outcome(Status.FAILED, message, outcome.seconds)
        self._tally.end(cell, outcome)
        if outcome.status is Status.FAILED and cell.sweep["fail_fast"]:
            self._drop()
            self._executor.stop(self._executor.running)

    def _look(self) -> None:
        """Stop what the user has cancelled; see what has become of cells of another launcher."""
        self._looked = time.monotonic()
        if not self._executor.outlives:  # else the command that cancels asks them
            self._executor.stop([cell for cell in self._executor.running if cell.cancelled])
        held, self._held = self._held, []
        for cell in held:
            state = cell.layout.state(cell.run_id, cell.stale_after_s)
            if state is Status.RUNNING:
                self._held.append(cell)
            elif state.is_final or (state.has_ended and cell.cancelled):
                message = record.brief(cell.directory) if state is Status.FAILED else None
                self._tally.end(cell, Outcome(state, message))
            else:  # its process died, or its own launch was cancelled, and not this one
                self._waiting.append(cell)

    def _drop(self) -> None:
        """The cells that wait are not started."""
        while self._waiting:
            self._tally.end(self._waiting.popleft(), Outcome(Status.NOT_STARTED))

    def _interrupt(self) -> None:
        """End what ends with the launcher, and wait until it has."""
        if self._executor.outlives:
            say("the jobs go on; run the same command again to wait for them")
            return
        self._executor.stop(self._executor.running)
        while self._executor.running:
            for cell, outcome in self._executor.ended():
                self._tally.end(cell, outcome)
            time.sleep(self._executor.pause_s)

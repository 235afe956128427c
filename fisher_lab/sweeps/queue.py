"""The queue of a launch: which cell runs next, on whatever executor, and what stops the rest.

An executor runs the cells that the queue gives it: in this process or in others of this machine
(``local``), or as jobs of SLURM (``slurm``). Cells that another launcher runs are waited for.
"""

from __future__ import annotations

import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from fisher_lab.runs import record
from fisher_lab.runs.signals import Pending, Watch
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell, Outcome
from fisher_lab.sweeps.pairs import Pairs
from fisher_lab.sweeps.progress import CellsBar, claimed_values, time_left

LOOK_EVERY_S = 0.5
"""Seconds between two looks for a request to cancel, and at cells that another launcher runs."""


class Executor(ABC):
    """Where cells run.

    Attributes:
        limit: how many cells run at once; None where all are handed over together, and go on when
            the launcher is interrupted.
        pause_s: seconds between two looks at what runs.
        has_bar: whether a bar is shown while cells run; cells of this process have their own.
    """

    limit: int | None = 1
    pause_s = 0.02
    has_bar = True

    @property
    @abstractmethod
    def running(self) -> list[Cell]:
        """The cells that were started and whose end was not yet reported."""

    @abstractmethod
    def start(self, cells: Sequence[Cell]) -> None:
        """Run cells: one, or all where there is no limit."""

    @abstractmethod
    def ended(self) -> list[tuple[Cell, Outcome]]:
        """The cells that have ended since the last call, and how."""

    @abstractmethod
    def stop(self, cells: Sequence[Cell]) -> None:
        """Ask running cells to save their state and to end."""

    def abandon(self) -> None:  # noqa: B027 (jobs of a scheduler go on)
        """End what runs, with nothing written down."""

    def withdraw(self) -> None:  # noqa: B027 (most executors begin what they are given at once)
        """Cells that were handed over and have not begun are not to begin."""

    def signals(self, watch: Watch) -> AbstractContextManager[Pending]:
        """How signals to the launcher are noticed while the executor works."""
        return watch.deferred()


@dataclass
class Tally:
    """How the cells of a launch have ended; one line on the screen for each.

    Attributes:
        total: how many there are.
        max_failures: no further cell is to be started after this many failures.
        ended: run directory -> outcome.
        began: when the launch began, by :func:`time.monotonic`.
        before: how many had ended before.
    """

    total: int
    max_failures: int | None = None
    ended: dict[Path, Outcome] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    before: int = field(init=False)

    def __post_init__(self) -> None:
        self.before = len(self.ended)

    @property
    def failures(self) -> int:
        """How many have failed."""
        return sum(outcome.status is Status.FAILED for outcome in self.ended.values())

    @property
    def exhausted(self) -> bool:
        """Whether no further cell is to be started."""
        return self.max_failures is not None and self.failures >= self.max_failures

    def end(self, cell: Cell, outcome: Outcome) -> None:
        """Note how a cell ended, and say so."""
        self.ended[cell.directory] = outcome
        took = "" if outcome.seconds is None else f" in {outcome.seconds:.1f} s"
        why = f": {outcome.message}" if outcome.message else claimed_values(cell)
        left = time_left(self.began, len(self.ended) - self.before, self.total - self.before)
        say(f"[{len(self.ended)}/{self.total}] {outcome.status}{took}{left}  {cell.label}{why}")

    def report(self, cells: Sequence[Cell]) -> int:
        """Print the end of a launch: every failure with its overrides and log; the exit code.

        Args:
            cells: all of the multirun, those that were done before among them.
        """
        done = Outcome(Status.COMPLETED)
        outcomes = [(cell, self.ended.get(cell.directory, done)) for cell in cells]
        completed = sum(outcome.status is Status.COMPLETED for _, outcome in outcomes)
        missing = sum(not outcome.status.is_final for _, outcome in outcomes)
        say(f"{completed} of {len(cells)} cells completed")
        for cell, outcome in outcomes:
            if outcome.status is Status.FAILED:
                why = outcome.message or record.brief(cell.directory)
                line = shlex.join(cell.overrides)  # which give this cell, and no other
                logs = cell.layout.logs(cell.run_id)
                where = f"the log is {logs[0]}" if logs else f"its directory is {cell.directory}"
                say(f"fisher_lab: {line}: failed: {why}; {where}", error=True)
        if missing:
            text = f"{missing} cells did not come to an end; run the same command again to go on"
            say(f"fisher_lab: {text}", error=True)
        return 0 if completed == len(cells) else 1


def say(text: str, *, error: bool = False) -> None:
    """Print a line."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


class Queue:
    """What has yet to run, and what runs.

    Args:
        cells: in the order in which they are to be started.
        executor: runs them.
        tally: learns how each has ended.
        wanted: asked whenever a cell has ended for all that are to be run, in their order, those
            that run among them; None where these are the cells that are given.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        executor: Executor,
        tally: Tally,
        wanted: Callable[[], list[Cell]] | None = None,
    ) -> None:
        self._waiting = deque(cells)
        self._pairs = Pairs(cells)
        self._wanted = wanted
        self._asked_at = -1
        self._executor = executor
        self._tally = tally
        self._preemptions: Counter[Cell] = Counter()
        self._looked = time.monotonic()
        self._wait_until = 0.0

    def run(self) -> None:
        """Work until every cell has ended.

        Raises:
            Interrupted: a signal. Cells that run have saved their state and ended, or go on where
                they outlive the launcher; the others are left as they are.
            OSError: the files of the sweep cannot be written. What ran has been ended.
        """
        bar = CellsBar(self._tally.total) if self._executor.has_bar else None
        with Watch() as watch, self._executor.signals(watch) as pending, bar or nullcontext():
            try:
                while self._ask() or self._waiting or self._executor.running:
                    moved = self.step()
                    if bar is not None:
                        bar.show(len(self._tally.ended), self._executor.running)
                    if not moved:
                        time.sleep(self._executor.pause_s)
                    if pending():
                        self._interrupt()
                        pending.stop()
                    watch.check()  # a cell may have come to its end all the same
            except OSError:  # the disk is full, say: nothing more can be written down
                self._executor.abandon()
                raise

    def step(self) -> bool:
        """Note what has ended, and start what there is room for; whether anything happened."""
        ended = self._executor.ended()
        for cell, outcome in ended:
            self._note(cell, outcome)
        if time.monotonic() - self._looked >= LOOK_EVERY_S and self._executor.limit is not None:
            self._looked = time.monotonic()  # jobs that outlive it are asked by `cancel` itself
            self._executor.stop([cell for cell in self._executor.running if cell.cancelled])
        if self._tally.exhausted:
            self._drop()
            self._executor.withdraw()
        started = False
        while batch := self._next():
            self._executor.start(batch)
            started = True
        return started or bool(ended)

    def _ask(self) -> bool:
        """Ask what is wanted now, where a cell has ended since; whether anything is to be started.

        A cell that has ended in this launch is not started again, whatever came of it.
        """
        ended = len(self._tally.ended)
        if self._wanted is None or ended == self._asked_at:
            return bool(self._waiting)
        self._asked_at = ended
        taken = {*self._tally.ended, *(cell.directory for cell in self._executor.running)}
        self._waiting = deque(c for c in self._wanted() if c.directory not in taken)
        self._tally.total = len(taken) + len(self._waiting)
        return bool(self._waiting)

    def _next(self) -> list[Cell]:
        """Take what is to be started now out of the queue; what another launcher runs stays."""
        if self._executor.limit is None:
            batch = list(self._waiting)
            self._waiting.clear()
            return batch
        for _ in range(len(self._waiting)):
            if time.monotonic() < self._wait_until or not self._has_room(self._waiting[0]):
                return []
            cell = self._waiting.popleft()
            state = cell.state
            if state is Status.COMPLETED:
                self._tally.end(cell, Outcome(state))
            elif cell.cancelled:
                self._tally.end(cell, Outcome(Status.NOT_STARTED))
            elif state is Status.RUNNING:
                self._waiting.append(cell)
            else:
                return [cell]
        self._wait_until = time.monotonic() + LOOK_EVERY_S
        return []

    def _has_room(self, cell: Cell) -> bool:
        running = self._executor.running
        if cell.alone or any(other.alone for other in running):
            return not running
        return len(running) < (self._executor.limit or 1)

    def _note(self, cell: Cell, outcome: Outcome) -> None:
        if outcome.status is Status.HELD:
            self._waiting.append(cell)
            return
        if outcome.status is Status.PREEMPTED:
            self._preemptions[cell] += 1
            allowed = cell.config.sweep.max_requeues
            if self._preemptions[cell] <= allowed:
                self._waiting.append(cell)
                return
            message = f"preempted more often than sweep.max_requeues={allowed}"
            outcome = cell.give_up("max_requeues", message)
        if outcome.status is Status.FAILED and (failed := cell.again).is_due:
            say(f"failed ({failed.said}), runs again: {cell.label}: {outcome.message or ''}")
            self._waiting.append(cell)
            return
        self._tally.end(cell, outcome)
        again, why = self._pairs.ended(cell)
        if again:
            say(why)
            self._waiting.extendleft(reversed(again))
        if outcome.status is Status.FAILED and cell.config.sweep.fail_fast:
            self._drop()
            self._executor.stop(self._executor.running)

    def _drop(self) -> None:
        """The cells that wait are not started, and no others are asked for."""
        self._wanted = None
        while self._waiting:
            self._tally.end(self._waiting.popleft(), Outcome(Status.NOT_STARTED))

    def _interrupt(self) -> None:
        """End what ends with the launcher, and wait until it has."""
        if self._executor.limit is None:
            say("the jobs go on; run the same command again to wait for them")
            return
        self._executor.stop(self._executor.running)
        while self._executor.running:
            for cell, outcome in self._executor.ended():
                self._tally.end(cell, outcome)
            time.sleep(self._executor.pause_s)

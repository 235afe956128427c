"""``fisher-lab work SWEEP``: takes the cells of a sweep, one after the other, until none is left.

A worker needs the directory of the sweep and nothing else: no launcher, no scheduler, no other
worker that it knows of. Cells are shared out by their locks, and the journal says which are left.
Each cell runs in a child that is forked from the worker (`sweeps/forked.py`), watched as with
``hydra/launcher=local`` (`sweeps/worker_process.py`): what ends a cell does not end the worker.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM, SIGUSR2
from typing import Any, NoReturn

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs import atomic, environment, provenance, record, screen
from fisher_lab.runs.signals import Interrupted, Pending, Watch, leave
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import forked, worker
from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.directory import SWEEP_FILE, Layout
from fisher_lab.sweeps.forked import Forked
from fisher_lab.sweeps.queue import LOOK_EVERY_S, say
from fisher_lab.sweeps.remaining import Remaining
from fisher_lab.sweeps.worker_process import THREADS, WorkerProcess
from fisher_lab.tasks import runner

WORK = ("-m", "fisher_lab.sweeps.work")
"""What Python is given to run a worker of sweeps."""

OK, FAILED, LEFT = 0, 1, worker.PREEMPTED
"""Exit codes: all that it ran completed; something failed; its time was over before the cells."""

FLUSH_S = 1.0
"""Seconds after which what has happened here is in the journal."""
RESUMABLE = ("train",)
"""Tasks that go on where they were; any other that had all of a time limit would reach it again."""
_UNTIL, _CODE = "FISHER_LAB_WORK_UNTIL", "FISHER_LAB_WORK_CODE"
"""For a worker that starts again as another version of the code."""
_TICK_S = 0.05
_ORPHANS = 3
"""Cells that run elsewhere of which a worker looks at each poll whether their worker has died."""


_OPTIONS: tuple[tuple[str, float | None, str], ...] = (
    ("threads", None, "of a cell; default: OMP_NUM_THREADS, else all processors"),
    ("minutes", None, "it ends before they are over; default: those of its job of SLURM, if any"),
    ("notice", 90.0, "seconds before its end at which a cell is told to save"),
    ("grace", 20.0, "seconds that a cell has for saving"),
    ("poll", 2.0, "seconds between two looks at cells that others run"),
)
"""Options of the command, all above 0: name, default, meaning."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker has.

    Attributes:
        seconds: from its start until it has to have ended; None for as long as it takes.
        notice_s: how long before that a cell is told to save.
        threads: of a cell's numerical libraries; None leaves the environment as it is.
        grace_s: seconds between asking a cell to save and end, and killing it.
        poll_s: between two looks at cells that others run.
    """

    seconds: float | None = None
    notice_s: float = 90.0
    threads: int | None = None
    grace_s: float = 20.0
    poll_s: float = 2.0


@dataclass
class Worker:
    """Takes cells of sweeps until none is left, its time is over, or it is asked to end.

    Attributes:
        layouts: of the sweeps.
        limits: of this worker.
        start: starts the child of a cell.
        counted: how the cells have ended that it took.
    """

    layouts: Sequence[Layout]
    limits: Limits = field(default_factory=Limits)
    start: Callable[[Cell, Path, Mapping[str, str]], Forked] = Forked
    counted: Counter[Status] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._sweeps = [Remaining(layout) for layout in self.layouts]
        self._began = time.monotonic()
        self._longest = 0.0
        self._waiting: dict[tuple[Path, str], Cell] = {}
        self._doubtful: dict[tuple[Path, str], float] = {}
        self._events: list[tuple[Layout, dict[str, Any]]] = []
        self._flushed = self._looked = self._read = self._asked = -1e9
        self._code = provenance.code()["code"]

    def run(self) -> int:
        """Work; returns the exit code.

        Raises:
            Interrupted: a signal. The cell that ran has saved its state, and is handed back.
        """
        with Watch() as watch, watch.deferred() as pending:
            try:
                while not pending():
                    if self._time_left() <= self._longest:
                        return LEFT
                    self._read_on()
                    found = self._next()
                    if found is not None:
                        self._run(*found, pending)
                    elif self._is_done():
                        break
                    else:
                        self._pause(pending)
            finally:
                self._flush()
        return FAILED if self.counted[Status.FAILED] else OK

    # ---- which cell ------------------------------------------------------------------------------

    def _read_on(self, every: float = FLUSH_S) -> None:
        if time.monotonic() - self._read >= every:
            self._read = time.monotonic()
            for sweep in self._sweeps:
                sweep.read()

    def _next(self) -> tuple[Remaining, Cell] | None:
        """A cell that nobody runs or has run, if there is one."""
        for sweep in self._sweeps:
            for run_id in itertools.chain(self._orphans(sweep), sweep.in_turn()):
                cell = self._take(sweep, run_id)
                if cell is not None:
                    return sweep, cell
        return None

    def _orphans(self, sweep: Remaining) -> list[str]:
        """Now and then, cells whose worker may have died: first those, as nobody waits for them.

        Every worker looks at a few, so that together they look at each.
        """
        if time.monotonic() - self._asked < self.limits.poll_s:
            return []
        self._asked = time.monotonic()
        return sweep.some_running(_ORPHANS)

    def _take(self, sweep: Remaining, run_id: str) -> Cell | None:
        key = (sweep.layout.directory, run_id)
        if record.status_of(sweep.layout.run_directory(run_id)) is Status.COMPLETED:
            sweep.close(run_id, Status.COMPLETED)
            return None
        file = sweep.file(run_id)
        cell = self._waiting.get(key)
        if cell is None or cell.path != file:
            cell = self._waiting[key] = Cell.load(file)
        state = cell.state
        if state is Status.COMPLETED or cell.cancelled or self._cannot_run(cell):
            sweep.close(run_id, state)
            return None
        if state is Status.RUNNING:
            return None
        if state is Status.FAILED:
            # From before its launch, or just now: then the journal is about to say so.
            since = self._doubtful.setdefault(key, time.monotonic())
            if time.monotonic() - since < 2 * FLUSH_S:
                return None
        if self._is_given_up(sweep, cell, state):
            return None
        del self._waiting[key]
        return cell

    def _is_given_up(self, sweep: Remaining, cell: Cell, state: Status) -> bool:
        """Whether a cell comes back too often, with its worker alive or dead."""
        allowed = cell.config.sweep.max_requeues
        kind = "preempted" if state is not Status.INTERRUPTED else "started"
        count = sweep.begun[cell.run_id, kind] - (kind == "started")
        if count <= allowed:
            return False
        words = "was preempted" if kind == "preempted" else "ended with its worker"
        message = f"{words} more often than sweep.max_requeues={allowed}"
        sweep.close(cell.run_id, cell.give_up("max_requeues", message).status)
        return True

    def _cannot_run(self, cell: Cell) -> bool:
        """Whether a cell is none for workers, with a line about it."""
        why = None
        if cell.config.distributed.nodes > 1:
            why = f"it wants {cell.config.distributed.nodes} nodes"
        elif cell.alone:
            why = "its times are compared, so that no other cell may run beside it"
        elif cell.code_root is not None and cell.code != self._code:
            module = cell.code_root / "fisher_lab" / "sweeps" / "work.py"
            if module.is_file() and os.environ.get(_CODE) != cell.code:
                self._become(cell)
            why = f"it was submitted with the code {cell.code}, which has no workers"
        if why is not None:
            say(f"fisher_lab: {cell.label}: not for a worker: {why}", error=True)
        return why is not None

    def _become(self, cell: Cell) -> NoReturn:
        """Start this process again as a worker of the code that a cell was submitted with."""
        self._flush()
        variables = {_CODE: cell.code}
        if self.limits.seconds is not None:
            variables[_UNTIL] = str(self._began + self.limits.seconds)
        own = environment.child(variables, root=cell.code_root, in_job=True)
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], own)

    def _is_done(self) -> bool:
        """Whether no cell is left, and none will come."""
        self._flush()
        self._read_on(every=0.0)
        if any(sweep.open for sweep in self._sweeps):
            return False
        for sweep in self._sweeps:  # of a worker that was killed before it could say so
            for run_id in sweep.unsaid():
                lock = sweep.layout.lock(run_id)
                if lock.acquire():
                    with lock:
                        sweep.layout.note(run_id, Status.COMPLETED)
        return not any(_may_grow(sweep.layout) for sweep in self._sweeps)

    def _pause(self, pending: Pending) -> None:
        """Until the next look at what others run."""
        until = time.monotonic() + min(self.limits.poll_s, max(0.0, self._time_left()))
        while not pending() and time.monotonic() < until:
            time.sleep(min(_TICK_S, self.limits.poll_s))

    def _time_left(self) -> float:
        """Seconds until a cell has to be told to save."""
        if self.limits.seconds is None:
            return float("inf")
        end = self._began + self.limits.seconds - self.limits.notice_s
        return end - time.monotonic()

    # ---- one cell --------------------------------------------------------------------------------

    def _run(self, sweep: Remaining, cell: Cell, pending: Pending) -> None:
        """Run a cell to its end, however that comes about."""
        children: list[Forked] = []

        def start(log: Path, variables: Mapping[str, str]) -> Forked:
            children.append(self.start(cell, log, variables))
            return children[0]

        limits = self.limits
        if not self.counted:  # the children inherit it
            runner.warm()
            gc.freeze()
        process = WorkerProcess(
            cell, threads=limits.threads, grace_s=limits.grace_s, scheduled=True,
            start=start if forked.possible() else None,
        )  # fmt: skip
        child = children[0] if children else None
        while True:
            # What it has said comes into the journal before anything that follows from its end.
            process.enforce_limits()
            if self._hear(cell, child) and (outcome := process.poll()) is not None:
                break
            if pending():
                process.ask(SIGUSR2 if pending() == SIGUSR2 else SIGTERM)
            elif self._time_left() <= 0:
                process.ask(SIGUSR2)
            elif self._is_cancelled(cell):
                process.ask(SIGTERM)
        if child is not None:
            child.warm()
        self._longest = max(self._longest, process.seconds)
        if outcome.status is Status.PREEMPTED and self._had_all_the_time(cell, process.seconds):
            outcome = cell.give_up(
                "timeout", f"reached the worker's time limit ({limits.seconds:g} s)"
            )
        if outcome.status is Status.HELD:
            return
        if outcome.status is Status.COMPLETED:
            sweep.close(cell.run_id, outcome.status)
        else:
            sweep.read()
        again = outcome.status is Status.FAILED and cell.run_id in sweep.open
        self.counted[outcome.status] += not again
        words = f"{outcome.status}, runs again," if again else outcome.status
        why = f": {outcome.message}" if outcome.message else ""
        say(f"{words} in {process.seconds:.1f} s  {cell.label}{why}")

    def _hear(self, cell: Cell, child: Forked | None) -> bool:
        """Wait a moment; what the child says goes to the journal. Whether it may have ended."""
        if child is None:
            time.sleep(_TICK_S)
            return True
        ended = child.has_ended(LOOK_EVERY_S)
        self._events += [(cell.layout, event) for event in child.events]
        child.events = []
        completed = self._events and self._events[-1][1]["event"] == Status.COMPLETED
        if time.monotonic() - self._flushed >= FLUSH_S or (ended and not completed):
            self._flush()
        return ended

    def _is_cancelled(self, cell: Cell) -> bool:
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return False
        self._looked = time.monotonic()
        return cell.cancelled

    def _had_all_the_time(self, cell: Cell, seconds: float) -> bool:
        """Whether a cell would reach the time limit again."""
        if self.limits.seconds is None or cell.config.task.name in RESUMABLE:
            return False
        return self._time_left() <= 0 and seconds > 0.9 * (
            self.limits.seconds - self.limits.notice_s
        )

    def _flush(self) -> None:
        """Write into the journals what has happened here."""
        self._flushed = time.monotonic()
        for sweep in self._sweeps:
            own = [event for layout, event in self._events if layout == sweep.layout]
            if own:
                sweep.layout.journal.append_all(lambda: _unsaid(sweep, own))  # noqa: B023
        self._events = []


def _unsaid(sweep: Remaining, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is not in the journal yet: somebody may have found a cell completed and said so."""
    sweep.read()
    return [event for event in events if not sweep.has_ended(event)]


def _may_grow(layout: Layout) -> bool:
    """Whether cells may come to a sweep of which none is left: its claims may want more."""
    return atomic.read_json(layout.sweep_file).get("until") is not None and layout.has_launcher()


def work_command(arguments: Sequence[str]) -> int:
    """Run ``fisher-lab work``; returns the exit code.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
        Interrupted: a signal.
    """
    chosen = _parsed(arguments)
    threads = None if chosen.threads is None else int(chosen.threads)
    limits = Limits(
        seconds=_seconds(chosen.minutes), notice_s=chosen.notice, threads=threads,
        grace_s=chosen.grace, poll_s=chosen.poll,
    )  # fmt: skip
    if threads is not None:  # before a numerical library is imported
        os.environ.update(dict.fromkeys(THREADS, str(threads)))
    one = Worker([layout_of(name) for name in chosen.sweeps], limits)
    try:
        code = one.run()
    finally:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(one.counted.items()))
        say(f"worker: {counts or 'there was nothing to do'}")
    for layout in one.layouts if one.counted else ():
        layout.finish_if_last()
    return code


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        "fisher-lab work", description="Take cells of sweeps until none is left."
    )

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {parser.prog} --help shows what is allowed")

    parser.error = fail
    sweeps = "a sweep's directory, or its name under results/"
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help=sweeps)
    for name, default, words in _OPTIONS:
        parser.add_argument(f"--{name}", type=_above_zero, default=default, help=words)
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None and not chosen.threads.is_integer():
        fail(f"argument --threads: {chosen.threads:g} is no whole number")
    return chosen


def layout_of(name: str) -> Layout:
    """The sweep of a directory, or of a name under ``results/``.

    Raises:
        ConfigError: there is none.
    """
    for directory in (Path(name), Path("results") / name):
        if (directory / SWEEP_FILE).is_file():
            return Layout(directory.resolve())
    raise ConfigError(
        f"{name} is no sweep: give the directory of one (with a {SWEEP_FILE}) or its name "
        "under results/"
    )


def _seconds(minutes: float | None) -> float | None:
    """How long this worker has, as was said, or as its job of SLURM has."""
    if (until := os.environ.get(_UNTIL)) is not None:
        return float(until) - time.monotonic()
    if minutes is not None:
        return 60.0 * minutes
    if "SLURM_JOB_ID" not in os.environ:
        return None
    from fisher_lab.sweeps import slurm

    return slurm.limit_of_this_job("%L")


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def main(arguments: Sequence[str]) -> int:
    """:func:`work_command` for a launcher; returns the exit code."""
    try:
        return work_command(arguments)
    except ConfigError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        return 128 + stop.signum


if __name__ == "__main__":
    screen.install()
    leave(main(sys.argv[1:]))

"""What a launcher says while a sweep runs, and what it has come to at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fisher_lab.runs import record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell, FrozenCell
from fisher_lab.sweeps.directory import JOB_LOG, RUN_LOG


@dataclass(frozen=True)
class Outcome:
    """How a cell has ended for its launcher.

    Attributes:
        status: of its record, or ``held`` where another launcher runs it, or ``not started``.
        message: why it failed, in one line.
        seconds: that it took, where that is known.
    """

    status: Status
    message: str | None = None
    seconds: float | None = None


@dataclass
class Tally:
    """How the cells of a launch have ended; one line on the screen for each.

    Attributes:
        total: how many there are.
        max_failures: no further cell is to be started after this many failures.
        ended: run directory -> outcome.
    """

    total: int
    max_failures: int | None = None
    ended: dict[Path, Outcome] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        """How many have failed."""
        return sum(outcome.status is Status.FAILED for outcome in self.ended.values())

    @property
    def exhausted(self) -> bool:
        """Whether no further cell is to be started."""
        return self.max_failures is not None and self.failures >= self.max_failures

    def end(self, cell: FrozenCell, outcome: Outcome) -> None:
        """Note how a cell ended, and say so."""
        self.ended[cell.directory] = outcome
        took = "" if outcome.seconds is None else f" in {outcome.seconds:.1f} s"
        why = f": {outcome.message}" if outcome.message else ""
        say(f"[{len(self.ended)}/{self.total}] {outcome.status}{took}  {cell.label}{why}")


def say(text: str, *, error: bool = False) -> None:
    """Print a line; a terminal that has gone is no reason to stop."""
    try:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
    except OSError:
        return


def report(cells: Sequence[Cell] | Sequence[FrozenCell], tally: Tally) -> int:
    """The end of a launch: how many are done, and every failure with its overrides and log.

    Args:
        cells: all of the multirun, those that were done before among them.
        tally: how those of this launch ended.

    Returns:
        The exit code.
    """
    done = Outcome(Status.COMPLETED)
    outcomes = [(cell, tally.ended.get(cell.directory, done)) for cell in cells]
    states = [outcome.status for _, outcome in outcomes]
    completed = states.count(Status.COMPLETED)
    missing = sum(not status.is_final for status in states)
    say(f"{completed} of {len(cells)} cells completed")
    for cell, outcome in outcomes:
        if outcome.status is Status.FAILED:
            why = outcome.message or record.brief(cell.directory)
            say(f"fisher_lab: {cell.line}: failed: {why}; {_log(cell.directory)}", error=True)
    if missing:
        say(
            f"fisher_lab: {missing} cells did not come to an end; run the same command again "
            "to go on",
            error=True,
        )
    return 0 if completed == len(cells) else 1


def _log(directory: Path) -> str:
    for name in (RUN_LOG, JOB_LOG):
        if (directory / name).is_file():
            return f"the log is {directory / name}"
    return f"its directory is {directory}"

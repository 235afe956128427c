"""What a launcher says while a sweep runs, and what it has come to at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.worker_process import brief

INTERRUPTED = ("cancelled", "preempted", "interrupted")


@dataclass
class Tally:
    """How the cells of a launch have ended; one line on the screen for each.

    Attributes:
        total: how many there are.
        max_failures: no further cell is to be started after this many failures.
        ended: identity -> status and message.
        quiet: print nothing.
    """

    total: int
    max_failures: int | None = None
    ended: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    quiet: bool = False

    @property
    def failures(self) -> int:
        """How many have failed."""
        return sum(status == "failed" for status, _ in self.ended.values())

    @property
    def exhausted(self) -> bool:
        """Whether no further cell is to be started."""
        return self.max_failures is not None and self.failures >= self.max_failures

    def end(self, cell: Cell, status: str, message: str | None, seconds: float | None) -> None:
        """Note how a cell ended, and say so."""
        self.ended[_key(cell)] = (status, message)
        took = "" if seconds is None else f" in {seconds:.1f} s"
        why = f": {message}" if message else ""
        say(f"[{len(self.ended)}/{self.total}] {status}{took}  {cell.label}{why}", quiet=self.quiet)

    def status(self, cell: Cell) -> str | None:
        """How a cell ended, or None."""
        found = self.ended.get(_key(cell))
        return None if found is None else found[0]


def _key(cell: Cell) -> str:
    return str(cell.layout.run_directory(cell.run_id))


def say(text: str, *, quiet: bool = False, error: bool = False) -> None:
    """Print a line; a terminal that has gone is no reason to stop."""
    if quiet:
        return
    try:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
    except OSError:
        return


def report(cells: Sequence[Cell], tally: Tally) -> int:
    """The end of a launch: how many are done, and every failure with its overrides and log.

    Args:
        cells: all of the multirun, those that were done before among them.
        tally: how those of this launch ended.

    Returns:
        The exit code.
    """
    completed, missing = 0, 0
    failed: list[Cell] = []
    for cell in cells:
        status = tally.status(cell) or "completed"
        completed += status == "completed"
        missing += status in INTERRUPTED or status == "not started"
        if status == "failed":
            failed.append(cell)
    say(f"{completed} of {len(cells)} cells completed")
    for cell in failed:
        directory = cell.layout.run_directory(cell.run_id)
        say(f"fisher_lab: {cell.line}: failed: {_why(cell, tally)}; {_log(directory)}", error=True)
    if missing:
        say(
            f"fisher_lab: {missing} cells did not come to an end; run the same command again "
            "to go on",
            error=True,
        )
    return 1 if failed or missing else 0


def _why(cell: Cell, tally: Tally) -> str:
    message = tally.ended[_key(cell)][1]
    return message or brief(cell.layout.run_directory(cell.run_id))


def _log(directory: Path) -> str:
    for name in ("fisher_lab.log", "job.log"):
        if (directory / name).is_file():
            return f"the log is {directory / name}"
    return f"its directory is {directory}"

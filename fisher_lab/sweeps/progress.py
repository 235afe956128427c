"""How far a sweep is: the bar with the running cells, and the line of a cell that has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fisher_lab.results import labels
from fisher_lab.runs import atomic
from fisher_lab.runs.record import METRICS_FILE
from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.status_table import claimed

MOST_NAMED = 2
"""Running cells that the bar names; the others are counted."""


def claimed_values(cell: Cell) -> str:
    """What a cell has measured of the metrics that the sweep's claims are about."""
    found = atomic.read_json(cell.directory / METRICS_FILE)
    names = claimed(atomic.read_json(cell.layout.sweep_file))
    shown = [(labels.metric(name), found[name]) for name in names if found.get(name) is not None]
    return "".join(f"; {entry.short} {entry.text(value)}" for entry, value in shown)


def time_left(began: float, done: int, total: int) -> str:
    """How long the rest of the cells may take, by those that have ended; empty if none is left.

    Args:
        began: when the launch began, by :func:`time.monotonic`.
        done: cells that have ended since.
        total: cells of the launch.
    """
    if not 0 < done < total:
        return ""
    seconds = (time.monotonic() - began) / done * (total - done)
    minutes, hours = seconds / 60, seconds / 3600
    words = f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
    return f", about {words if hours < 2 else f'{hours:.1f} h'} left"


class CellsBar:
    """A bar on standard error, where that is a terminal: cells that ended, time left, what runs.

    Args:
        total: cells of the launch.
        console: for tests; by default standard error.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._bar = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console, transient=True, disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> CellsBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._bar.stop()

    def show(self, done: int, running: Sequence[Cell]) -> None:
        """Say how many cells have ended, and which run."""
        named = ", ".join(cell.label for cell in running[:MOST_NAMED])
        more = f" and {len(running) - MOST_NAMED} more" if len(running) > MOST_NAMED else ""
        words = f"running: {named}{more}" if named else "waiting"
        self._bar.update(self._task, completed=done, description=words)

"""``hydra/launcher=workers``: the cells are left to workers.

The launcher freezes the cells, waits for whoever takes them (`sweeps/work.py`), and writes the
table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_lab.runs import record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Outcome
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.queue import Executor, say

if TYPE_CHECKING:
    from fisher_lab.config.launchers import SlurmSettings, WorkersSettings

LOOK_AT_ALL_S = 30.0
"""Seconds between two looks at every cell: a worker that was killed has not said how one ended."""


class Workers(Executor):
    """Waits for cells that workers take, by the journal.

    Args:
        settings: of the launcher.
    """

    limit = None
    pause_s = 0.2

    def __init__(self, settings: WorkersSettings | SlurmSettings) -> None:
        self._poll_s = settings.poll_s
        self._cells: dict[tuple[Path, str], Cell] = {}
        self._offsets: dict[Layout, int] = {}
        self._looked = 0.0
        self._looked_at_all = -LOOK_AT_ALL_S  # a cell may have ended before the first look

    @property
    def running(self) -> list[Cell]:
        """The cells that have not ended."""
        return list(self._cells.values())

    def start(self, cells: Sequence[Cell]) -> None:
        """Leave cells to workers."""
        for layout in dict.fromkeys(cell.layout for cell in cells):
            if layout not in self._offsets:
                self._offsets[layout] = layout.journal.read_on(0)[1]
        self._cells |= {key_of(cell): cell for cell in cells}
        self._announce(cells)

    def _announce(self, cells: Sequence[Cell]) -> None:
        names = " ".join(str(layout.directory) for layout in self._offsets)
        say(f"{len(cells)} cells are left to workers: fisher-lab work {names}")

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Ask the journal, at most every ``poll_s``; the cells that have ended."""
        if time.monotonic() - self._looked < self._poll_s:
            return []
        self._looked = time.monotonic()
        found = []
        for cell in self._suspects():
            state = cell.state
            if state is Status.FAILED and not self._has_failed(cell):
                continue
            if state.is_final or (cell.cancelled and state is not Status.RUNNING):
                del self._cells[key_of(cell)]
                why = record.brief(cell.directory) if state is Status.FAILED else None
                left = state if state.has_ended else Status.NOT_STARTED
                found.append((cell, Outcome(left, why)))
        return found

    def _has_failed(self, cell: Cell) -> bool:
        """Whether a failed cell is left as it is; else a worker runs it again."""
        return not cell.again.is_due

    def _suspects(self) -> list[Cell]:
        """The cells that may have ended since the last look."""
        said = []
        for layout, offset in self._offsets.items():
            events, self._offsets[layout] = layout.journal.read_on(offset)
            said += [self._cells.get((layout.directory, str(e.get("run_id")))) for e in events]
        if time.monotonic() - self._looked_at_all < LOOK_AT_ALL_S:
            return list(dict.fromkeys(cell for cell in said if cell is not None))
        self._looked_at_all = time.monotonic()
        return self.running

    def stop(self, cells: Sequence[Cell]) -> None:
        """Ask whoever runs a cell of these launches to save it and to end it, and nobody to begin.

        The mark is of the launch: no other cell of it begins either.
        """
        for submission in {cell.submission for cell in cells}:
            (submission / CANCELLED_FILE).touch()
        self._looked_at_all = -LOOK_AT_ALL_S

    def withdraw(self) -> None:
        """Nobody is to begin another cell."""
        self.stop(self.running)


def key_of(cell: Cell) -> tuple[Path, str]:
    """The place of a cell, which tells it from every other one."""
    return cell.layout.directory, cell.run_id

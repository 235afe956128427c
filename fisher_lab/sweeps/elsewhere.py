"""Cells that another launcher runs: looked at now and then until they have ended."""

from __future__ import annotations

import time

from fisher_lab.sweeps.cell import Cell, Frozen
from fisher_lab.sweeps.tally import Tally
from fisher_lab.sweeps.worker_process import brief

LOOK_EVERY_S = 1.0


class Elsewhere:
    """Keeps what is being run by others."""

    def __init__(self) -> None:
        self.cells: list[tuple[Cell, Frozen]] = []
        self._looked = time.monotonic()

    def add(self, cell: Cell, frozen: Frozen) -> None:
        """Somebody else holds the claim on this cell."""
        self.cells.append((cell, frozen))

    def look(self, tally: Tally) -> list[tuple[Cell, Frozen]]:
        """Tell the tally of those that have ended; returns those that are ours to run now.

        Their process died, or it was a launch that the user has cancelled, and not this one.
        """
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return []
        self._looked = time.monotonic()
        orphaned, waiting = [], []
        for cell, frozen in self.cells:
            state = cell.layout.state(cell.run_id, frozen.stale_after_s)
            if state == "running":
                waiting.append((cell, frozen))
            elif state.is_final or (state.has_ended and frozen.cancelled):
                directory = cell.layout.run_directory(cell.run_id)
                tally.end(cell, state, brief(directory) if state == "failed" else None, None)
            else:
                orphaned.append((cell, frozen))
        self.cells = waiting
        return orphaned

    def wait(self) -> None:
        """Until it is worth looking again."""
        if self.cells:
            time.sleep(max(0.0, LOOK_EVERY_S - (time.monotonic() - self._looked)))

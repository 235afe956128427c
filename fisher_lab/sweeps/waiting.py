"""Cells that wait for room in a bounded launcher, or that others run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, Frozen
from fisher_lab.sweeps.elsewhere import Elsewhere
from fisher_lab.sweeps.tally import Tally

LOOK_EVERY_S = 0.5
"""Seconds between two looks for a wish to cancel."""


class Waiting:
    """What a launcher that runs some cells at a time has yet to start.

    Args:
        work: cells as they are to be started, one after the other.
        tally: is told of those that are dropped, or that others have ended.

    Attributes:
        submissions: the directories of their launches.
        elsewhere: cells that others run.
    """

    def __init__(self, work: Iterable[tuple[Cell, Frozen]], tally: Tally) -> None:
        self._queue = deque(work)
        self._tally = tally
        self._looked = 0.0
        self.submissions = {frozen.submission for _, frozen in self._queue}
        self.elsewhere = Elsewhere()

    def __bool__(self) -> bool:
        return bool(self._queue or self.elsewhere.cells)

    def append(self, cell: Cell, frozen: Frozen) -> None:
        """A cell that came back waits again, behind the others."""
        self._queue.append((cell, frozen))

    def next(self, running: Sequence[Cell], limit: int) -> tuple[Cell, Frozen] | None:
        """Take the next cell, where there is room for it.

        Args:
            running: the cells at work; one that wants to be alone has the machine for itself.
            limit: how many there may be.
        """
        if not self._queue:
            return None
        cell = self._queue[0][0]
        if cell.alone or any(other.alone for other in running):
            room = not running
        else:
            room = len(running) < limit
        return self._queue.popleft() if room else None

    def refill(self) -> None:
        """Drop everything where too much has failed; take what others have left behind."""
        if self._tally.exhausted:
            self.drop(self.submissions)
        self._queue.extend(self.elsewhere.look(self._tally))

    def look_soon(self) -> None:
        """Perhaps a whole sweep is cancelled: look before the next cell starts."""
        self._looked = 0.0

    def drop_cancelled(self) -> set[Path]:
        """Drop the cells of sweeps that the user has cancelled from elsewhere.

        Returns:
            Their submissions; none where the last look was only just now.
        """
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return set()
        self._looked = time.monotonic()
        cancelled = {one for one in self.submissions if (one / CANCELLED_FILE).exists()}
        self.drop(cancelled)
        return cancelled

    def drop(self, submissions: set[Path]) -> None:
        """Cells of these submissions are not started."""
        for cell, frozen in [one for one in self._queue if one[1].submission in submissions]:
            self._queue.remove((cell, frozen))
            self._tally.end(cell, "not started", None, None)

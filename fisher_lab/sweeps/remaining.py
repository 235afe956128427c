"""Which cells of a sweep a worker may still take, by the journal.

Thousands of cells are not looked at one by one: a worker reads what has come to the journal since,
and looks only at the cell that it is about to take. Every worker begins at another place, so that
they do not meet before most cells are done.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import retry
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell
from fisher_lab.sweeps.directory import LAUNCH_FILE, Layout


class Remaining:
    """The cells of a sweep that were submitted and have not come to an end since.

    Args:
        layout: of the sweep.
        start: where in their order a worker begins, from 0 to 1; None: anywhere.

    Attributes:
        open: run directory's name -> the launch in which the cell was frozen last.
        ended: how cells have ended that are not open.
        noted: of these, the ones whose end is in the journal.
        failures: the kinds of the failures of a cell since then.
        running: the cells of which the journal says that they have begun, and nothing since.
        begun: how often a cell has been started, and how often preempted, since it was submitted.
    """

    def __init__(self, layout: Layout, start: float | None = None) -> None:
        self.layout = layout
        self.open: OrderedDict[str, str] = OrderedDict()
        self.ended: dict[str, Status] = {}
        self.noted: set[str] = set()
        self.running: set[str] = set()
        self.failures: dict[str, list[str]] = {}
        self.begun: Counter[tuple[str, str]] = Counter()
        self._start = random.random() if start is None else start
        self._offset = 0
        self._launch = ""
        self._cells: list[str] = []
        self._changed = 0

    def read(self) -> None:
        """Read what has come to the journal, and whether a launcher has added cells."""
        events, self._offset = self.layout.journal.read_on(self._offset)
        for event in events:
            self._take(event)
        if self._launch:
            self._add_new()

    def has_ended(self, event: Mapping[str, Any]) -> bool:
        """Whether an event says again what is known."""
        name = event.get("run_id")
        return name in self.noted and self.ended.get(name) == event["event"]

    def file(self, run_id: str) -> Path:
        """The file in which a cell is frozen."""
        return self.layout.submissions / self.open[run_id] / "cells" / f"{run_id}.json"

    def in_turn(self) -> Iterator[str]:
        """The open cells, each once, from where the last call has stopped."""
        for _ in range(len(self.open)):
            if not self.open:
                return
            name = next(iter(self.open))
            self.open.move_to_end(name)
            yield name

    def some_running(self, most: int) -> list[str]:
        """Some of the open cells that others run, perhaps no more."""
        found = sorted(self.running & self.open.keys())
        return random.sample(found, min(most, len(found)))

    def unsaid(self) -> list[str]:
        """The cells that have completed, of which the journal does not say so."""
        completed = [name for name, status in self.ended.items() if status is Status.COMPLETED]
        return [name for name in completed if name not in self.noted]

    def close(self, run_id: str, status: Status) -> None:
        """A cell is seen to have ended."""
        self.open.pop(run_id, None)
        self.ended[run_id] = status

    def _take(self, event: Mapping[str, Any]) -> None:
        name, kind = event.get("run_id"), event["event"]
        if kind == "launched":
            self._launch, self._cells, self._changed = str(event.get("submission")), [], 0
            self._add_new()
        elif kind == "cancel":
            self.open.clear()
        elif name in self.open or name in self.ended:
            self.begun[name, kind] += 1
            (self.running.add if kind == "started" else self.running.discard)(name)
            if kind == Status.FAILED and self._is_due(name, str(event.get("kind", "code"))):
                self.open.setdefault(name, self._launch)
            elif kind in (Status.COMPLETED, Status.FAILED):
                self.noted.add(name)
                self.close(name, Status(kind))

    def _is_due(self, name: str, failure: str) -> bool:
        """Whether a worker runs a cell again that has failed; what needs more is for a launcher."""
        if name not in self.open:
            return False
        self.failures.setdefault(name, []).append(failure)
        try:
            again = retry.after(self.failures[name], Cell.load(self.file(name)).config.sweep.retry)
        except (OSError, ValueError):
            return False
        return again.is_due and not (again.is_raised and self.layout.has_launcher())

    def _add_new(self) -> None:
        """Add cells that the last launch has and that are not known yet."""
        folder = self.layout.submissions / self._launch
        try:
            changed = (folder / LAUNCH_FILE).stat().st_mtime_ns
        except OSError:
            return
        if changed == self._changed or (folder / CANCELLED_FILE).exists():
            return
        self._changed = changed
        found = atomic.read_json(folder / LAUNCH_FILE).get("cells") or []
        known = set(self._cells)
        new = [name for name in found if atomic.is_name(name) and name not in known]
        self._cells += new
        at = int(self._start * len(new))
        for name in new[at:] + new[:at]:
            self.open[name] = self._launch
            self.ended.pop(name, None)
            self.noted.discard(name)
            self.failures.pop(name, None)
            for kind in ("started", Status.PREEMPTED):
                self.begun.pop((name, kind), None)

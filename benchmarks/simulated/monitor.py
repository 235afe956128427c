"""What must hold of a sweep whatever happens to it, watched while it happens and at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulated.files import Directory, File, Server
from benchmarks.simulated.kernel import Process, World
from fisher_lab.runs import digests
from fisher_lab.sweeps.cell import Cell


class Violated(AssertionError):
    """A promise was broken."""


class Monitor:
    """Watches the cells of a sweep.

    Args:
        world: of the processes.
        server: of the files.
        poll_s: of the launcher.

    Attributes:
        problems: what was broken, in order: the promise, and the words.
        harmed: cells that a fault has reached: these may fail, and be run again.
        cancelled: whether the user, or the end of a launcher, has cancelled cells.
        thawed: processes that were frozen for so long that others may take their locks.
        deaths: cell -> when its process died, how long it takes until others may see that, and the
            launchers that lived.
        recovery: how much longer it took until a cell was taken up.
        bounded: whether only faults happen that hold nobody up.
    """

    def __init__(self, world: World, server: Server, poll_s: float) -> None:
        self.world, self.server, self.poll_s = world, server, poll_s
        self.problems: list[tuple[str, str]] = []
        self.harmed: set[str] = set()
        self.cancelled = self.all_harmed = False
        self.thawed: set[Process] = set()
        self.inside: dict[str, list[Process]] = {}
        self.runs: Counter[str] = Counter()
        self.completions: Counter[str] = Counter()
        self.status: dict[str, str] = {}
        self.deaths: dict[str, tuple[float, float, list[Process]]] = {}
        self.recovery: list[float] = []
        self.bounded = True
        server.on_publish, server.on_remove = self._published, self._removed

    def say(self, promise: str, words: str) -> None:
        """A promise was broken."""
        self.problems.append((promise, f"at {self.world.now:.2f} s: {words}"))

    # ---- while it happens

    def died(self, run_id: str, bound: float, launchers: list[Process]) -> None:
        """The process of a cell has died while launchers live: one has so long to take it up."""
        if launchers:
            self.deaths[run_id] = (self.world.now, bound, launchers)

    def _taken_up(self, run_id: str) -> None:
        when, bound, launchers = self.deaths.pop(run_id, (0.0, 0.0, []))
        if not any(p.code is None for p in launchers) or not self.bounded:
            return
        took = self.world.now - when
        self.recovery.append(took - bound)
        if took > bound + 2 * self.poll_s:
            self.say("within two polls", f"{run_id} is taken up after {took:.2f} s")

    def enter(self, run_id: str) -> None:
        """A task begins."""
        here = self.world.process
        self._taken_up(run_id)
        others = [p for p in self.inside.get(run_id, []) if p.code is None]
        if others and not any(p in self.thawed for p in (*others, here)):
            self.say("one at a time", f"{run_id} runs twice")
        if self.status.get(run_id) == "completed":
            self.say("completed once", f"{run_id} begins again after it was completed")
        self.inside.setdefault(run_id, []).append(here)
        self.runs[run_id] += 1

    def leave(self, run_id: str) -> None:
        """A task has ended."""
        self.inside[run_id].remove(self.world.process)

    def _published(self, path: str, data: bytes) -> None:
        if not path.endswith(".json"):
            return
        try:
            found = json.loads(data)
        except ValueError:
            self.say("no record torn", f"{path} holds {data[:40]!r} and more")
            return
        file = Path(path)
        if file.name == "run.json":
            self._status(file.parent.name, str(found.get("status")), str(found.get("reason")))

    def _status(self, run_id: str, status: str, reason: str) -> None:
        if self.status.get(run_id) == "completed":
            self.say("completed once", f"{run_id} was completed and becomes {status}")
        if status != "running":
            self._taken_up(run_id)
        self.completions[run_id] += status == "completed"
        is_harmed = self.all_harmed or run_id in self.harmed
        if status == "failed" and not is_harmed:
            self.say("right status", f"{run_id} becomes failed ({reason}), and nothing happened")
        if status == "cancelled" and not self.cancelled:
            self.say("right status", f"{run_id} becomes cancelled ({reason}), and nobody asked")
        self.status[run_id] = status

    def _removed(self, path: str, data: bytes) -> None:
        file = Path(path)
        if file.name == "run.json" and self.status.get(file.parent.name) == "completed":
            self.say("completed once", f"the record of {file.parent.name}, completed, is removed")

    # ---- at the end

    def judge(self, cells: Sequence[Cell], torn: int) -> None:
        """Look at everything once nothing happens any more.

        Args:
            cells: that were to be run.
            torn: lines of the journal that may lack their end: their writers were killed.
        """
        for cell in cells:
            self._judge(cell)
        self._judge_journal(cells, torn)
        for path, data in self._files():
            if path.endswith(".json"):
                try:
                    json.loads(data)
                except ValueError:
                    self.say("no record torn", f"{path} cannot be read at the end")

    def _judge(self, cell: Cell) -> None:
        found = self._json(cell.directory / "run.json")
        metrics = self._json(cell.directory / "metrics.json")
        if found.get("status") != "completed":
            self.say("none lost", f"{cell.run_id} is {found.get('status')} at the end")
        elif metrics.get("loss") != cell.config.seed:
            self.say("none lost", f"{cell.run_id} is completed, and its metrics are {metrics}")
        elif broken := list(digests.broken(cell.directory, found)):
            self.say("no record torn", f"{cell.run_id}: {broken}")
        if self.completions[cell.run_id] > 1:
            self.say("completed once", f"{cell.run_id}: {self.completions[cell.run_id]} times")

    def _judge_journal(self, cells: Sequence[Cell], torn: int) -> None:
        (journal,) = {cell.layout.journal.path for cell in cells}
        lines = self._bytes(journal).decode(errors="replace").split("\n")
        bad = [line for line in lines[:-1] if line and not _is_json(line)]
        if len(bad) > torn or lines[-1]:
            self.say("no record torn", f"the journal has lines that nobody can read: {bad[:2]}")
        events = cells[0].layout.journal.read()
        for cell in cells:
            own = [e["event"] for e in events if e.get("run_id") == cell.run_id]
            if own.count("completed") != 1 or (own[-1] != "completed" and not self.thawed):
                self.say("completed once", f"the journal of {cell.run_id} is {own}")

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(self._bytes(path))
        except ValueError:
            return {}

    def _bytes(self, path: Path) -> bytes:
        try:
            found = self.server.find(str(path), fresh=True)
        except OSError:
            return b""
        return bytes(found.data) if isinstance(found, File) else b""

    def _files(self) -> list[tuple[str, bytes]]:
        found, waiting = [], [("/sim", self.server.root)]
        while waiting:
            path, one = waiting.pop()
            for name, inner in one.names.items():
                if isinstance(inner, Directory):
                    waiting.append((f"{path}/{name}", inner))
                else:
                    found.append((f"{path}/{name}", bytes(inner.data)))
        return found


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

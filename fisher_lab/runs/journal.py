"""Files of JSON lines that only grow, and that many processes write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic
from fisher_lab.runs.lock import Lock

STALE_AFTER_S, TIMEOUT_S = 20.0, 120.0
"""Of the lock under which lines are written."""


@dataclass(frozen=True)
class Journal:
    """An append-only file of JSON lines that many processes write, on this host or on others.

    The holder of a lock writes a line in one piece, because the append mode of a network file
    system alone would let two hosts write over each other. A writer that is killed in the middle
    leaves a line without an end: readers pass over it, and the next writer begins a new one.

    Attributes:
        path: the file; made by the first event.
        locks: directory of the lock under which lines are written.
    """

    path: Path
    locks: Path

    def append(self, event: str, **fields: Any) -> None:
        """Add one event with JSON-able details, flushed to the disk.

        Raises:
            TimeoutError: others held the journal for :data:`TIMEOUT_S` seconds.
        """
        self.append_unless(bool, event, **fields)

    def append_unless(self, unwanted: Callable[[], object], /, event: str, **fields: Any) -> None:
        """:meth:`append`, unless it is unwanted.

        Args:
            unwanted: asked when nobody else can write; it may raise.
            event: its kind.
            fields: details.
        """
        with self._locked():
            if not unwanted():
                self._write([{"event": event, **fields}])

    def append_all(self, entries: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Add events of earlier moments, with ``event`` and ``time`` (:func:`now`), in one piece.

        Args:
            entries: gives them; called when nobody else can write, so that it may look first.

        Raises:
            TimeoutError: others held the journal for :data:`TIMEOUT_S` seconds.
        """
        with self._locked():
            if new := list(entries()):
                self._write(new)

    def append_new(self, entries: Iterable[Mapping[str, Any]]) -> int:
        """Add those entries that are not there yet, whenever that was; returns how many.

        Raises:
            TimeoutError: others held the journal for :data:`TIMEOUT_S` seconds.
        """
        wanted = [dict(entry) for entry in entries]
        with self._locked():
            there = [{k: v for k, v in one.items() if k != "time"} for one in self.read()]
            new = [entry for entry in wanted if entry not in there]
            if new:
                self._write(new)
        return len(new)

    @contextlib.contextmanager
    def _locked(self) -> Any:
        lock = Lock(self.locks / self.path.name, STALE_AFTER_S)
        if not lock.acquire_within(TIMEOUT_S):
            raise TimeoutError(f"{self.path} is held by {lock.holder()}")
        with lock:
            yield

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        time = now()
        lines = [_line({"time": time, **entry}) for entry in entries]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            for line in lines:
                if file.seek(0, os.SEEK_END) > 0:
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                data = line.encode()
                while data:  # a disk that is nearly full takes a part, and says no word
                    data = data[file.write(data) :]
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole events, in the order in which they were written; other lines are not ours."""
        with contextlib.suppress(FileNotFoundError):
            return _events(atomic.read_text(self.path, errors="replace").split("\n"))
        return []

    def read_on(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The whole events after a byte of the file, and where the last of them ends.

        A journal that is shorter than that is another one: it is read from its beginning.
        """
        try:
            with atomic.open_regular(self.path) as file:
                start = offset if file.seek(0, os.SEEK_END) >= offset else 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return [], 0
        whole = content[: content.rfind(b"\n") + 1]
        return _events(whole.decode(errors="replace").split("\n")), start + len(whole)


def now() -> str:
    """The time as it stands in an event."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _events(lines: Iterable[str]) -> list[dict[str, Any]]:
    events = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            events.append(json.loads(line))
    return [event for event in events if _is_ours(event)]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n"


def _is_ours(event: Any) -> bool:
    """Whether a line of the journal has what its readers take from an event of its kind."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    jobs = event.get("jobs")
    return {
        "submitted": isinstance(jobs, dict) and all(isinstance(job, str) for job in jobs.values()),
        "launched": isinstance(event.get("launcher"), str),
        "look": isinstance(event.get("n"), int) and isinstance(event.get("verdict"), str),
    }.get(event["event"], True)

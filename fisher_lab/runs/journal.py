"""An append-only file of JSON lines that many processes write, on this host or on others.

The holder of a lock writes a line in one piece, because the append mode of a network file system
alone would let two hosts write over each other. A writer that is killed in the middle leaves a line
without an end: readers pass over it, and the next writer begins a new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.runs.lock import Lock, LockTimeout

STALE_AFTER = 20.0
TIMEOUT = 120.0


class Journal:
    """An append-only log of events.

    Args:
        path: the file; made by the first event.
        locks: directory of the lock under which lines are written.
    """

    def __init__(self, path: Path, locks: Path) -> None:
        self.path = path
        self._lock = locks / path.name

    def append(self, event: str, **fields: Any) -> None:
        """Add one event, flushed to the disk.

        Args:
            event: what happened.
            fields: JSON-able details.

        Raises:
            LockTimeout: others held the journal for :data:`TIMEOUT` seconds.
        """
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line = json.dumps({**entry, **fields}, allow_nan=False).encode() + b"\n"
        lock = Lock(self._lock, STALE_AFTER)
        if not lock.acquire_within(TIMEOUT):
            raise LockTimeout(f"{self.path} is held by {lock.holder()}")
        with lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END) > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line
                file.write(line)
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole events, in the order in which they were written."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        events = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, Mapping):
                events.append(dict(entry))
        return events

"""Reads back what an offline W&B run wrote, with the library's own inspector; and small waits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Recorded:
    """One ``.wandb`` file."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Step and value of a logged number."""
        key = f"curve/{name}"
        return [(row["_step"], row[key]) for row in self.history if key in row]


def files(directory: Path) -> list[Path]:
    """The ``.wandb`` files under a directory, in the order in which they were last written.

    Not by name: the library names them by the second, and two runs may begin within one.
    """
    return sorted(directory.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def read(file: Path) -> Recorded:
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    recorded = Recorded()
    for line in done.stdout.splitlines():
        record = json.loads(line)
        content = record.get(record["type"], {})
        match record["type"]:
            case "run":
                recorded.run |= content
                recorded.config |= content.get("config", {}).get("update", {})
            case "summary":
                recorded.summary |= content.get("update", {})
            case "history":
                recorded.history.append(content["item"])
            case "artifact":
                recorded.artifacts.append(content)
            case "exit":
                recorded.exit_code = content.get("exit_code", 0)
    return recorded


class Clock:
    """Seconds since it was made in which this thread ran or waited for something.

    Without those in which it could have run and the machine had no processor for it (Linux): a
    bound on what is waited for says nothing of these.
    """

    def __init__(self) -> None:
        self._began = self._now()

    def __call__(self) -> float:
        return self._now() - self._began

    @staticmethod
    def _now() -> float:
        try:
            held_up_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            held_up_ns = 0
        return time.monotonic() - held_up_ns / 1e9


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of a condition; fails after ``seconds``."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        pause.wait(0.02)
    raise AssertionError(f"not within {seconds} s")

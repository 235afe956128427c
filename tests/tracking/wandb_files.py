"""Reads back what an offline W&B run wrote, with the library's own inspector."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import python


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
    done = python("-m", "wandb", "leet", "inspect", "--json", str(file))
    assert done.returncode == 0, done.stderr
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


def png() -> bytes:
    """A picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"\0\xff\0\0"), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks.items())

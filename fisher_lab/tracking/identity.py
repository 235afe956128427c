"""The name of a run towards its trackers: kept with the run, so that a resumed run keeps it.

``run_id`` says what a run computes: two repeats have the same one, and would overwrite each other
in a service that knows runs by their name. The tracker's name is ``run_id`` and a random end, drawn
when a run directory is first used and read again by every later attempt in it.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from fisher_lab.runs import atomic

FILE = "tracker.json"


def claim(directory: Path, run_id: str) -> tuple[str, int]:
    """The tracker's name of the run in a directory, and the number of this attempt (from 1).

    Args:
        directory: the run directory.
        run_id: of the run; with another one than last time a new name is drawn.
    """
    path = directory / FILE
    known = _read(path)
    if known.get("run_id") == run_id and isinstance(known.get("id"), str):
        name, attempt = known["id"], int(known.get("attempt", 1)) + 1
    else:
        name, attempt = f"{run_id}-{secrets.token_hex(4)}", 1
    atomic.write_json(path, {"run_id": run_id, "id": name, "attempt": attempt})
    return name, attempt


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

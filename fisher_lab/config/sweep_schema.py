"""The sections ``sweep`` and ``resume``: how the cells of a sweep are run, never what they compute.

Nothing here is part of a cell's identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .fields import Allowed, above, null, setting, whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

file_name = Allowed(
    "letters, digits, dots, dashes and underscores, beginning with a letter or a digit",
    lambda value: value is not None and _NAME.fullmatch(value) is not None,
)


@dataclass
class SweepConfig:
    """How a sweep is run (`docs/sweeps.md`)."""

    name: str | None = setting(
        None,
        "Name of the sweep's directory; null: its file's, or `adhoc-<hash>` without a file.",
        file_name | null,
    )
    dir: str = setting("results", "Where the directories of sweeps lie.")
    dry_run: bool = setting(
        False, "Compose and validate every cell, print what would be done, and stop."
    )
    detach: bool = setting(False, "Start or submit the cells and return at once.")
    max_failures: int | None = setting(
        None, "No further cell is started after this many have failed.", whole(1) | null
    )
    fail_fast: bool = setting(
        False, "The first failure also stops the cells that are running; they can be resumed."
    )
    timeout_s: float | None = setting(
        None,
        "Seconds that a cell may take; may differ between cells; not for `hydra/launcher=serial`.",
        above(0) | null,
    )
    max_requeues: int = setting(
        3, "How often a preempted job goes back to the queue before it has failed.", whole(0)
    )


@dataclass
class ResumeConfig:
    """What running a sweep again does with the cells that are there."""

    retry_failed: bool = setting(True, "Run cells that failed once more.")
    stale_after_s: float = setting(
        60.0,
        "Seconds without a sign of life after which a cell on another host counts as dead.",
        above(1),
    )

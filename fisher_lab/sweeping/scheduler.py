"""What SLURM says of jobs: ``squeue`` and ``scontrol``, which every cluster has.

``sacct`` is asked for nothing: where a cluster keeps no accounts it never answers, and who waits
for it waits for ever.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Iterable

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States of a job that does not come back."""

GONE = "GONE"
"""State of a job that the controller has forgotten."""

_TIMEOUT_S = 60


def states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The state of jobs of this user.

    Args:
        jobs: numbers as sbatch gives them, ``12`` or ``12_3``.

    Returns:
        Job -> state, :data:`GONE` for what the controller no longer knows; None where it does not
        answer, which says nothing of the jobs.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    command = ["squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T"]
    text = _ask(command)
    if text is None:
        return None
    known = dict(line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
    return {job: known.get(job, GONE) for job in wanted}


def is_active(state: str | None) -> bool:
    """Whether a job of this state may still run; not one of which nothing is known."""
    return state is not None and state not in ENDED and state != GONE


def max_array_size() -> int:
    """How many jobs an array may have here; SLURM's own default where it does not say."""
    for line in (_ask(["scontrol", "show", "config"]) or "").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdecimal():
            # Its largest index is one less than this number, and indices begin at 0.
            return max(1, int(value))
    return 1001


def cancel(jobs: Iterable[str]) -> bool:
    """Cancel jobs; false where the controller did not take it."""
    wanted = sorted(set(jobs))
    return not wanted or _ask(["scancel", "--quiet", *wanted]) is not None


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

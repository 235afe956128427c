"""How busy the machine was with other things during a run, and how fast its clock was.

Times of two runs can be compared only where both had the same of the machine; the record says what
each had, so that a claim about times need not guess.
"""

from __future__ import annotations

import os
import time
from typing import Any

_IDLE = ("idle", "iowait", "guest", "guest_nice")
"""Times of processors in which nothing runs, and those that are counted elsewhere already."""


class Load:
    """What a machine does beside one process, from the moment in which this object is made."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy(), _own()
        self._clock = _clock_mhz()

    def about(self) -> dict[str, Any]:
        """What has happened since, for the record of a run.

        Returns:
            ``others``: processors that were busy with other processes, on average (a share of one
            processor each, 1.5 is one and a half); ``average``: of the last minute, as the system
            counts it; ``clock_mhz``: at both ends, None where the system does not say.
        """
        seconds = time.monotonic() - self._began
        others = (_busy() - self._busy - (_own() - self._own)) / seconds if seconds > 0 else 0.0
        return {
            "others": round(max(others, 0.0), 2),
            "average": round(os.getloadavg()[0], 2),
            "clock_mhz": [self._clock, _clock_mhz()],
        }


def _busy() -> float:
    """Seconds that the processors of the machine have worked."""
    import psutil

    times = psutil.cpu_times()._asdict()
    return sum(value for name, value in times.items() if name not in _IDLE)


def _own() -> float:
    """Seconds that this process has worked, and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _clock_mhz() -> float | None:
    import psutil

    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    return round(found.current) if found and found.current else None

"""Cells that failed and run again, by the kind of their failure (``sweep.retry``).

The journal has the kind of every failure, so that whoever looks comes to the same answer: the
launcher that lost a job, a worker that reads what others have done, and the next launch, which
begins to count anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fisher_lab.config.schema import RetryConfig, RetryPolicy
from fisher_lab.runs.status import Status

_OF_REASONS = {
    "timeout": "time",
    "TIMEOUT": "time",
    "DEADLINE": "time",
    "SIGKILL": "oom",
    "OUT_OF_MEMORY": "oom",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "GONE": "node",
    "max_requeues": "",
}
"""Reason in a record -> kind of failure. What was preempted too often has been repeated enough."""
_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory", re.I)


def kind_of(found: Mapping[str, Any]) -> str:
    """The kind of failure that a record tells of: ``oom``, ``time``, ``node`` or ``code``.

    Args:
        found: the contents of ``run.json`` of a run that has failed.
    """
    error = found.get("error") or {}
    reason = found.get("reason")
    if reason in _OF_REASONS:
        return _OF_REASONS[reason]
    return "oom" if _MEMORY.search(f"{error.get('type')}: {error.get('message')}") else "code"


@dataclass(frozen=True)
class Again:
    """What the failures of a cell since its launch come to.

    Attributes:
        is_due: whether it runs again.
        memory: by what its memory is multiplied then.
        time: by what its time limits are.
        said: how often it has failed, in words.
    """

    is_due: bool = False
    memory: float = 1.0
    time: float = 1.0
    said: str = ""

    @property
    def is_raised(self) -> bool:
        """Whether it needs more than other cells."""
        return max(self.memory, self.time) > 1


def after(failures: Iterable[str], policies: RetryConfig) -> Again:
    """What is to be done after some failures.

    Args:
        failures: their kinds, in their order.
        policies: of the cell.
    """
    kinds = list(failures)
    counted = Counter(kinds)
    memory = time = 1.0
    for kind, count in counted.items():
        policy = policy_of(policies, kind)
        memory *= factor(policy.mem_gb) ** min(count, policy.times)
        time *= factor(policy.timeout_min) ** min(count, policy.times)
    if not kinds:
        return Again()
    last, times = kinds[-1], policy_of(policies, kinds[-1]).times
    said = f"{last or 'preempted'} {counted[last]} of {times + 1}"
    return Again(counted[last] <= times, memory, time, said)


def policy_of(policies: RetryConfig, kind: str) -> RetryPolicy:
    """The policy for a kind of failure; one that repeats nothing where there is none."""
    return getattr(policies, kind, None) or RetryPolicy()


def factor(text: str | None) -> float:
    """The number in ``x2``; 1 for null."""
    return 1.0 if text is None else float(text.removeprefix("x"))


def failures(events: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The failures of every cell since the last launch, from the events of a journal.

    Returns:
        Identity of the cell -> ``time``, ``kind``, ``reason`` and ``message`` of each, in order.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "launched":
            found = {}
        elif event["event"] == Status.FAILED:
            about = {key: event.get(key) for key in ("time", "kind", "reason", "message")}
            found.setdefault(str(event.get("run_id")), []).append(about)
    return found

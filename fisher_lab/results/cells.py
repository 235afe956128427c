"""A cell of a table: the runs that share its settings, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd

from .frames import Column, Frame
from .stats import CONFIDENCE, Summary, summarise
from .values import Rounded

MISSING = "missing"
UNFINISHED = ("running", "preempted", MISSING)
"""Statuses of runs that may still come to a number."""

CORRUPT = "corrupt"
"""The status of a run whose record, or whose metrics though it is completed, cannot be read."""

NOT_FINITE = "diverged"
"""A completed run whose metric is NaN or infinite."""

BROKEN_NUMBERS = ("NonFiniteError", "FloatingPointError", "LinAlgError", "not finite", "non-finite")
"""Words in the reason of a failed run that say its numbers broke down, and not the machine."""


@dataclass(frozen=True)
class Cell:
    """One metric of the runs that share a cell's settings.

    Attributes:
        values: finite numbers by pairing key (the seed), one a completed run.
        lost: what became of the others: ``failed``, ``diverged``, ``running``, ... to how many.
        missing: runs that other cells have and this one has not.
        reasons: why runs were lost, each once.
        diverged: lost runs whose numbers broke down: ``diverged``, and failed for that reason. What
            was killed, timed out or ran out of memory says nothing of its numbers.
        confidence: of the interval.
        method: of the interval, ``t`` or ``bootstrap``.
    """

    values: Column
    lost: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    reasons: tuple[str, ...] = ()
    diverged: int = 0
    confidence: float = CONFIDENCE
    method: str = "t"

    @cached_property
    def summary(self) -> Summary:
        """Mean, interval, median and quartiles of the finite numbers."""
        return summarise(self.values.to_numpy(dtype=float), self.confidence, self.method)

    def rounded(self, statistic: str) -> Rounded:
        """The number that is shown, to the digits that count.

        Args:
            statistic: ``mean`` (with half its interval) or ``median``.
        """
        s = self.summary
        if statistic == "mean":
            return Rounded(s.mean, s.half_width)
        return Rounded(s.median, (s.q3 - s.q1) / 2 if s.n > 1 else None)

    @property
    def expected(self) -> int:
        """Runs that the cell should have."""
        return len(self.values) + sum(self.lost.values()) + self.missing

    @property
    def complete(self) -> bool:
        """Whether every run has come to a finite number."""
        return len(self.values) == self.expected > 0

    @property
    def state(self) -> str:
        """What is lacking, in words: ``1 of 3 failed``; empty where nothing is."""
        parts = [f"{count} {what}" for what, count in self.lost.items()]
        if self.missing:
            parts.append(f"{self.missing} missing")
        if not parts:
            return ""
        if len(parts) == 1 and len(self.values) == 0:
            return parts[0].partition(" ")[2] if self.expected > 0 else "missing"
        return f"{', '.join(parts)} of {self.expected}"


def make_cell(
    runs: Frame,
    metric: str,
    keys: Sequence[Hashable],
    expected: int,
    confidence: float = CONFIDENCE,
    method: str = "t",
) -> Cell:
    """The cell of one metric.

    Args:
        runs: the cell's runs, one a pairing key.
        metric: its column.
        keys: pairing key of each run.
        expected: runs that the cell should have.
        confidence: of the interval.
        method: of the interval.
    """
    lost: Counter[str] = Counter()
    reasons: list[str] = []
    values: dict[Hashable, float] = {}
    broken = 0
    columns = zip(
        keys, runs["status"], runs["reason"], runs["not_finite"], runs[metric], strict=True
    )
    for key, status, reason, not_finite, value in columns:
        if status != "completed":
            lost[status] += 1
            if isinstance(reason, str) and reason and status != MISSING:
                reasons.append(reason)
                broken += status == "failed" and any(word in reason for word in BROKEN_NUMBERS)
        elif metric in (not_finite or "").split():
            lost[NOT_FINITE] += 1
            broken += 1
        elif value != value:
            lost["not measured"] += 1
        else:
            values[key] = float(value)
    return Cell(
        pd.Series(values, dtype=float),
        {what: count for what, count in lost.items() if what != MISSING},
        max(expected - len(runs), 0) + lost[MISSING],
        tuple(dict.fromkeys(reasons)),
        broken,
        confidence,
        method,
    )

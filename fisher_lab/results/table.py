"""The ablation table: rows by columns of swept settings, cells over seeds, compared and marked.

Every run is in some cell and counted: what failed, diverged or is missing is shown in its cell and
never averaged away. A setting that varies and was put nowhere becomes a row, so that a mean is only
ever over seeds, or over what ``over`` names.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from fisher_lab.results import stats
from fisher_lab.results.axes import SEED, find_axes, resolve, select
from fisher_lab.results.stats import CONFIDENCE, Summary, summarise
from fisher_lab.results.values import (
    Column,
    Frame,
    ResultsError,
    Rounded,
    better,
    choose,
    is_time,
    label,
    levels,
    meaning,
    same,
)
from fisher_lab.runs.status import Status

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
            return parts[0].partition(" ")[2] if self.expected > 0 else Status.MISSING
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
        if status != Status.COMPLETED:
            lost[status] += 1
            if isinstance(reason, str) and reason and status != Status.MISSING:
                reasons.append(reason)
                broken += status == Status.FAILED and any(word in reason for word in BROKEN_NUMBERS)
        elif metric in (not_finite or "").split():
            lost[Status.DIVERGED] += 1
            broken += 1
        elif value != value:
            lost["not measured"] += 1
        else:
            values[key] = float(value)
    return Cell(
        pd.Series(values, dtype=float),
        {what: count for what, count in lost.items() if what != Status.MISSING},
        max(expected - len(runs), 0) + lost[Status.MISSING],
        tuple(dict.fromkeys(reasons)),
        broken,
        confidence,
        method,
    )


Key = tuple[Any, ...]
NEGLIGIBLE = 1e-6
"""Numbers that differ by less than this share are equally good, however certain that is."""
STATISTICS = ("auto", "mean", "median")
INTERVALS = ("t", "bootstrap")


@dataclass(frozen=True)
class Comparison:
    """A cell against its baseline cell.

    Attributes:
        difference: paired by everything but the baseline's settings; None where no pair is.
        p_holm: after Holm's correction over all comparisons of the table; NaN where not tested.
        is_baseline: the cell is the baseline itself.
    """

    difference: stats.Paired | None
    p_holm: float = math.nan
    is_baseline: bool = False


@dataclass
class Table:
    """Cells by row, metric and column.

    Attributes:
        title: of the table.
        row_names: settings that the rows stand for.
        col_names: settings that the columns stand for; empty where the columns are the metrics.
        rows: a tuple of values for each row.
        cols: a tuple of values for each column.
        metrics: names.
        cells: (row, metric, column) -> cell; all there.
        over: settings that a cell runs over.
        statistic: metric -> ``mean`` or ``median``.
        best: (row, metric, column) of the best cell of each metric.
        ties: those that cannot be told from it.
        comparisons: with a baseline: (row, metric, column) -> comparison.
        baseline: what every cell is compared with.
        notes: what a reader has to know.
        details: cells are shown with their standard deviation and number of runs.
    """

    title: str
    row_names: list[str]
    col_names: list[str]
    rows: list[Key]
    cols: list[Key]
    metrics: list[str]
    cells: dict[tuple[Key, str, Key], Cell]
    over: list[str]
    statistic: dict[str, str]
    confidence: float = stats.CONFIDENCE
    best: set[tuple[Key, str, Key]] = field(default_factory=set)
    ties: set[tuple[Key, str, Key]] = field(default_factory=set)
    comparisons: dict[tuple[Key, str, Key], Comparison] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: bool = False

    @property
    def columns(self) -> list[tuple[str, Key]]:
        """(metric, column) from left to right."""
        return list(itertools.product(self.metrics, self.cols))

    def point(self, key: tuple[Key, str, Key]) -> tuple[float, float, float]:
        """The number that stands for a cell, and the ends of its interval (NaN where none)."""
        s = self.cells[key].summary
        if self.statistic[key[1]] == "median":
            both = (s.q1, s.q3) if s.n > 1 else (math.nan, math.nan)
            return s.median, *both
        return s.mean, s.low, s.high

    def heading(self, metric: str, col: Key) -> str:
        """What stands over a column."""
        where = ", ".join(label(value) for value in col)
        return f"{metric} ({where})" if where else metric


def tabulate(
    frame: Frame,
    *,
    rows: Sequence[str] | None = None,
    cols: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    over: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    statistic: str = "auto",
    interval: str = "t",
    confidence: float = stats.CONFIDENCE,
    directions: Mapping[str, str] | None = None,
    first: Iterable[str] = (),
    title: str | None = None,
    details: bool = False,
) -> Table:
    """Make the table of some runs.

    Args:
        frame: from :func:`fisher_lab.results.loading`.
        rows: settings; by default all that were swept and are not elsewhere.
        cols: settings.
        metrics: names; by default a choice that suits the runs.
        over: settings that a cell's numbers are taken over; by default the seed.
        where: only runs with these settings.
        baseline: settings of the cell that the others are compared with.
        statistic: ``mean`` with its interval, ``median`` with the quartiles, or ``auto``: median
            for times.
        interval: ``t`` or ``bootstrap``.
        confidence: of the intervals, and of the tests that marks rest on.
        directions: metric -> ``min`` or ``max``, which is best; by default by its name.
        first: metrics that are chosen first where none are named.
        title: by default the sweeps' names.
        details: show the standard deviation and the number of runs in every cell.

    Raises:
        ResultsError: no run, or a setting or metric that the runs do not have.
    """
    _check_choice("statistic", statistic, STATISTICS)
    _check_choice("interval", interval, INTERVALS)
    if not 0 < confidence < 1:
        raise ResultsError(f"confidence={confidence:g} is not allowed: between 0 and 1")
    runs = select(frame, where or {})
    if runs.empty:
        raise ResultsError("there are no runs" + (" that match" if where else ""))
    plan = _plan(runs, rows, cols, over)
    names = choose(runs, metrics, first)
    table = Table(
        title=title or ", ".join(dict.fromkeys(runs["sweep"])),
        row_names=plan.rows,
        col_names=plan.cols,
        rows=[],
        cols=[],
        metrics=names,
        cells={},
        over=plan.over,
        statistic={m: _statistic(m, statistic) for m in names},
        confidence=confidence,
        notes=plan.notes,
        details=details,
    )
    _fill(table, runs, interval)
    _mark(table, directions or {})
    if baseline:
        _compare(table, {resolve(runs, name): value for name, value in baseline.items()})
    _tell(table)
    return table


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ResultsError(f"{name}={value} is not allowed: one of {', '.join(allowed)}")


def _statistic(metric: str, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "median" if is_time(metric) else "mean"


# ---- which settings go where ---------------------------------------------------------------------


@dataclass
class _Plan:
    rows: list[str]
    cols: list[str]
    over: list[str]
    notes: list[str]


def _plan(
    runs: Frame,
    rows: Sequence[str] | None,
    cols: Sequence[str],
    over: Sequence[str] | None,
) -> _Plan:
    axes = find_axes(runs)
    taken = [resolve(runs, name) for name in cols]
    across = [resolve(runs, name) for name in (over if over is not None else _seed(runs))]
    named = [resolve(runs, name) for name in rows] if rows is not None else []
    for name in named:
        if name in taken or name in across:
            raise ResultsError(f"{name} cannot stand in two places of a table")
    placed = {*named, *taken, *across}
    led = {follower for a in placed for follower in axes.followers.get(a, [])}
    leaders = {a for a, followers in axes.followers.items() if placed & set(followers)}
    rest = [name for name in axes.values if name not in placed | led | leaders]
    notes = []
    if rows is not None and rest:
        notes.append(
            f"{', '.join(rest)} {'varies' if len(rest) == 1 else 'vary'} too and became rows; "
            "choose a value with --where, or average over it with --over"
        )
    for leader, followers in axes.followers.items():
        shown = ", ".join(followers[:4]) + (", ..." if len(followers) > 4 else "")
        notes.append(f"{shown} {'varies' if len(followers) == 1 else 'vary'} with {leader}")
    return _Plan([*named, *rest], taken, across, notes)


def _seed(runs: Frame) -> list[str]:
    return [SEED] if SEED in runs.attrs.get("config", []) else []


# ---- cells ---------------------------------------------------------------------------------------


def _fill(table: Table, runs: Frame, interval: str) -> None:
    groups: dict[tuple[Key, Key], dict[Key, int]] = {}
    spelled: dict[str, dict[Any, Any]] = {}
    repeated = 0
    order = runs["finished"].fillna("").to_numpy()
    keys = {
        part: _keys(runs, names, spelled)
        for part, names in (("r", table.row_names), ("c", table.col_names), ("o", table.over))
    }
    for i in range(len(runs)):
        members = groups.setdefault((keys["r"][i], keys["c"][i]), {})
        other = members.get(keys["o"][i])
        if other is not None:
            repeated += 1
            # The latest that completed counts: the same seed twice is not two samples.
            if (_done(runs, other), order[other]) > (_done(runs, i), order[i]):
                continue
        members[keys["o"][i]] = i
    if repeated:
        table.notes.append(
            f"{repeated} runs repeat settings and {', '.join(table.over) or 'all'} of others: "
            "the latest completed one of each counts"
        )
    _place(table, runs, groups, interval)


def _place(
    table: Table,
    runs: Frame,
    groups: Mapping[tuple[Key, Key], Mapping[Key, int]],
    interval: str,
) -> None:
    table.rows = _sorted({row for row, _ in groups})
    table.cols = _sorted({col for _, col in groups})
    expected = len({key for members in groups.values() for key in members})
    runs = runs[["status", "reason", "not_finite", *table.metrics]]
    for row, col in itertools.product(table.rows, table.cols):
        members = groups.get((row, col), {})
        chosen = runs.iloc[list(members.values())]
        # The seed itself where cells are over nothing else: an index of tuples takes far longer.
        keys = [key[0] if len(key) == 1 else key for key in members]
        for metric in table.metrics:
            table.cells[row, metric, col] = make_cell(
                chosen, metric, keys, expected, table.confidence, interval
            )


def _keys(runs: Frame, names: Sequence[str], spelled: dict[str, dict[Any, Any]]) -> list[Key]:
    """The values of some settings for each run; one spelling for values that mean the same."""
    columns = []
    for name in names:
        known = spelled.setdefault(name, {})
        columns.append([known.setdefault(_typed(v), _plain(v)) for v in runs[name]])
    return list(zip(*columns, strict=True)) if columns else [()] * len(runs)


def _typed(value: Any) -> Any:
    known = meaning(value)
    return (type(known).__name__, known)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value


def _done(runs: Frame, i: int) -> bool:
    return bool(runs["status"].iloc[i] == Status.COMPLETED)


def _sorted(keys: Iterable[Key]) -> list[Key]:
    keys = list(keys)
    width = len(keys[0]) if keys else 0
    places = [
        {_typed(v): i for i, v in enumerate(levels(key[j] for key in keys))} for j in range(width)
    ]
    return sorted(keys, key=lambda key: [places[j][_typed(v)] for j, v in enumerate(key)])


# ---- marks ---------------------------------------------------------------------------------------


def _mark(table: Table, directions: Mapping[str, str]) -> None:
    """The best cell of each metric, and those that cannot be told from it."""
    for metric, wanted in directions.items():
        _check_choice(f"best {metric}", wanted, ("min", "max", "none"))
    for metric in table.metrics:
        direction = directions.get(metric, better(metric))
        keys = [k for k in table.cells if k[1] == metric and table.cells[k].complete]
        if direction not in ("min", "max") or len(keys) < 2:
            continue
        points = {k: table.point(k)[0] for k in keys}
        top = (max if direction == "max" else min)(points.values())
        best = next(k for k in keys if math.isclose(points[k], top, rel_tol=1e-12))
        as_good = {k for k in keys if _looks_like(table, k, best)}
        if len(as_good) == len(keys):
            continue  # nothing to choose between
        table.best.add(best)
        table.ties |= {k for k in keys if k != best and (k in as_good or _tied(table, k, best))}


def _looks_like(table: Table, key: tuple[Key, str, Key], best: tuple[Key, str, Key]) -> bool:
    """Whether two cells show the same number, or differ by a negligible share of it."""
    a, b = table.point(key)[0], table.point(best)[0]
    if abs(a - b) <= NEGLIGIBLE * max(abs(a), abs(b)):
        return True
    one, other = (table.cells[k].rounded(table.statistic[k[1]]) for k in (key, best))
    return (float(one.value), one.exponent) == (float(other.value), other.exponent)


def _tied(table: Table, key: tuple[Key, str, Key], best: tuple[Key, str, Key]) -> bool:
    """Whether a test of what the cells show cannot tell them apart."""
    one, other = table.cells[key].values, table.cells[best].values
    return stats.overlap(one, other, table.confidence, table.statistic[key[1]])


def _compare(table: Table, baseline: Mapping[str, Any]) -> None:
    """Every cell against the one that differs from it in the baseline's settings only."""
    names = [*table.row_names, *table.col_names]
    spelled: dict[str, Any] = {}
    for name, value in baseline.items():
        if name not in names:
            raise ResultsError(f"baseline: {name} is neither a row nor a column of the table")
        place = names.index(name)
        there = [(*row, *col)[place] for row in table.rows for col in table.cols]
        match = next((v for v in there if same(value, v)), there)
        if match is there:
            raise ResultsError(
                f"baseline: no run has {name}={label(value)}; "
                f"there are {', '.join(label(v) for v in levels(there))}"
            )
        spelled[name] = match
    table.baseline = baseline = spelled
    found: dict[tuple[Key, str, Key], Comparison] = {}
    for key in table.cells:
        row, metric, col = key
        other = (
            _moved(row, table.row_names, baseline),
            metric,
            _moved(col, table.col_names, baseline),
        )
        if other == key:
            found[key] = Comparison(None, is_baseline=True)
            continue
        base = table.cells.get(other)
        difference = None
        if base is not None:
            difference = _difference(table.cells[key], base, table.confidence)
        found[key] = Comparison(difference)
    tested = [k for k, c in found.items() if c.difference is not None]
    corrected = stats.holm([_p(found[k]) for k in tested])
    for key, p in zip(tested, corrected, strict=True):
        found[key] = Comparison(found[key].difference, p)
    table.comparisons = found


def _p(comparison: Comparison) -> float:
    return math.nan if comparison.difference is None else comparison.difference.p


def _difference(cell: Cell, base: Cell, confidence: float) -> stats.Paired | None:
    both = cell.values.index.intersection(base.values.index)
    return stats.paired(cell.values[both], base.values[both], confidence) if len(both) else None


def _moved(key: Key, names: Sequence[str], baseline: Mapping[str, Any]) -> Key:
    """The same place with the baseline's settings."""
    return tuple(baseline.get(n, v) for n, v in zip(names, key, strict=True))


# ---- notes ---------------------------------------------------------------------------------------


def _tell(table: Table) -> None:
    numbers = [cell.summary.n for cell in table.cells.values()]
    over = ", ".join(table.over) or "nothing"
    most = max(numbers, default=0)
    if most == 1:
        table.notes.insert(0, "one run a cell: no interval can be given")
    elif most > 1:
        table.notes.insert(0, _what_is_shown(table, over, {n for n in numbers if n}))
    lost = sum(not cell.complete for cell in table.cells.values())
    if lost:
        table.notes.append(
            f"{lost} of {len(table.cells)} cells lack runs; what is lacking stands in the cell"
        )
    if table.best:
        tied = "; ~ cannot be told from it" if table.ties else ""
        table.notes.append(f"* best of its metric{tied}" + (" (single runs)" if most == 1 else ""))
    if table.baseline:
        cell = ", ".join(f"{n}={label(v)}" for n, v in table.baseline.items())
        table.notes.append(
            f"differences to {cell}: mean ± half the {_percent(table)} interval, paired t test, "
            "Holm over the table; d is Cohen's d_z"
        )


def _percent(table: Table) -> str:
    return f"{100 * table.confidence:g}%"


def _what_is_shown(table: Table, over: str, numbers: set[int]) -> str:
    runs = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else str(max(numbers))
    shown = []
    if "mean" in table.statistic.values():
        shown.append(f"mean ± half the {_percent(table)} interval")
    if "median" in table.statistic.values():
        shown.append("median [quartiles] of times")
    if table.details:
        shown.append("sd is the standard deviation")
    return f"{'; '.join(shown)}; over {over}, n = {runs}"

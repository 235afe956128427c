"""The table of an ablation: rows and columns of swept settings, cells averaged over seeds.

Every run is counted in a cell: runs that failed, diverged or are missing are shown there and are
never averaged away. A setting that varies and that nobody placed becomes a row, so that a mean is
taken over seeds alone, or over what ``over`` names.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pandas as pd
from typing_extensions import override

from fisher_lab.results import labels, stats
from fisher_lab.results.stats import CONFIDENCE, Summary, summarise
from fisher_lab.results.values import (
    CODE,
    SEED,
    ResultsError,
    Rounded,
    choose,
    find_axes,
    is_time,
    key_of,
    label,
    levels,
    resolve,
    same,
    select,
)
from fisher_lab.runs.status import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = tuple[Any, ...]
"""Values of the settings of a row or a column."""

CellKey = tuple[Key, str, Key]
"""Row, metric and column of a cell."""

BROKEN_NUMBERS = ("NonFiniteError", "FloatingPointError", "LinAlgError", "not finite", "non-finite")
"""Words in the reason of a failed run that say its numbers broke down, and not the machine."""


@dataclass(frozen=True)
class TableCell:
    """One metric of the runs that have a cell's settings.

    Attributes:
        values: finite numbers by pairing key (the seed), one per completed run.
        lost: state of the other runs (``failed``, ``diverged``, ``running``, ...) -> how many.
        missing: how many runs other cells have and this one does not.
        reasons: why runs were lost, each once.
        without: pairing key of a run without a number -> its state.
        diverged_at: those of runs that diverged, or failed for it; not of killed ones.
        confidence: of the interval.
        method: of the interval, ``t``, ``log`` or ``bootstrap``.
    """

    values: pd.Series
    lost: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    reasons: tuple[str, ...] = ()
    without: dict[Hashable, str] = field(default_factory=dict)
    diverged_at: tuple[Hashable, ...] = ()
    confidence: float = CONFIDENCE
    method: str = "t"

    @cached_property
    def summary(self) -> Summary:
        """Mean, interval, median and quartiles of the finite numbers."""
        return summarise(self.values.to_numpy(dtype=float), self.confidence, self.method)

    def rounded(self, statistic: str) -> Rounded:
        """The mean, to the digits that its interval leaves, or the median by its quartiles."""
        s = self.summary
        if s.n < FEW:
            return Rounded(s.mean)
        if statistic == "mean":
            skewed = self.method == "log"  # the nearer end says where the digits begin
            return Rounded(s.mean, min(s.mean - s.low, s.high - s.mean) if skewed else s.half_width)
        return Rounded(s.median, (s.q3 - s.q1) / 2)

    @property
    def expected(self) -> int:
        """How many runs the cell should have."""
        return len(self.values) + sum(self.lost.values()) + self.missing

    @property
    def complete(self) -> bool:
        """Whether every run has a finite number."""
        return len(self.values) == self.expected > 0

    @property
    def state(self) -> str:
        """The runs that are lost, in words: ``1 failed of 3``; empty where none is."""
        parts = [f"{count} {what}" for what, count in self.lost.items()]
        if self.missing:
            parts.append(f"{self.missing} missing")
        if not parts:
            return ""
        if len(parts) == 1 and len(self.values) == 0:
            return parts[0].partition(" ")[2] if self.expected > 0 else Status.MISSING
        return f"{', '.join(parts)} of {self.expected}"


def make_cell(
    runs: pd.DataFrame,
    metric: str,
    keys: Sequence[Hashable],
    expected: int,
    confidence: float = CONFIDENCE,
    method: str = "t",
) -> TableCell:
    """The cell of one metric.

    Args:
        runs: the cell's runs, one per pairing key.
        metric: the name of its column.
        keys: pairing key of each run.
        expected: runs that the cell should have.
        confidence: of the interval.
        method: of the interval.
    """
    without: dict[Hashable, str] = {}
    reasons: list[str] = []
    values: dict[Hashable, float] = {}
    broken: list[Hashable] = []
    columns = (runs[name] for name in ("status", "reason", "not_finite", metric))
    for key, status, reason, not_finite, value in zip(keys, *columns, strict=True):
        if status != Status.COMPLETED:
            without[key] = status
            if isinstance(reason, str) and reason and status != Status.MISSING:
                reasons.append(reason)
                failed = status == Status.FAILED and any(w in reason for w in BROKEN_NUMBERS)
                broken += [key] if failed else []
        elif metric in (not_finite or "").split():
            without[key] = Status.DIVERGED
            broken.append(key)
        elif value != value:
            without[key] = "not measured"
        else:
            values[key] = float(value)
    lost = Counter(without.values())
    missing = max(expected - len(runs), 0) + lost.pop(Status.MISSING, 0)
    return TableCell(
        pd.Series(values, dtype=float), dict(lost), missing,
        tuple(dict.fromkeys(reasons)), without, tuple(broken), confidence, method,
    )  # fmt: skip


FEW = 3
"""Runs from which on an interval is shown: of fewer their numbers themselves."""

NEGLIGIBLE = 1e-6
"""Numbers that differ by less than this fraction are equally good, however certain that is."""


@dataclass(frozen=True)
class Comparison:
    """A cell against its baseline cell.

    Attributes:
        difference: paired by everything but the baseline's settings, of times their ratio; None
            where there is no pair.
        p_holm: p after Holm's correction over all comparisons of the table; NaN where not tested.
        is_baseline: the cell is the baseline itself.
    """

    difference: stats.Paired | None
    p_holm: float = math.nan
    is_baseline: bool = False


@dataclass(repr=False)
class Table:
    """Cells by row, metric and column.

    Attributes:
        title: of the table.
        row_names: settings that the rows stand for.
        col_names: settings that the columns stand for; empty where the columns are the metrics.
        metrics: names.
        over: settings that a cell runs over.
        statistic: metric -> ``mean`` or ``median``.
        confidence: of the intervals.
        notes: what a reader has to know, one sentence each.
        details: cells are shown with their standard deviation and number of runs.
        rows: a tuple of values for each row.
        cols: a tuple of values for each column.
        cells: (row, metric, column) -> cell, for all of them.
        best: (row, metric, column) of the best cell of each metric.
        ties: those that do not differ significantly from the best.
        baseline: the settings that every cell is compared with.
        comparisons: with a baseline: (row, metric, column) -> comparison.
    """

    title: str
    row_names: list[str]
    col_names: list[str]
    metrics: list[str]
    over: list[str]
    statistic: dict[str, str]
    confidence: float = stats.CONFIDENCE
    notes: list[str] = field(default_factory=list)
    details: bool = False
    rows: list[Key] = field(default_factory=list)
    cols: list[Key] = field(default_factory=list)
    cells: dict[CellKey, TableCell] = field(default_factory=dict)
    best: set[CellKey] = field(default_factory=set)
    ties: set[CellKey] = field(default_factory=set)
    baseline: dict[str, Any] = field(default_factory=dict)
    comparisons: dict[CellKey, Comparison] = field(default_factory=dict)

    @property
    def columns(self) -> list[tuple[str, Key]]:
        """(metric, column) from left to right."""
        return list(itertools.product(self.metrics, self.cols))

    def point(self, key: CellKey) -> tuple[float, float, float]:
        """The number that stands for a cell, and the ends of its interval (NaN where none)."""
        s, is_median = self.cells[key].summary, self.statistic[key[1]] == "median"
        middle, low, high = (s.median, s.q1, s.q3) if is_median else (s.mean, s.low, s.high)
        return (middle, low, high) if s.n >= FEW else (middle, math.nan, math.nan)

    @override
    def __repr__(self) -> str:
        return resolve_name("fisher_lab.results.export:to_text")(self)  # which imports this module

    def _repr_html_(self) -> str:
        return resolve_name("fisher_lab.results.export:to_html")(self)

    def plot(self, metric: str | None = None, axis: str | None = None) -> Figure | None:
        """A metric against a setting, by default the first ones (:func:`.figures.plot`)."""
        return resolve_name("fisher_lab.results.figures:plot")(self, metric, axis)

    def heading(self, metric: str, col: Key, symbol: bool = False) -> str:
        """The heading of a column, for people; with the metric's symbol where there is room."""
        where = ", ".join(label(value) for value in col)
        words = getattr(labels.metric(metric), "long_heading" if symbol else "heading")
        return f"{words}, {where}" if where else words


def tabulate(
    frame: pd.DataFrame,
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
        frame: from :func:`fisher_lab.results.load`.
        rows: settings; by default all that were swept and have no other place.
        cols: settings.
        metrics: names; by default a choice that suits the runs.
        over: settings that a cell's numbers are taken over; by default the seed.
        where: only runs with these settings.
        baseline: settings of the cell that the others are compared with.
        statistic: ``mean`` with its interval, ``median`` with the quartiles, or ``auto``: median
            for times.
        interval: ``t`` (of times from their logarithms) or ``bootstrap``, which needs ten runs per
            cell.
        confidence: of the intervals, and of all marks of a metric together.
        directions: metric -> which is best, ``min``, ``max`` or ``none``; by default by its name.
        first: metrics that are chosen first where none are named.
        title: of the table; by default the sweeps' names.
        details: show the standard deviation and the number of runs in every cell.

    Raises:
        ResultsError: no run, a setting or metric that the runs do not have, or too few runs for
            the bootstrap.
    """
    _check_choice("statistic", statistic, ("auto", "mean", "median"))
    _check_choice("interval", interval, ("t", "bootstrap"))
    if not 0 < confidence < 1:
        raise ResultsError(f"confidence={confidence:g} is not allowed: between 0 and 1")
    runs = select(frame, where or {})
    if runs.empty:
        raise ResultsError("there are no runs" + (" that match" if where else ""))
    row_names, col_names, across, notes = _place_settings(runs, rows, cols, over)
    names = choose(runs, metrics, first)
    auto = {m: "median" if is_time(m) else "mean" for m in names}
    table = Table(
        title or ", ".join(dict.fromkeys(runs["sweep"])),
        row_names,
        col_names,
        names,
        across,
        auto if statistic == "auto" else dict.fromkeys(names, statistic),
        confidence,
        notes,
        details,
    )
    _fill(table, runs, interval)
    _check_bootstrap(table, interval)
    _mark(table, directions or {})
    if baseline:
        _compare(table, {resolve(runs, name): value for name, value in baseline.items()})
    _add_notes(table, runs)
    return table


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ResultsError(f"{name}={value} is not allowed: one of {', '.join(allowed)}")


def _check_bootstrap(table: Table, interval: str) -> None:
    """Refuse the bootstrap where no cell has enough runs, and note that some have not."""
    if interval != "bootstrap":
        return
    numbers = {cell.summary.n for cell in table.cells.values()}
    few = {n for n in numbers if 1 < n < stats.BOOTSTRAP_RUNS}
    why = (
        f"a bootstrap interval needs {stats.BOOTSTRAP_RUNS} runs per cell: of three runs it would "
        "cover the mean in 73 % of cases instead of 95 %"
    )
    if few and max(numbers) < stats.BOOTSTRAP_RUNS:
        raise ResultsError(f"interval=bootstrap: there are {max(numbers)} runs, and {why}; use t")
    if few:
        table.notes.append(f"cells with fewer runs have no interval: {why}")


def _place_settings(
    runs: pd.DataFrame,
    rows: Sequence[str] | None,
    cols: Sequence[str],
    over: Sequence[str] | None,
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Settings of the rows, of the columns and those averaged over; and what to note of them."""
    if over is None:
        over = [SEED] if SEED in runs.attrs.get("config", []) else []
    columns, across = ([resolve(runs, name) for name in names] for names in (cols, over))
    named = [resolve(runs, name) for name in rows or ()]
    for name in named:
        if name in columns or name in across:
            raise ResultsError(f"{name} cannot stand in two places of a table")
    axes = find_axes(runs)
    placed = {*named, *columns, *across}
    rest = [name for name in axes.values if name not in placed | axes.tied(placed)]
    notes = []
    if rows is not None and rest:
        notes.append(
            f"{', '.join(rest)} {'varies' if len(rest) == 1 else 'vary'} too and became rows; "
            "choose a value with --where, or average over it with --over"
        )
    for axis, followers in axes.followers.items():
        some = ", ".join(followers[:4]) + (", ..." if len(followers) > 4 else "")
        notes.append(f"{some} {'varies' if len(followers) == 1 else 'vary'} with {axis}")
    return [*named, *rest], columns, across, notes


def _note_code(table: Table, runs: pd.DataFrame) -> None:
    """Say so where the numbers of a table were made by several versions of the code."""
    name = f"provenance.{CODE}"
    if name not in runs or name in (*table.row_names, *table.col_names):
        return
    pairs = zip(runs[name], runs["status"], strict=True)
    codes = Counter(code for code, status in pairs if code and status == Status.COMPLETED)
    if len(codes) > 1:
        several = ", ".join(f"{code} ({number} runs)" for code, number in codes.items())
        table.notes.append(
            f"made by several versions of the code: {several}; --rows {CODE} splits by it"
        )


# ---- cells ---------------------------------------------------------------------------------------


def _fill(table: Table, runs: pd.DataFrame, interval: str) -> None:
    """Sort the runs into cells; of runs with the same settings and seed the latest one counts."""
    spelled: dict[str, dict[Any, Any]] = {}
    rows, cols, over = (
        _keys(runs, names, spelled) for names in (table.row_names, table.col_names, table.over)
    )
    keys = list(zip(rows, cols, over, strict=True))
    counted = latest(runs, keys)
    groups: dict[tuple[Key, Key], dict[Key, int]] = {}
    for at in dict.fromkeys(keys):
        row, col, key = at
        groups.setdefault((row, col), {})[key] = counted[at]
    repeated = len(runs) - len(counted)
    if repeated:
        table.notes.append(
            f"{repeated} runs repeat settings and {', '.join(table.over) or 'all'} of others: "
            "the latest completed one of each counts"
        )
    table.rows, table.cols = (_sorted(set(side)) for side in zip(*groups, strict=True))
    expected = _expected(runs, rows, cols, over)
    numbers = runs.loc[:, ["status", "reason", "not_finite", *table.metrics]]
    for row, col in itertools.product(table.rows, table.cols):
        members = groups.get((row, col), {})
        chosen = numbers.iloc[list(members.values())]
        # The seed itself where cells are over nothing else: an index of tuples takes far longer.
        keys = [key[0] if len(key) == 1 else key for key in members]
        for metric in table.metrics:
            method = "log" if interval == "t" and is_time(metric) else interval
            table.cells[row, metric, col] = make_cell(
                chosen, metric, keys, expected[row, col], table.confidence, method
            )


def _expected(
    runs: pd.DataFrame, rows: Sequence[Key], cols: Sequence[Key], over: Sequence[Key]
) -> dict[tuple[Key, Key], int]:
    """How many runs each cell should have: one for each seed of the sweeps that it is part of.

    A cell of no sweep should have one for every seed that there is.
    """
    seeds: dict[str, set[Key]] = {}
    parts: dict[tuple[Key, Key], set[str]] = {}
    for sweep, row, col, key in zip(runs["sweep"], rows, cols, over, strict=True):
        seeds.setdefault(sweep, set()).add(key)
        parts.setdefault((row, col), set()).add(sweep)
    return {
        at: len(set[Key]().union(*(seeds[sweep] for sweep in parts.get(at, seeds))))
        for at in itertools.product(set(rows), set(cols))
    }


def latest(runs: pd.DataFrame, keys: Sequence[Any]) -> dict[Any, int]:
    """Key -> position of the run that counts: of those with one key the latest completed one."""
    age = list(zip(runs["status"] == Status.COMPLETED, runs["finished"].fillna(""), strict=True))
    return {keys[i]: i for i in sorted(range(len(keys)), key=age.__getitem__)}


def _keys(
    runs: pd.DataFrame, names: Sequence[str], spelled: dict[str, dict[Any, Any]]
) -> list[Key]:
    """The values of some settings for each run; one spelling for values that mean the same."""
    columns = []
    for name in names:
        known = spelled.setdefault(name, {})
        columns.append([known.setdefault(key_of(v), _plain(v)) for v in runs[name]])
    return list(zip(*columns, strict=True)) if columns else [()] * len(runs)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value


def _sorted(keys: Iterable[Key]) -> list[Key]:
    keys = list(keys)
    columns = [levels(values) for values in zip(*keys, strict=True)]
    order = [{key_of(v): i for i, v in enumerate(values)} for values in columns]
    return sorted(keys, key=lambda key: [at[key_of(v)] for at, v in zip(order, key, strict=True)])


# ---- marks ---------------------------------------------------------------------------------------


BETTER = {"min": labels.LOWER, "max": labels.HIGHER, "none": None}
"""What ``directions`` says -> which values are better, as the catalogue of names has it."""


def _mark(table: Table, directions: Mapping[str, str]) -> None:
    """Mark the best cell of each metric, and those that do not differ significantly from it."""
    for metric, wanted in directions.items():
        _check_choice(f"best {metric}", wanted, tuple(BETTER))
    for metric in table.metrics:
        known = labels.metric(metric).better
        better = BETTER[directions[metric]] if metric in directions else known
        keys = [k for k in table.cells if k[1] == metric and table.cells[k].complete]
        if better is None or len(keys) < 2:
            continue
        points = {k: labels.lower_is_better(table.point(k)[0], better) for k in keys}
        top = min(points.values())
        best = next(k for k in keys if math.isclose(points[k], top, rel_tol=1e-12))
        alike = {k for k in keys if _looks_like(table, k, best)}
        if len(alike) == len(keys):
            continue  # nothing to choose between
        table.best.add(best)
        others = [k for k in keys if k not in alike]
        test = functools.partial(_tied, table, better, best)
        alike |= stats.contenders(others, len(keys), test, table.confidence)
        table.ties |= alike - {best}


def _tied(table: Table, better: str | float, best: CellKey, key: CellKey, level: float) -> bool:
    """Whether a cell does not differ significantly from the best."""
    one, other = table.cells[key].values, table.cells[best].values
    if not isinstance(better, str):
        one, other = (one - better).abs(), (other - better).abs()
    return stats.overlap(one, other, level, table.statistic[key[1]])


def _looks_like(table: Table, key: CellKey, best: CellKey) -> bool:
    """Whether two cells show the same number, or differ by a negligible fraction of it."""
    a, b = table.point(key)[0], table.point(best)[0]
    if abs(a - b) <= NEGLIGIBLE * max(abs(a), abs(b)):
        return True
    one, other = (table.cells[k].rounded(table.statistic[k[1]]) for k in (key, best))
    return (float(one.value), one.exponent) == (float(other.value), other.exponent)


def _compare(table: Table, baseline: Mapping[str, Any]) -> None:
    """Every cell against the one that differs from it in the baseline's settings only."""
    names = [*table.row_names, *table.col_names]
    spelled: dict[str, Any] = {}
    for name, value in baseline.items():
        if name not in names:
            raise ResultsError(f"baseline: {name} is neither a row nor a column of the table")
        place = names.index(name)
        there = levels((*row, *col)[place] for row in table.rows for col in table.cols)
        spelled[name] = next((v for v in there if same(value, v)), there)
        if spelled[name] is there:
            words = ", ".join(map(label, there))
            raise ResultsError(f"baseline: no run has {name}={label(value)}; there are {words}")
    table.baseline = spelled
    for row, metric, col in table.cells:
        base = (
            tuple(spelled.get(n, v) for n, v in zip(table.row_names, row, strict=True)),
            metric,
            tuple(spelled.get(n, v) for n, v in zip(table.col_names, col, strict=True)),
        )
        key, difference = (row, metric, col), None
        if base != key and base in table.cells:
            one, other = table.cells[key].values, table.cells[base].values
            both = one.index.intersection(other.index)
            if len(both):
                compare = stats.paired_ratio if is_time(metric) else stats.paired
                difference = compare(one[both], other[both], table.confidence)
        table.comparisons[key] = Comparison(difference, is_baseline=base == key)
    tested = {k: c.difference for k, c in table.comparisons.items() if c.difference is not None}
    corrected = stats.holm([difference.p for difference in tested.values()])
    for (key, difference), p in zip(tested.items(), corrected, strict=True):
        table.comparisons[key] = Comparison(difference, p)


# ---- notes ---------------------------------------------------------------------------------------


def _add_notes(table: Table, runs: pd.DataFrame) -> None:
    numbers = {cell.summary.n for cell in table.cells.values()} - {0}
    if numbers == {1}:
        table.notes.insert(0, "one run per cell: no interval can be given")
    elif numbers:
        count = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else str(max(numbers))
        shown = []
        means = [metric for metric, statistic in table.statistic.items() if statistic == "mean"]
        logs = {key[1] for key, cell in table.cells.items() if cell.method == "log"}
        if not logs.issuperset(means):
            shown.append(f"mean ± half the {100 * table.confidence:g}% interval")
        if logs.intersection(means):
            shown.append(f"mean [{100 * table.confidence:g}% interval, from logarithms] of times")
        if "median" in table.statistic.values():
            shown.append("median [quartiles] of times")
        if table.details:
            shown.append("sd is the standard deviation")
        if 2 in numbers:
            shown = [*(shown if max(numbers) >= FEW else []), "of two runs both numbers"]
        over = ", ".join(table.over) or "nothing"
        table.notes.insert(0, f"{'; '.join(shown)}; over {over}, n = {count}")
    lost = sum(not cell.complete for cell in table.cells.values())
    if lost:
        table.notes.append(
            f"{lost} of {len(table.cells)} cells lack runs; missing runs are shown in the cell"
        )
    if table.best:
        tied = (
            f"; ~ not significantly different from the best ({100 * table.confidence:g}% for all "
            "cells of a metric together)"
            if table.ties
            else ""
        )
        single = " (single runs)" if numbers == {1} else ""
        table.notes.append(f"* best of its metric{tied}{single}")
    if table.baseline:
        compared = [c.difference for c in table.comparisons.values()]
        ratios = any(d is not None and d.as_ratio for d in compared)
        cell = ", ".join(f"{n}={label(v)}" for n, v in table.baseline.items())
        table.notes.append(
            f"differences to {cell}: mean ± half the {100 * table.confidence:g}% interval, "
            "paired t test, Holm over the table; d is Cohen's d_z"
            + ("; of times the ratio [interval], from logarithms" if ratios else "")
        )
    _note_code(table, runs)

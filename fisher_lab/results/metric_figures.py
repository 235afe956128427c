"""Figures of metrics: against a swept setting, time against memory, and several ranks.

Every point is a cell of a table; a cell without a number has none, and the figure says how many.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.results import plotting
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import Frame, known, label, levels, meaning

MOST_SERIES = 7
TIME, MEMORY = "kfac/total_s", "kfac/peak_mb"
WORLD_SIZE = "dist/world_size"
SCALING = (TIME, "dist/comm_s_max", "dist/sent_bytes_max", MEMORY)
RANK_AXES = ("distributed.nproc", "distributed.nodes", "kfac.reduce")


def complete(table: Table, frame: Frame) -> Table:
    """The table with every metric that a figure of its runs plots, those of the table first.

    Args:
        table: of a sweep.
        frame: the runs that it was made of.
    """
    there = known(frame)
    plotted = [TIME, MEMORY] if {TIME, MEMORY} <= set(there) else []
    if _rank_axis(table, there) is not None:
        plotted += [name for name in SCALING if name in there]
    more = [name for name in dict.fromkeys(plotted) if name not in table.metrics]
    if not more:
        return table
    own = tabulate(
        frame, rows=table.row_names, cols=table.col_names, over=table.over, metrics=more,
        confidence=table.confidence,
    )  # fmt: skip
    return dataclasses.replace(
        table,
        metrics=[*table.metrics, *more],
        cells={**table.cells, **own.cells},
        statistic={**table.statistic, **own.statistic},
        best=table.best | own.best,
        ties=table.ties | own.ties,
    )


def _rank_axis(table: Table, there: Sequence[str]) -> str | None:
    """The setting that the figure of ranks is against; None where there is no such figure."""
    swept = [*table.row_names, *table.col_names]
    axis = next((name for name in RANK_AXES if name in swept), None)
    return axis if WORLD_SIZE in there else None


def short(name: str, value: str) -> str:
    """A setting and its value as a legend says it."""
    return f"{name.rpartition('.')[2]}={value}"


@plotting.styled
def metric_figure(table: Table, metric: str, axis: str) -> Figure | None:
    """A metric against one setting, a line for each combination of the others, with intervals.

    Args:
        table: with the metric, and the setting among its rows or columns.
        metric: its name.
        axis: the setting.

    Returns:
        The figure; None where fewer than two values of the setting have numbers, or all numbers
        are the same.
    """
    series = _series(table, metric, axis)
    if not _varies(series):
        return None
    figure, (axes,) = plotting.new_figure()
    figure.set_label(f"{metric} against {axis}")
    drawn = _draw(axes, table, metric, axis, series)
    plotting.legend(figure, axes, drawn)
    return figure


Series = dict[str, list[tuple[float, float, float, float]]]
"""Words for the other settings -> place, value and the ends of its interval; empty: no number."""


def _series(table: Table, metric: str, axis: str) -> Series:
    names = [*table.row_names, *table.col_names]
    at = names.index(axis)
    others = names[:at] + names[at + 1 :]
    values, places, _ = _places(table, axis)
    where = {label(v): x for v, x in zip(values, places, strict=True)}
    series: Series = {}
    for row, col in itertools.product(table.rows, table.cols):
        y, low, high = table.point((row, metric, col))
        key = (*row, *col)
        other = map(label, key[:at] + key[at + 1 :])
        words = ", ".join(short(n, v) for n, v in zip(others, other, strict=True))
        points = series.setdefault(words, [])
        if math.isfinite(y):
            points.append((where[label(key[at])], y, low, high))
    return series


def _places(table: Table, axis: str) -> tuple[list[Any], list[float], bool]:
    """The values of a setting, where they stand, and whether their axis is logarithmic."""
    at = [*table.row_names, *table.col_names].index(axis)
    values = levels((*row, *col)[at] for row in table.rows for col in table.cols)
    return values, *plotting.positions(values)


def _varies(series: Series) -> bool:
    drawn = [point for points in series.values() for point in points]
    return len({x for x, *_ in drawn}) > 1 and len({y for _, y, *_ in drawn}) > 1


def _draw(axes: Axes, table: Table, metric: str, axis: str, series: Series) -> int:
    """Returns the number of lines; a line looks the same wherever the series are the same."""
    values, places, log = _places(table, axis)
    connect = all(isinstance(meaning(v), float | None) for v in values)
    chosen = list(itertools.islice(series.items(), MOST_SERIES))
    for i, (words, points) in enumerate(chosen):
        if points:
            _plot_series(axes, sorted(points), words, i, connect)
    plotting.set_ticks(axes, values, places, log)
    if plotting.spans_decades([y for points in series.values() for _, y, *_ in points]):
        axes.set_yscale("log")
    axes.set(xlabel=axis, ylabel=metric)
    _explain(axes, table, metric, len(series))
    return sum(bool(points) for _, points in chosen)


def _plot_series(
    axes: Axes, points: list[tuple[float, float, float, float]], words: str, i: int, connect: bool
) -> None:
    x, y, low, high = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    # Lines that lie on one another are all seen: the first ones are the widest.
    thinner = {"markersize": max(6.5 - 0.7 * i, 3.0), "linewidth": max(2.6 - 0.4 * i, 0.9)}
    style: dict[str, Any] = {**plotting.look(i), **thinner}
    if not connect:
        style["linestyle"] = "none"
        x = x + 0.07 * i  # categories have room beside them
    # A cell of one run has no interval, and its bar no length.
    spread = np.nan_to_num(np.vstack([y - low, high - y]), nan=0.0).clip(min=0)
    axes.errorbar(x, y, yerr=spread, capsize=2, elinewidth=0.8, label=words, **style)


def _explain(axes: Axes, table: Table, metric: str, count: int) -> None:
    cells = [table.cells[key] for key in table.cells if key[1] == metric]
    empty = sum(cell.summary.n == 0 for cell in cells)
    if max(cell.summary.n for cell in cells) < 2:
        words = "single runs"
    elif table.statistic[metric] == "median":
        words = "median and quartiles"
    else:
        words = f"mean and {table.confidence:.0%} interval"
    notes = [words]
    if empty:
        notes.append(f"{empty} of {len(cells)} cells without a number")
    if count > MOST_SERIES:
        notes.append(f"{MOST_SERIES} of {count} lines")
    axes.set_title("; ".join(notes), fontsize=6.5, color="#444444")


@plotting.styled
def scaling_figure(table: Table, frame: Frame) -> Figure | None:
    """Time, its share of communication, bytes sent and memory on several ranks, a panel each.

    Against the number of ranks or nodes where it was swept, else against the way in which ranks
    are joined. Bytes and memory are those of the rank that has most.

    Args:
        table: of the sweep; its rows and columns are the cells.
        frame: its runs.

    Returns:
        The figure; None where no run had ranks that talk, neither setting was swept, or nothing
        varies.
    """
    there = known(frame)
    metrics = [name for name in SCALING if name in there]
    axis = _rank_axis(table, there)
    if axis is None or not metrics:
        return None
    cells = complete(table, frame)
    series = {metric: _series(cells, metric, axis) for metric in metrics}
    shown = [metric for metric in metrics if _varies(series[metric])]
    if not shown:
        return None
    width = min(0.8 * len(shown), 2.1) * plotting.WIDTH  # of a page at most
    figure, panels = plotting.new_figure(width, panels=len(shown))
    figure.set_label(f"Time, bytes and memory against {axis}")
    drawn = [
        _draw(axes, cells, metric, axis, series[metric])
        for axes, metric in zip(panels, shown, strict=True)
    ]
    plotting.legend(figure, panels[drawn.index(max(drawn))], max(drawn))
    return figure


@plotting.styled
def trade_figure(table: Table, frame: Frame) -> Figure | None:
    """Time against memory growth, a point a cell: quartiles of time, interval of memory.

    Args:
        table: of the sweep; its rows and columns are the cells.
        frame: its runs.
    """
    if not {TIME, MEMORY} <= set(known(frame)):
        return None
    both = complete(table, frame)
    keys = [(row, col) for row in both.rows for col in both.cols]
    if not 1 < len(keys) <= 3 * MOST_SERIES:
        return None
    figure, (axes,) = plotting.new_figure()
    names = [*both.row_names, *both.col_names]
    for i, (row, col) in enumerate(keys):
        x, y = both.point((row, TIME, col)), both.point((row, MEMORY, col))
        if not (math.isfinite(x[0]) and math.isfinite(y[0])):
            continue
        words = ", ".join(short(n, label(v)) for n, v in zip(names, (*row, *col), strict=True))
        style: dict[str, Any] = {**plotting.look(i), "linestyle": "none"}
        axes.errorbar(
            [x[0]], [y[0]], xerr=_ends(x), yerr=_ends(y), capsize=2, elinewidth=0.8,
            label=words, **style,
        )  # fmt: skip
    axes.set(xlabel=TIME, ylabel=f"{MEMORY} (MiB)")
    figure.set_label("Time and memory")
    plotting.legend(figure, axes, len(keys))
    return figure


def _ends(point: tuple[float, float, float]) -> np.ndarray:
    value, low, high = point
    return np.nan_to_num(np.array([[value - low], [high - value]]), nan=0.0).clip(min=0)

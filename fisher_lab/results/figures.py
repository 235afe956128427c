"""The figures of a sweep, drawn from the cells of its table: a plotted number is the table's.

Here are the list of figures and those of metrics: against a swept setting, time against memory,
and cost against the number of ranks. A cell without a number has no point,
and the figure says how many there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fisher_lab.results import figure_style as style
from fisher_lab.results import labels
from fisher_lab.results.curve_figures import block_figure, decay_figure, density_figure, line_figure
from fisher_lab.results.figure_style import COLOURS, MARKS, MOST_PANELS, MOST_SERIES
from fisher_lab.results.layer_figures import layer_figure
from fisher_lab.results.loading import load_layers, load_table
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import ResultsError, label, levels, metric_names, parse_value
from fisher_lab.runs.status import Status

CURVE_FILE, DENSITY_FILE, SPECTRUM_FILE = "curve.csv", "density.csv", "spectral.csv"
TIME, MEMORY = "kfac/total_s", "kfac/peak_mb"
WORLD_SIZE = "dist/world_size"
SCALING = (TIME, "dist/comm_s_max", "dist/sent_bytes_max", MEMORY)
TRADE, CLIPPED = "time-and-memory", "layers-clipped"
RANK_AXES = ("distributed.nproc", "distributed.nodes", "kfac.reduce")

Plans = dict[str, Callable[[], Figure | None]]
"""Name of a file -> what draws the figure (None where there is nothing to draw)."""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that was written: the files, its caption, and its width as a part of a page's."""

    files: list[Path]
    words: str
    width: float


@dataclass
class Drawn:
    """The figures that were written, and those that could not be drawn, in words."""

    figures: list[DrawnFigure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """All files, as PDF and PNG."""
        return [file for figure in self.figures for file in figure.files]


def draw(table: Table, frame: pd.DataFrame, directory: Path, plans: Plans | None = None) -> Drawn:
    """Draw everything that the runs of a table have numbers for, as PDF and PNG.

    Args:
        table: of the runs.
        frame: of runs.
        directory: made where it is missing.
        plans: what is drawn; by default all figures.
    """
    drawn = Drawn()
    for name, figure in make_figures(figure_makers(table, frame) if plans is None else plans):
        if isinstance(figure, str):
            drawn.problems.append(figure)
            continue
        files = style.save(figure, directory / name)
        width = min(figure.get_figwidth() / style.PAGE, 1.0)
        drawn.figures.append(DrawnFigure(files, str(figure.get_label()), width))
    return drawn


def make_figures(plans: Plans) -> Iterator[tuple[str, Figure | str]]:
    """The file's name and the figure, or why it cannot be drawn, of every figure."""
    for name, make in plans.items():
        try:
            figure = make()
        except (ResultsError, OSError, ValueError, KeyError) as error:
            yield name, f"figure {name}: {error}"
            continue
        if figure is not None:
            yield name, figure


def figure_makers(table: Table, frame: pd.DataFrame, *, joint: bool = False) -> Plans:
    """The figures of a sweep.

    Args:
        table: of the runs.
        frame: of runs.
        joint: as a page shows them: all metrics against the setting of most values in one figure,
            and not each metric against each setting.
    """
    paths = list(frame.loc[frame["status"] == Status.COMPLETED, "directory"])
    cells = cell_names(table, frame)
    layers = functools.cache(lambda: load_layers(paths))
    whole = functools.cache(lambda: complete(table, frame))
    found = joint_makers(table) if joint else _single(table, (*table.row_names, *table.col_names))
    found |= {
        TRADE: lambda: trade_figure(whole()),
        "distributed-scaling": lambda: panels_figure(
            whole(), SCALING, rank_axis(table, metric_names(frame))
        ),
        CLIPPED: lambda: layer_figure(layers(), cells, "clipped"),
        "layers-kappa": lambda: layer_figure(layers(), cells, "kappa"),
        "learning-curves": lambda: line_figure(
            load_table(paths, CURVE_FILE), cells, "step", "heldout_loss", file=CURVE_FILE
        ),
        "spectral-density": lambda: density_figure(load_table(paths, DENSITY_FILE), cells),
        "spectra-effective-rank": lambda: block_figure(
            load_table(paths, SPECTRUM_FILE), cells, "effective_rank"
        ),
    }
    if "spectral/bytes" in metric_names(frame):
        found["spectra-decay"] = lambda: decay_figure(paths, cells)
    return found


def _single(table: Table, axes: Iterable[str]) -> Plans:
    return {
        style.file_name(f"{metric}-by-{axis}"): functools.partial(
            metric_figure, table, metric, axis
        )
        for axis in axes
        for metric in table.metrics
    }


def joint_makers(table: Table) -> Plans:
    """All metrics in one figure, or one figure each where there are more lines than colours."""
    axis = main_axis(table)
    if axis is None:
        return {}
    metrics = [m for m in table.metrics if _varies(_series(table, m, axis))][: MOST_PANELS + 1]
    if metrics and max(len(metrics), len(_series(table, metrics[0], axis))) > MOST_SERIES:
        return _single(table, [axis])
    name = style.file_name(f"metrics-by-{axis}")
    return {name: functools.partial(panels_figure, table, metrics, axis)}


def main_axis(table: Table) -> str | None:
    """The setting that has most values, numbers before others; None where none is swept."""
    names = [*table.row_names, *table.col_names]
    return max(names, key=lambda name: (is_scale(table, name), len(_positions(table, name)[0])),
               default=None)  # fmt: skip


def is_scale(table: Table, axis: str) -> bool:
    """Whether a setting has three numbers or more, so that a figure against it shows a course."""
    return sum(isinstance(parse_value(v), float) for v in _positions(table, axis)[0]) > 2


def cell_names(table: Table, frame: pd.DataFrame) -> dict[str, str]:
    """Run directory -> the words for its cell, in the order of the table."""
    names = [*table.row_names, *table.col_names]
    keys = (tuple(map(label, (*row, *col))) for row in table.rows for col in table.cols)
    order = {key: i for i, key in enumerate(keys)}
    found: dict[str, tuple[str, ...]] = {}
    for directory, *values in frame.loc[:, ["directory", *names]].itertuples(index=False):
        key = tuple(map(label, values))
        if key in order:
            found[directory] = key
    ordered = sorted(found.items(), key=lambda item: order[item[1]])
    return {d: settings_words(names, key) or "all runs" for d, key in ordered}


def settings_words(names: Sequence[str], values: Sequence[Any]) -> str:
    """Some settings as a legend shows them: ``damping=1e-4, policy=auto``."""
    pairs = zip(names, values, strict=True)
    return ", ".join(f"{labels.setting(name).short}={label(value)}" for name, value in pairs)


def complete(table: Table, frame: pd.DataFrame) -> Table:
    """The table of some runs with every metric that a figure plots, its own metrics first."""
    there = metric_names(frame)
    plotted = [TIME, MEMORY] if {TIME, MEMORY} <= set(there) else []
    if rank_axis(table, there) is not None:
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


def rank_axis(table: Table, there: Sequence[str]) -> str | None:
    """The setting that the figure of ranks is drawn against; None where there is no such figure."""
    swept = [*table.row_names, *table.col_names]
    axis = next((name for name in RANK_AXES if name in swept), None)
    return axis if WORLD_SIZE in there else None


# ---- metrics against a setting -------------------------------------------------------------------

Point = tuple[float, float, float, float]
"""Position, value and the ends of its interval."""

Series = dict[str, list[Point]]
"""Words for the other settings -> the points that have a number."""


def plot(table: Table, metric: str | None = None, axis: str | None = None) -> Figure | None:
    """A metric against a swept setting; None where nothing varies.

    Args:
        table: of cells.
        metric: of the table; by default its first one.
        axis: a row or column of the table; by default its first one.

    Raises:
        ResultsError: the table has no such metric, or no such setting.
    """
    names = [*table.row_names, *table.col_names]
    chosen = (metric or next(iter(table.metrics), "")), (axis or next(iter(names), ""))
    for name, there in zip(chosen, (table.metrics, names), strict=True):
        if name not in there:
            raise ResultsError(f"{name}: the table has {', '.join(there) or 'none'}")
    return metric_figure(table, *chosen)


@style.styled
def metric_figure(table: Table, metric: str, axis: str) -> Figure | None:
    """A metric against one setting, one line for each combination of the others, with intervals.

    Lines that are equal up to rounding are one. Where more are left than there are colours, each
    value of another setting has a panel of its own. The table has the metric, and the setting
    among its rows or columns. None where fewer than two values of the setting have numbers, or the
    numbers differ by rounding alone.
    """
    (series,) = collapse(_series(table, metric, axis))
    if not _varies(series):
        return None
    panels = {"": series}
    if len(series) > MOST_SERIES:
        panels = _by_another(table, metric, axis) or panels
    columns = min(len(panels), 3)
    width = style.WIDTH if columns == 1 else 2.1 * style.WIDTH
    figure, all_axes = style.new_figure(width, panels=len(panels), columns=columns)
    figure.set_label(_seen(table, metric, axis, series))
    lines = [
        _draw(axes, table, metric, axis, own, title)
        for axes, (title, own) in zip(all_axes, panels.items(), strict=True)
    ]
    style.same_scale(all_axes)
    style.legend(figure, all_axes[lines.index(max(lines))], max(lines))
    return figure


def _by_another(table: Table, metric: str, axis: str) -> dict[str, Series]:
    """Value of another setting -> its lines, for the setting that leaves few panels of few lines.

    Empty where there is none: no panel may have more lines than there are colours.
    """
    names = [*table.row_names, *table.col_names]
    found = []
    for name in names:
        if name == axis:
            continue
        values = _positions(table, name)[0]
        words = {settings_words([name], [value]): value for value in values}
        panels = {
            title: collapse(_series(table, metric, axis, {name: value}))[0]
            for title, value in words.items()
        }
        panels = {title: own for title, own in panels.items() if any(own.values())}
        if all(len(own) <= MOST_SERIES for own in panels.values()) and len(panels) <= MOST_PANELS:
            found.append(panels)
    return min(found, key=len, default={})


def _seen(table: Table, metric: str, axis: str, series: Series) -> str:
    """What the figure shows, and its lowest and highest number, in words."""
    points = [(y, x, words) for words, line in series.items() for x, y, *_ in line]
    values, positions, _ = _positions(table, axis)
    at = {x: label(value) for value, x in zip(values, positions, strict=True)}
    entry, setting = labels.metric(metric), labels.setting(axis)
    ends = " to ".join(
        f"{entry.text(y)} at {at[x]}{f' ({words})' if words else ''}"
        for y, x, words in (min(points), max(points))
    )
    unit = f" {entry.unit}" if entry.unit and entry.format != "mib" else ""
    title = f"{entry.label[:1].upper()}{entry.label[1:]} against the {setting.label}"
    return f"{title}: from {ends}{unit and f', in{unit}'}"


@style.styled
def panels_figure(table: Table, metrics: Sequence[str], axis: str | None) -> Figure | None:
    """Several metrics against one setting, a panel each, with one legend; as wide as a page.

    Bytes and memory of several ranks are those of the rank that has most.

    Args:
        table: with those of these metrics that the runs have.
        metrics: names; one that does not vary has no panel.
        axis: a setting of the table; None: there is no figure, and neither is there one where
            nothing varies, nor of more lines than there are colours.
    """
    found = {m: _series(table, m, axis) for m in metrics if m in table.metrics} if axis else {}
    found = {metric: points for metric, points in found.items() if _varies(points)}
    if axis is None or not found:
        return None
    shown = dict(zip(found, collapse(*found.values()), strict=True))
    many = max(map(len, shown.values()))
    if many > MOST_SERIES or len(shown) > MOST_PANELS:
        return None
    columns = len(shown) if len(shown) < 5 else 3
    width = min(1.1 * columns * style.WIDTH, style.PAGE) if columns < 3 else style.PAGE
    figure, panels = style.new_figure(width, 1.75, panels=len(shown), columns=columns)
    texts, notes = [], []
    for i, (axes, (metric, points)) in enumerate(zip(panels, shown.items(), strict=True)):
        letter = f"({'abcdefghi'[i]})" if len(shown) > 1 else ""
        _draw(axes, table, metric, axis, points, letter)
        entry = labels.metric(metric)
        words = f"{entry.short} ({entry.unit})" if entry.unit else entry.short
        style.name_axes(axes, labels.setting(axis).with_symbol, words, 24 if columns < 4 else 20)
        texts.append(f"{letter} {_seen(table, metric, axis, points)}".strip())
        notes.append(_note(table, metric, many))
    if len(set(notes)) == 1:
        texts.append(f"{notes[0][:1].upper()}{notes[0][1:]}")
    else:
        texts = [f"{text}; {words}" for text, words in zip(texts, notes, strict=True)]
    style.legend(figure, panels[0], many)
    figure.set_label(". ".join(texts))
    return figure


def _series(table: Table, metric: str, axis: str, fixed: Mapping[str, Any] | None = None) -> Series:
    """The points of every combination of the other settings, or of those with a fixed value."""
    names = [*table.row_names, *table.col_names]
    fixed = fixed or {}
    others = [i for i, name in enumerate(names) if name != axis and name not in fixed]
    at = names.index(axis)
    values, positions, _ = _positions(table, axis)
    position = {label(v): x for v, x in zip(values, positions, strict=True)}
    series: Series = {}
    for row, col in itertools.product(table.rows, table.cols):
        key = (*row, *col)
        if any(label(key[names.index(name)]) != label(value) for name, value in fixed.items()):
            continue
        y, low, high = table.point((row, metric, col))
        words = settings_words([names[i] for i in others], [key[i] for i in others])
        points = series.setdefault(words, [])
        if math.isfinite(y):
            points.append((position[label(key[at])], y, low, high))
    return series


def collapse(*panels: Series) -> list[Series]:
    """The lines of panels, with those that are equal in all of them made one."""

    def apart(one: str, other: str) -> float:
        return max(_apart(series[one], series[other]) for series in panels)

    names = style.merge(list(panels[0]), apart)
    return [{words: series[name] for words, name in names.items()} for series in panels]


def _apart(left: Sequence[Point], right: Sequence[Point]) -> float:
    """The largest difference of two lines by their size; infinite at other positions."""
    if not left and not right:
        return 0.0
    a, b = (np.array(sorted(points), dtype=float) for points in (left, right))
    if a.shape != b.shape or not np.array_equal(a[:, 0], b[:, 0]):
        return math.inf
    size = max(float(np.abs(a[:, 1]).max()), float(np.abs(b[:, 1]).max()))
    differences = np.abs(a[:, 1:] - b[:, 1:])
    if bool((np.isnan(a[:, 1:]) != np.isnan(b[:, 1:])).any()):
        return math.inf
    return float(np.nan_to_num(differences).max()) / size if size else 0.0


def _positions(table: Table, axis: str) -> tuple[list[Any], list[float], bool]:
    """The values of a setting, their positions, and whether the axis is logarithmic."""
    at = [*table.row_names, *table.col_names].index(axis)
    values = levels((*row, *col)[at] for row in table.rows for col in table.cols)
    return values, *style.positions(values)


def _varies(series: Series) -> bool:
    """Whether there are two positions at least, and numbers that differ by more than rounding."""
    points = [point for line in series.values() for point in line]
    if len({x for x, *_ in points}) < 2:
        return False
    values = [y for _, y, *_ in points]
    return max(values) - min(values) > style.ROUNDING * max(map(abs, values))


def _draw(axes: Axes, table: Table, metric: str, axis: str, series: Series, title: str = "") -> int:
    """Draw the lines of a panel and return their number."""
    values, positions, log = _positions(table, axis)
    connect = all(isinstance(parse_value(v), float | None) for v in values)
    lines = list(itertools.islice(series.items(), MOST_SERIES))
    for i, (words, points) in enumerate(lines):
        if not points:
            continue
        x, y, low, high = np.array(sorted(points), dtype=float).T
        # Lines that lie on one another are all seen: the first ones are the widest.
        thinner = {"markersize": max(6.5 - 0.7 * i, 3.0), "linewidth": max(2.6 - 0.4 * i, 0.9)}
        look: dict[str, Any] = {**style.look(i), **thinner}
        if not connect:
            look["linestyle"] = "none"
            x = x + 0.07 * i  # categories have room beside them
        axes.errorbar(
            x, y, yerr=_ends(y, low, high), capsize=2, elinewidth=0.8, label=words, **look
        )
    style.set_ticks(axes, values, positions, log)
    style.scale(axes, [y for points in series.values() for _, y, *_ in points])
    axes.set_label(metric)  # for programs
    style.name_axes(axes, labels.setting(axis).with_symbol, labels.metric(metric).with_unit)
    style.note(axes, title or _note(table, metric, len(series)))
    return sum(bool(points) for _, points in lines)


def _note(table: Table, metric: str, lines: int) -> str:
    cells = [cell for key, cell in table.cells.items() if key[1] == metric]
    empty = sum(cell.summary.n == 0 for cell in cells)
    if max(cell.summary.n for cell in cells) < 2:
        notes = ["single runs"]
    elif table.statistic[metric] == "median":
        notes = ["median and quartiles"]
    else:
        notes = [f"mean and {table.confidence:.0%} interval"]
    if empty:
        notes.append(f"{empty} of {len(cells)} cells without a number")
    if lines > MOST_SERIES:
        notes.append(f"{MOST_SERIES} of {lines} lines")
    return "; ".join(notes)


# ---- time against memory -------------------------------------------------------------------------


@style.styled
def trade_figure(table: Table) -> Figure | None:
    """Time against memory growth, one point per cell: quartiles of time, interval of memory."""
    if not {TIME, MEMORY} <= set(table.metrics):
        return None
    keys = list(itertools.product(table.rows, table.cols))
    firsts = list(dict.fromkeys((*row, *col)[:1] for row, col in keys))
    rests = list(dict.fromkeys((*row, *col)[1:] for row, col in keys))
    if len(keys) < 2 or max(len(firsts), len(rests)) > MOST_SERIES:
        return None
    figure, (axes,) = style.new_figure(height=2.1)
    names, seen = [*table.row_names, *table.col_names], []
    for row, col in keys:
        x, y = table.point((row, TIME, col)), table.point((row, MEMORY, col))
        if not (math.isfinite(x[0]) and math.isfinite(y[0])):
            continue
        seen.append(x[0])
        # The colour is the value of the first setting, and the mark those of the others.
        key = (*row, *col)
        look: dict[str, Any] = {"color": COLOURS[firsts.index(key[:1])], "linestyle": "none"}
        look["marker"] = MARKS[rests.index(key[1:])]
        axes.errorbar(
            [x[0]], [y[0]], xerr=_ends(*x), yerr=_ends(*y), capsize=2, elinewidth=0.8,
            label=settings_words(names, (*row, *col)), **look,
        )  # fmt: skip
    if len(seen) < 2:
        return None
    style.name_axes(axes, labels.metric(TIME).with_unit, labels.metric(MEMORY).with_unit, 24)
    kind = "median and quartiles of time" if table.statistic[TIME] == "median" else "means"
    ends = " to ".join(labels.metric(TIME).text(x) for x in (min(seen), max(seen)))
    figure.set_label(
        f"Time of K-FAC against the growth of the peak memory, one mark for each setting: from "
        f"{ends} s; {kind}"
    )
    style.legend(figure, axes, len(keys))
    return figure


def _ends(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """The lengths of error bars; a cell of one run has no interval, and its bar no length."""
    below, above = np.subtract(value, low), np.subtract(high, value)
    return np.nan_to_num(np.vstack([below, above]), nan=0.0).clip(min=0)

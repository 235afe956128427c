"""The figures of a sweep, drawn from the cells of its table: a plotted number is the table's.

Here are the list of figures and those of metrics: against a swept setting, time against memory,
cost against the number of ranks, and heat maps over layers. A cell without a number has no point,
and the figure says how many there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fisher_lab.results import figure_style as style
from fisher_lab.results.curve_figures import block_figure, decay_makers, density_figure, line_figure
from fisher_lab.results.figure_style import MOST_SERIES
from fisher_lab.results.loading import load_layers, load_table
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import ResultsError, column, label, levels, metric_names, parse_value
from fisher_lab.runs.status import Status

MOST_COLUMNS = 30
CURVE_FILE, DENSITY_FILE, SPECTRUM_FILE = "curve.csv", "density.csv", "spectral.csv"
TIME, MEMORY = "kfac/total_s", "kfac/peak_mb"
WORLD_SIZE = "dist/world_size"
SCALING = (TIME, "dist/comm_s_max", "dist/sent_bytes_max", MEMORY)
RANK_AXES = ("distributed.nproc", "distributed.nodes", "kfac.reduce")

Plans = dict[str, Callable[[], Figure | None]]
"""Name of a file -> what draws the figure (None where there is nothing to draw)."""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that was written: the files, its caption, and whether it is as wide as a page."""

    files: list[Path]
    words: str
    wide: bool


@dataclass
class Drawn:
    """The figures that were written, and those that could not be drawn, in words."""

    figures: list[DrawnFigure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """All files, as PDF and PNG."""
        return [file for figure in self.figures for file in figure.files]


def draw(table: Table, frame: pd.DataFrame, directory: Path) -> Drawn:
    """Draw everything that the runs of a table have numbers for, as PDF and PNG.

    The directory is made where it is missing.
    """
    drawn = Drawn()
    for name, figure in make_figures(table, frame):
        if isinstance(figure, str):
            drawn.problems.append(figure)
            continue
        files = style.save(figure, directory / name)
        drawn.figures.append(DrawnFigure(files, str(figure.get_label()), style.is_wide(figure)))
    return drawn


def make_figures(table: Table, frame: pd.DataFrame) -> Iterator[tuple[str, Figure | str]]:
    """The file's name and the figure, or why it cannot be drawn, of every figure of a sweep."""
    for name, make in figure_makers(table, frame).items():
        try:
            figure = make()
        except (ResultsError, OSError, ValueError, KeyError) as error:
            yield name, f"figure {name}: {error}"
            continue
        if figure is not None:
            yield name, figure


def figure_makers(table: Table, frame: pd.DataFrame) -> Plans:
    """The figures of a sweep."""
    paths = list(frame.loc[frame["status"] == Status.COMPLETED, "directory"])
    cells = cell_names(table, frame)
    layers = functools.cache(lambda: load_layers(paths))
    whole = functools.cache(lambda: complete(table, frame))
    found: Plans = {
        style.file_name(f"{metric}-by-{axis}"): functools.partial(
            metric_figure, table, metric, axis
        )
        for axis in (*table.row_names, *table.col_names)
        for metric in table.metrics
    }
    found |= {
        "time-and-memory": lambda: trade_figure(whole()),
        "distributed-scaling": lambda: scaling_figure(
            whole(), _rank_axis(table, metric_names(frame))
        ),
        "layers-clipped": lambda: layer_figure(layers(), cells, "clipped"),
        "layers-kappa": lambda: layer_figure(layers(), cells, "kappa"),
        "learning-curves": lambda: line_figure(
            load_table(paths, CURVE_FILE), cells, "step", "heldout_loss"
        ),
        "spectral-density": lambda: density_figure(load_table(paths, DENSITY_FILE), cells),
        "spectra-effective-rank": lambda: block_figure(
            load_table(paths, SPECTRUM_FILE), cells, "effective_rank"
        ),
    }
    if "spectral/bytes" in metric_names(frame):
        try:
            found |= decay_makers(paths, cells)
        except ResultsError as error:
            found["spectra-decay"] = functools.partial(_fail, error)
    return found


def _fail(error: ResultsError) -> NoReturn:
    raise error


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
    return ", ".join(f"{name.rpartition('.')[2]}={label(value)}" for name, value in pairs)


def complete(table: Table, frame: pd.DataFrame) -> Table:
    """The table of some runs with every metric that a figure plots, its own metrics first."""
    there = metric_names(frame)
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
    """The setting that the figure of ranks is drawn against; None where there is no such figure."""
    swept = [*table.row_names, *table.col_names]
    axis = next((name for name in RANK_AXES if name in swept), None)
    return axis if WORLD_SIZE in there else None


# ---- metrics against a setting -------------------------------------------------------------------

Point = tuple[float, float, float, float]
"""Position, value and the ends of its interval."""

Series = dict[str, list[Point]]
"""Words for the other settings -> the points that have a number."""


@style.styled
def metric_figure(table: Table, metric: str, axis: str) -> Figure | None:
    """A metric against one setting, one line for each combination of the others, with intervals.

    The table has the metric, and the setting among its rows or columns. None where fewer than two
    values of the setting have numbers, or all numbers are the same.
    """
    series = _series(table, metric, axis)
    if not _varies(series):
        return None
    figure, (axes,) = style.new_figure()
    figure.set_label(f"{metric} against {axis}")
    style.legend(figure, axes, _draw(axes, table, metric, axis, series))
    return figure


@style.styled
def scaling_figure(table: Table, axis: str | None) -> Figure | None:
    """Time, its communication, bytes sent and memory on several ranks, one panel each.

    Bytes and memory are those of the rank that has most.

    Args:
        table: with those of these metrics that the runs have.
        axis: the number of ranks or nodes where it was swept, else the way in which they reduce;
            None: there is no figure, and neither is there one where nothing varies.
    """
    if axis is None:
        return None
    series = {m: _series(table, m, axis) for m in SCALING if m in table.metrics}
    series = {metric: points for metric, points in series.items() if _varies(points)}
    if not series:
        return None
    width = min(0.8 * len(series), 2.1) * style.WIDTH  # of a page at most
    figure, panels = style.new_figure(width, panels=len(series))
    figure.set_label(f"Time, bytes and memory against {axis}")
    lines = [
        _draw(axes, table, metric, axis, points)
        for axes, (metric, points) in zip(panels, series.items(), strict=True)
    ]
    style.legend(figure, panels[lines.index(max(lines))], max(lines))
    return figure


def _series(table: Table, metric: str, axis: str) -> Series:
    names = [*table.row_names, *table.col_names]
    at = names.index(axis)
    values, positions, _ = _positions(table, axis)
    position = {label(v): x for v, x in zip(values, positions, strict=True)}
    series: Series = {}
    for row, col in itertools.product(table.rows, table.cols):
        y, low, high = table.point((row, metric, col))
        key = (*row, *col)
        words = settings_words(names[:at] + names[at + 1 :], key[:at] + key[at + 1 :])
        points = series.setdefault(words, [])
        if math.isfinite(y):
            points.append((position[label(key[at])], y, low, high))
    return series


def _positions(table: Table, axis: str) -> tuple[list[Any], list[float], bool]:
    """The values of a setting, their positions, and whether the axis is logarithmic."""
    at = [*table.row_names, *table.col_names].index(axis)
    values = levels((*row, *col)[at] for row in table.rows for col in table.cols)
    return values, *style.positions(values)


def _varies(series: Series) -> bool:
    points = [point for line in series.values() for point in line]
    return len({x for x, *_ in points}) > 1 and len({y for _, y, *_ in points}) > 1


def _draw(axes: Axes, table: Table, metric: str, axis: str, series: Series) -> int:
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
    if style.spans_decades([y for points in series.values() for _, y, *_ in points]):
        axes.set_yscale("log")
    axes.set(xlabel=axis, ylabel=metric)
    axes.set_title(_note(table, metric, len(series)), **style.NOTE)
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
    if not 1 < len(keys) <= 3 * MOST_SERIES:
        return None
    figure, (axes,) = style.new_figure()
    names = [*table.row_names, *table.col_names]
    for i, (row, col) in enumerate(keys):
        x, y = table.point((row, TIME, col)), table.point((row, MEMORY, col))
        if not (math.isfinite(x[0]) and math.isfinite(y[0])):
            continue
        look: dict[str, Any] = {**style.look(i), "linestyle": "none"}
        axes.errorbar(
            [x[0]], [y[0]], xerr=_ends(*x), yerr=_ends(*y), capsize=2, elinewidth=0.8,
            label=settings_words(names, (*row, *col)), **look,
        )  # fmt: skip
    axes.set(xlabel=TIME, ylabel=f"{MEMORY} (MiB)")
    figure.set_label("Time and memory")
    style.legend(figure, axes, len(keys))
    return figure


def _ends(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """The lengths of error bars; a cell of one run has no interval, and its bar no length."""
    below, above = np.subtract(value, low), np.subtract(high, value)
    return np.nan_to_num(np.vstack([below, above]), nan=0.0).clip(min=0)


# ---- layers --------------------------------------------------------------------------------------


def layer_values(
    layers: pd.DataFrame, cells: Mapping[str, str], what: str
) -> dict[str, pd.DataFrame]:
    """Means over the completed runs of a cell, layer by cell, for each side.

    Args:
        layers: from :func:`fisher_lab.results.load_layers`.
        cells: run directory -> cell.
        what: ``clipped``, a fraction of the dimension, or ``kappa``, log10 of the condition number.

    Returns:
        ``A`` and ``G`` -> layers in order of depth by cells; a side without numbers is left out.
    """
    found: dict[str, pd.DataFrame] = {}
    if layers.empty or "name" not in layers:
        return found
    layers = layers.assign(cell=[cells.get(d) for d in layers["directory"]])
    layers = layers.dropna(subset=["cell"])
    for side in ("A", "G"):
        if f"{what}_{side}" not in layers or f"dim_{side}" not in layers:
            continue
        numbers = _numbers(column(layers, f"{what}_{side}"))
        if what == "clipped":
            numbers = numbers / _numbers(column(layers, f"dim_{side}"))
        else:
            numbers = np.log10(numbers.where(numbers > 0))
        wide = layers.assign(value=numbers).pivot_table(
            index="name", columns="cell", values="value", aggfunc="mean", sort=False
        )
        order = [name for name in dict.fromkeys(layers["name"]) if name in wide.index]
        order.sort(key=lambda name: "head" in str(name).rpartition(".")[2])  # the head comes last
        columns = [c for c in dict.fromkeys(cells.values()) if c in wide.columns]
        if order and columns:
            found[side] = wide.loc[order, columns]
    return found


def _numbers(values: pd.Series) -> pd.Series:
    return pd.Series(pd.to_numeric(values, errors="coerce"), dtype=float)


@style.styled
def layer_figure(layers: pd.DataFrame, cells: Mapping[str, str], what: str) -> Figure | None:
    """A heat map over depth for each side: layers by cells.

    None where there are no numbers, or where nothing at all was clipped.
    """
    sides = layer_values(layers, cells, what)
    clipped = what == "clipped"
    if not sides or (clipped and not any(v.to_numpy().any() for v in sides.values())):
        return None
    rows = max(len(values) for values in sides.values())
    columns = max(len(values.columns) for values in sides.values())
    if columns > MOST_COLUMNS:
        raise ResultsError(f"{columns} cells are too many columns for a heat map")
    width = max(style.WIDTH, 1.6 + 0.32 * columns) * len(sides)
    words = "fraction of eigenvalues clipped" if clipped else "log10 condition number"
    figure, panels = style.new_figure(width, 1.3 + 0.16 * rows, len(sides))
    for axes, (side, values) in zip(panels, sides.items(), strict=True):
        limits = (0, max(float(values.max().max()), 1e-3)) if clipped else (None, None)
        image = axes.imshow(
            values.to_numpy(), aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1]
        )
        style.name_ticks(axes, list(map(str, values.columns)))
        names = [str(name)[-28:] for name in values.index]
        axes.set_yticks(range(len(values)), names, parse_math=False)
        axes.tick_params(labelsize=5.5)
        axes.set_title(f"{side}: {words}", fontsize=7)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=5.5)
    figure.set_label(f"{words[:1].upper()}{words[1:]}, layer by layer")
    return figure

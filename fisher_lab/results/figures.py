"""The figures of a sweep, from the same cells as its table: what is plotted is what the table says.

A cell without a number has no point; the figure says how many there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import plotting
from .errors import ResultsError
from .frames import Column, Frame
from .loading import load_layers, load_table
from .metrics import known
from .table import Key, Table, tabulate
from .values import label, levels, meaning

MOST_SERIES = 7
MOST_COLUMNS = 30
TIME, MEMORY = "kfac/total_s", "kfac/peak_mb"
CURVE_FILE, DENSITY_FILE = "curve.csv", "density.csv"
SPECTRUM_FILE = "spectral.csv"


@dataclass
class Drawn:
    """Files that were written, and figures that could not be drawn, in words."""

    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def draw(table: Table, frame: Frame, directory: Path) -> Drawn:
    """Draw everything that the runs have numbers for, as PDF and PNG.

    Args:
        table: of the sweep.
        frame: its runs.
        directory: for the files; made where it is missing.
    """
    drawn = Drawn()
    for name, make in plans(table, frame).items():
        try:
            figure = make()
        except (ResultsError, OSError, ValueError, KeyError) as error:
            drawn.problems.append(f"figure {name}: {error}")
            continue
        if figure is not None:
            drawn.files += plotting.save(figure, directory / name)
    return drawn


def plans(table: Table, frame: Frame) -> dict[str, Callable[[], Figure | None]]:
    """Name of a file -> what draws it (None where there is nothing to draw)."""
    plans: dict[str, Callable[[], Figure | None]] = {}
    for axis in (*table.row_names, *table.col_names):
        for metric in table.metrics:
            name = plotting.file_name(f"{metric}-by-{axis}")
            plans[name] = lambda metric=metric, axis=axis: metric_figure(table, metric, axis)
    paths = [
        d for d, s in zip(frame["directory"], frame["status"], strict=True) if s == "completed"
    ]
    cells = cell_names(table, frame)
    plans["time-and-memory"] = lambda: trade_figure(table, frame)
    plans["layers-clipped"] = lambda: layer_figure(load_layers(paths), cells, "clipped")
    plans["layers-kappa"] = lambda: layer_figure(load_layers(paths), cells, "kappa")
    plans["learning-curves"] = lambda: line_figure(
        load_table(paths, CURVE_FILE), cells, "step", "heldout_loss"
    )
    plans["spectral-density"] = lambda: line_figure(
        load_table(paths, DENSITY_FILE), cells, "grid", "density", log_y=True
    )
    plans["spectra-effective-rank"] = lambda: block_figure(
        load_table(paths, SPECTRUM_FILE), cells, "effective_rank"
    )
    return plans


def cell_names(table: Table, frame: Frame) -> dict[str, str]:
    """Run directory -> the words for its cell, in the order of the table."""
    names = [*table.row_names, *table.col_names]
    order = [(*row, *col) for row in table.rows for col in table.cols]
    places = {tuple(map(label, key)): i for i, key in enumerate(order)}
    found: dict[str, tuple[int, str]] = {}
    for values in frame[["directory", *names]].itertuples(index=False):
        key = tuple(label(v) for v in values[1:])
        if key in places:
            words = ", ".join(_short(n, v) for n, v in zip(names, key, strict=True)) or "all runs"
            found[values[0]] = (places[key], words)
    return {d: words for d, (_, words) in sorted(found.items(), key=lambda item: item[1][0])}


def _short(name: str, value: str) -> str:
    return f"{name.rpartition('.')[2]}={value}"


# ---- a metric against a swept setting ------------------------------------------------------------


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
    names = [*table.row_names, *table.col_names]
    place = names.index(axis)
    everything = {(*row, *col): (row, metric, col) for row in table.rows for col in table.cols}
    values = levels(key[place] for key in everything)
    places, log = plotting.positions(values)
    where = {label(v): x for v, x in zip(values, places, strict=True)}
    series: dict[Key, list[tuple[float, float, float, float]]] = {}
    for key, cell in everything.items():
        y, low, high = table.point(cell)
        if math.isfinite(y):
            other = key[:place] + key[place + 1 :]
            series.setdefault(other, []).append((where[label(key[place])], y, low, high))
    drawn = [point for points in series.values() for point in points]
    if len({x for x, *_ in drawn}) < 2 or len({y for _, y, *_ in drawn}) < 2:
        return None
    figure, (axes,) = plotting.new_figure()
    others = names[:place] + names[place + 1 :]
    connect = all(isinstance(meaning(v), float | None) for v in values)
    for i, (other, points) in enumerate(itertools.islice(series.items(), MOST_SERIES)):
        words = ", ".join(_short(n, label(v)) for n, v in zip(others, other, strict=True))
        _plot_series(axes, sorted(points), words, i, connect)
    plotting.set_ticks(axes, values, places, log)
    if plotting.spans_decades([y for points in series.values() for _, y, *_ in points]):
        axes.set_yscale("log")
    axes.set(xlabel=axis, ylabel=metric)
    _explain(axes, table, metric, len(series))
    plotting.legend(figure, axes, min(len(series), MOST_SERIES))
    return figure


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
    if table.statistic[metric] == "median":
        words = "median and quartiles"
    elif max(cell.summary.n for cell in cells) > 1:
        words = f"mean and {table.confidence:.0%} interval"
    else:
        words = "single runs"
    notes = [words]
    if empty:
        notes.append(f"{empty} of {len(cells)} cells without a number")
    if count > MOST_SERIES:
        notes.append(f"{MOST_SERIES} of {count} lines")
    axes.set_title("; ".join(notes), fontsize=6.5, color="#444444")


@plotting.styled
def trade_figure(table: Table, frame: Frame) -> Figure | None:
    """Time against memory growth, a point a cell: quartiles of time, interval of memory.

    Args:
        table: of the sweep; its rows and columns are the cells.
        frame: its runs.
    """
    if not {TIME, MEMORY} <= set(known(frame)):
        return None
    both = tabulate(
        frame, rows=table.row_names, cols=table.col_names, over=table.over, metrics=[TIME, MEMORY]
    )
    keys = [(row, col) for row in both.rows for col in both.cols]
    if not 1 < len(keys) <= 3 * MOST_SERIES:
        return None
    figure, (axes,) = plotting.new_figure()
    names = [*both.row_names, *both.col_names]
    for i, (row, col) in enumerate(keys):
        x, y = both.point((row, TIME, col)), both.point((row, MEMORY, col))
        if not (math.isfinite(x[0]) and math.isfinite(y[0])):
            continue
        words = ", ".join(_short(n, label(v)) for n, v in zip(names, (*row, *col), strict=True))
        style: dict[str, Any] = {**plotting.look(i), "linestyle": "none"}
        axes.errorbar(
            [x[0]], [y[0]], xerr=_ends(x), yerr=_ends(y), capsize=2, elinewidth=0.8,
            label=words, **style,
        )  # fmt: skip
    axes.set(xlabel=TIME, ylabel=f"{MEMORY} (MiB)")
    plotting.legend(figure, axes, len(keys))
    return figure


def _ends(point: tuple[float, float, float]) -> np.ndarray:
    value, low, high = point
    return np.nan_to_num(np.array([[value - low], [high - value]]), nan=0.0).clip(min=0)


# ---- layers --------------------------------------------------------------------------------------


def layer_values(layers: Frame, cells: Mapping[str, str], what: str) -> dict[str, Frame]:
    """Means over the completed runs of a cell, layer by cell, for each side.

    Args:
        layers: from :func:`fisher_lab.results.load_layers`.
        cells: run directory -> cell.
        what: ``clipped``, a share of the dimension, or ``kappa``, log10 of the condition number.

    Returns:
        ``A`` and ``G`` -> frame of layers (in order of depth) by cells; sides without numbers left
        out.
    """
    found: dict[str, Frame] = {}
    if layers.empty or "name" not in layers:
        return found
    layers = layers.assign(cell=layers["directory"].map(cells))
    layers = layers[layers["cell"].notna()]
    for side in ("A", "G"):
        if f"{what}_{side}" not in layers or f"dim_{side}" not in layers:
            continue
        numbers = _numbers(layers[f"{what}_{side}"])
        if what == "clipped":
            numbers = numbers / _numbers(layers[f"dim_{side}"])
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


def _numbers(column: Column) -> Column:
    return column.map(lambda value: pd.to_numeric(value, errors="coerce")).astype(float)


@plotting.styled
def layer_figure(layers: Frame, cells: Mapping[str, str], what: str) -> Figure | None:
    """A heat map over depth for each side: layers by cells. None where there are no numbers."""
    sides = layer_values(layers, cells, what)
    if not sides:
        return None
    rows = max(len(values) for values in sides.values())
    columns = max(len(values.columns) for values in sides.values())
    if columns > MOST_COLUMNS:
        raise ResultsError(f"{columns} cells are too many columns for a heat map")
    width = max(plotting.WIDTH, 1.6 + 0.32 * columns) * len(sides)
    figure, panels = plotting.new_figure(width, 1.3 + 0.16 * rows, len(sides))
    for axes, (side, values) in zip(panels, sides.items(), strict=True):
        share = what == "clipped"
        image = axes.imshow(
            values.to_numpy(), aspect="auto", cmap="cividis",
            vmin=0 if share else None, vmax=max(float(values.max().max()), 1e-3) if share else None,
        )  # fmt: skip
        axes.set_xticks(
            range(len(values.columns)),
            list(values.columns),
            rotation=60,
            ha="right",
            parse_math=False,
        )
        names = [str(name)[-28:] for name in values.index]
        axes.set_yticks(range(len(values)), names, parse_math=False)
        axes.tick_params(labelsize=5.5)
        words = "share of eigenvalues clipped" if share else "log10 condition number"
        axes.set_title(f"{side}: {words}", fontsize=7)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=5.5)
    return figure


# ---- lines and blocks ----------------------------------------------------------------------------


def line_values(rows: Frame, cells: Mapping[str, str], x: str, y: str) -> dict[str, Frame]:
    """Cell -> mean, least and largest of ``y`` over its completed runs, by ``x``."""
    if rows.empty or not {x, y} <= set(rows.columns):
        return {}
    known_rows = rows.assign(cell=rows["directory"].map(cells)).dropna(subset=["cell", x, y])
    found = {}
    for cell in dict.fromkeys(cells.values()):
        part = known_rows[known_rows["cell"] == cell]
        if not part.empty:
            found[cell] = part.groupby(x)[y].agg(["mean", "min", "max", "count"])
    return found


@plotting.styled
def line_figure(
    rows: Frame, cells: Mapping[str, str], x: str, y: str, log_y: bool = False
) -> Figure | None:
    """Mean curves of the cells with the range over their runs. None where there are none."""
    curves = line_values(rows, cells, x, y)
    if not curves:
        return None
    figure, (axes,) = plotting.new_figure()
    for i, (cell, values) in enumerate(itertools.islice(curves.items(), MOST_SERIES)):
        style: dict[str, Any] = {**plotting.look(i), "marker": ""}
        style["linewidth"] = max(2.4 - 0.4 * i, 0.9)  # equal curves are both seen
        at = values.index.to_numpy(dtype=float)
        axes.plot(at, values["mean"].to_numpy(), label=cell, **style)
        low, high = values["min"].to_numpy(), values["max"].to_numpy()
        axes.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if log_y:
        top = max(float(v["mean"].max()) for v in curves.values())
        axes.set(yscale="log", ylim=(top * 1e-8, top * 3))
    axes.set(xlabel=x, ylabel=y)
    more = f"; {MOST_SERIES} of {len(curves)} cells" if len(curves) > MOST_SERIES else ""
    axes.set_title(f"mean and range over runs{more}", fontsize=6.5, color="#444444")
    plotting.legend(figure, axes, min(len(curves), MOST_SERIES))
    return figure


@plotting.styled
def block_figure(rows: Frame, cells: Mapping[str, str], what: str) -> Figure | None:
    """A number of every block of the spectra, a line a cell over depth."""
    if rows.empty or not {"block", what} <= set(rows.columns):
        return None
    blocks: Sequence[Any] = list(dict.fromkeys(rows["block"]))
    places = {block: i for i, block in enumerate(blocks)}
    numbered = rows.assign(place=rows["block"].map(places))
    figure = line_figure(numbered, cells, "place", what)
    if figure is not None:
        axes = figure.axes[0]
        axes.set_xticks(
            range(len(blocks)),
            [str(b)[-20:] for b in blocks],
            rotation=60,
            ha="right",
            parse_math=False,
        )
        axes.tick_params(axis="x", labelsize=5.5)
        axes.set_xlabel("block")
    return figure

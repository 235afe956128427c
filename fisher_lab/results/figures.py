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
import textwrap
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
from fisher_lab.results import labels
from fisher_lab.results.curve_figures import block_figure, decay_makers, density_figure, line_figure
from fisher_lab.results.figure_style import COLOURS, MARKS, MOST_PANELS, MOST_SERIES
from fisher_lab.results.layer_kinds import grouped
from fisher_lab.results.loading import load_layers, load_table
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import ResultsError, column, label, levels, metric_names, parse_value
from fisher_lab.runs.status import Status

MOST_COLUMNS, MOST_ROWS = 30, 40
"""Of a heat map."""
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
            load_table(paths, CURVE_FILE), cells, "step", "heldout_loss", file=CURVE_FILE
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
    return ", ".join(f"{labels.setting(name).short}={label(value)}" for name, value in pairs)


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
    series = collapse(_series(table, metric, axis))
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
            title: collapse(_series(table, metric, axis, {name: value}))
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
    figure.set_label(f"Time, bytes and memory against the {labels.setting(axis).label}")
    lines = [
        _draw(axes, table, metric, axis, points)
        for axes, (metric, points) in zip(panels, series.items(), strict=True)
    ]
    style.legend(figure, panels[lines.index(max(lines))], max(lines))
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


ROUNDING = 1e-9
"""Numbers that differ by less than this fraction of their size differ by rounding."""


def collapse(series: Series) -> Series:
    """The lines with those that are equal up to rounding made one, whose words name them all."""
    groups: list[tuple[list[str], list[Point]]] = []
    for words, points in series.items():
        for names, known in groups:
            if points and _apart(points, known) <= ROUNDING:
                names.append(words)
                break
        else:
            groups.append(([words], points))
    return {_one_name(names, [series[name] for name in names]): points for names, points in groups}


def _apart(left: Sequence[Point], right: Sequence[Point]) -> float:
    """The largest difference of two lines by their size; infinite at other positions."""
    a, b = (np.array(sorted(points), dtype=float) for points in (left, right))
    if a.shape != b.shape or not np.array_equal(a[:, 0], b[:, 0]):
        return math.inf
    size = max(float(np.abs(a[:, 1]).max()), float(np.abs(b[:, 1]).max()))
    differences = np.abs(a[:, 1:] - b[:, 1:])
    if bool((np.isnan(a[:, 1:]) != np.isnan(b[:, 1:])).any()):
        return math.inf
    return float(np.nan_to_num(differences).max()) / size if size else 0.0


def _one_name(names: Sequence[str], lines: Sequence[Sequence[Point]]) -> str:
    """``policy=all, auto (identical to 2e-15)``."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(", ") for name in names]
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    words = f"{names[0]} and {len(names) - 1} more"
    if len(differing) == 1:
        at = differing[0]
        values = "|".join(part[at].partition("=")[2] for part in parts)
        words = ", ".join([*parts[0][:at], f"{parts[0][at].partition('=')[0]}={values}",
                           *parts[0][at + 1 :]])  # fmt: skip
    apart = max(_apart(lines[0], line) for line in lines[1:])
    return f"{words} (identical{f' to {apart:.0e}' if apart else ''})"


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
    return max(values) - min(values) > ROUNDING * max(map(abs, values))


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
    figure, (axes,) = style.new_figure()
    names = [*table.row_names, *table.col_names]
    for row, col in keys:
        x, y = table.point((row, TIME, col)), table.point((row, MEMORY, col))
        if not (math.isfinite(x[0]) and math.isfinite(y[0])):
            continue
        # The colour is the value of the first setting, and the mark those of the others.
        key = (*row, *col)
        look: dict[str, Any] = {"color": COLOURS[firsts.index(key[:1])], "linestyle": "none"}
        look["marker"] = MARKS[rests.index(key[1:])]
        axes.errorbar(
            [x[0]], [y[0]], xerr=_ends(*x), yerr=_ends(*y), capsize=2, elinewidth=0.8,
            label=settings_words(names, (*row, *col)), **look,
        )  # fmt: skip
    style.name_axes(axes, labels.metric(TIME).with_unit, labels.metric(MEMORY).with_unit)
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
    sides = {side: _few_rows(values) for side, values in sides.items()}
    rows = max(len(values) for values in sides.values())
    columns = max(len(values.columns) for values in sides.values())
    if columns > MOST_COLUMNS:
        raise ResultsError(f"{columns} cells are too many columns for a heat map")
    width = max(style.WIDTH, 1.6 + 0.32 * columns) * len(sides)
    words = labels.column("layers.csv", what).label
    words = words if clipped else f"log10 of the {words}"
    figure, panels = style.new_figure(width, 1.3 + 0.16 * rows, len(sides))
    # The same colour is the same value on both sides.
    low = 0.0 if clipped else min(float(v.min().min()) for v in sides.values())
    high = max(1e-3, *(float(v.max().max()) for v in sides.values()))
    for axes, (side, values) in zip(panels, sides.items(), strict=True):
        image = axes.imshow(values.to_numpy(), aspect="auto", cmap="cividis", vmin=low, vmax=high)
        style.name_ticks(axes, list(map(str, values.columns)))
        axes.set_yticks(range(len(values)), list(map(str, values.index)), parse_math=False)
        axes.tick_params(labelsize=5.5)
        axes.set_title(side, fontsize=7)
        axes.spines[:].set_visible(False)
        if axes is panels[-1]:
            bar = figure.colorbar(image, ax=panels, shrink=0.8, label=textwrap.fill(words, 40))
            bar.ax.tick_params(labelsize=5.5)
    figure.set_label(
        f"{words[:1].upper()}{words[1:]}, layer by layer, from {low:.3g} to {high:.3g}"
    )
    return figure


def _few_rows(values: pd.DataFrame) -> pd.DataFrame:
    """Layers by cells; where there are too many layers, their means by kind."""
    rows = [{"name": name} for name in values.index]
    if len(rows) <= MOST_ROWS:
        return values
    groups = grouped(rows, MOST_ROWS)
    means = {f"{kind} ({len(own)})": values.loc[[row["name"] for row in own]].mean()
             for kind, own in groups.items()}  # fmt: skip
    return pd.DataFrame(means).T

"""The figures of a sweep, from the same cells as its table: what is plotted is what the table says.

A cell without a number has no point; the figure says how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fisher_lab.results import plotting
from fisher_lab.results.lines import block_figure, line_figure
from fisher_lab.results.loading import load_layers, load_table
from fisher_lab.results.metric_figures import (
    complete,
    metric_figure,
    scaling_figure,
    short,
    trade_figure,
)
from fisher_lab.results.spectra_figures import decay_plans, density_figure
from fisher_lab.results.table import Table
from fisher_lab.results.values import Column, Frame, ResultsError, known, label
from fisher_lab.runs.status import Status

MOST_COLUMNS = 30
CURVE_FILE, DENSITY_FILE = "curve.csv", "density.csv"
SPECTRUM_FILE = "spectral.csv"


@dataclass(frozen=True)
class Shown:
    """A figure that was written.

    Attributes:
        pdf: the file.
        words: what it shows.
        wide: whether it takes the width of a page.
    """

    pdf: Path
    words: str
    wide: bool


@dataclass
class Drawn:
    """Files that were written, and figures that could not be drawn, in words."""

    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


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
            files = plotting.save(figure, directory / name)
            drawn.files += files
            drawn.shown.append(Shown(files[0], plotting.words(figure), plotting.is_wide(figure)))
    return drawn


def plans(table: Table, frame: Frame) -> dict[str, Callable[[], Figure | None]]:
    """Name of a file -> what draws it (None where there is nothing to draw)."""
    plans: dict[str, Callable[[], Figure | None]] = {}
    for axis in (*table.row_names, *table.col_names):
        for metric in table.metrics:
            name = plotting.file_name(f"{metric}-by-{axis}")
            plans[name] = lambda metric=metric, axis=axis: metric_figure(table, metric, axis)
    paths = [
        d for d, s in zip(frame["directory"], frame["status"], strict=True) if s == Status.COMPLETED
    ]
    cells = cell_names(table, frame)
    layers = functools.cache(lambda: load_layers(paths))
    whole = functools.cache(lambda: complete(table, frame))
    plans["time-and-memory"] = lambda: trade_figure(whole(), frame)
    plans["distributed-scaling"] = lambda: scaling_figure(whole(), frame)
    plans["layers-clipped"] = lambda: layer_figure(layers(), cells, "clipped")
    plans["layers-kappa"] = lambda: layer_figure(layers(), cells, "kappa")
    plans["learning-curves"] = lambda: line_figure(
        load_table(paths, CURVE_FILE), cells, "step", "heldout_loss"
    )
    plans["spectral-density"] = lambda: density_figure(load_table(paths, DENSITY_FILE), cells)
    plans["spectra-effective-rank"] = lambda: block_figure(
        load_table(paths, SPECTRUM_FILE), cells, "effective_rank"
    )
    if "spectral/bytes" in known(frame):
        plans |= decay_plans(paths, cells)
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
            words = ", ".join(short(n, v) for n, v in zip(names, key, strict=True)) or "all runs"
            found[values[0]] = (places[key], words)
    return {d: words for d, (_, words) in sorted(found.items(), key=lambda item: item[1][0])}


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
    """A heat map over depth for each side: layers by cells.

    None where there are no numbers, or where nothing at all was clipped.
    """
    sides = layer_values(layers, cells, what)
    if not sides or (what == "clipped" and not any(v.to_numpy().any() for v in sides.values())):
        return None
    rows = max(len(values) for values in sides.values())
    columns = max(len(values.columns) for values in sides.values())
    if columns > MOST_COLUMNS:
        raise ResultsError(f"{columns} cells are too many columns for a heat map")
    width = max(plotting.WIDTH, 1.6 + 0.32 * columns) * len(sides)
    share = what == "clipped"
    words = "share of eigenvalues clipped" if share else "log10 condition number"
    figure, panels = plotting.new_figure(width, 1.3 + 0.16 * rows, len(sides))
    for axes, (side, values) in zip(panels, sides.items(), strict=True):
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
        axes.set_title(f"{side}: {words}", fontsize=7)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=5.5)
    figure.set_label(f"{words[:1].upper()}{words[1:]}, layer by layer")
    return figure

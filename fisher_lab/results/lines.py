"""Figures of curves: the mean over the runs of a cell, with their range."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fisher_lab.results import plotting
from fisher_lab.results.metric_figures import MOST_SERIES
from fisher_lab.results.values import Frame


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
    rows: Frame,
    cells: Mapping[str, str],
    x: str,
    y: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    decades: int | None = None,
) -> Figure | None:
    """Mean curves of the cells with the range over their runs. None where there are none.

    Args:
        rows: a row a point and run.
        cells: run directory -> the words for its cell.
        x: column of the places.
        y: column of the values.
        log_x: whether the axis of places is logarithmic.
        log_y: whether that of values is.
        decades: of the values that are shown, from the largest down; None: all.
    """
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
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    if decades is not None:
        top = max(float(v["mean"].max()) for v in curves.values())
        axes.set_ylim(top * 10.0**-decades, top * 3)
    axes.set(xlabel=x, ylabel=y)
    figure.set_label(f"{y} against {x}")
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
        figure.set_label(f"{what} by block")
    return figure

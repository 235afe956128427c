"""Figures of curves: learning curves, spectra by rank, spectral densities, numbers by block.

The runs of a sweep are drawn as the mean over the runs of a cell, with their range. The engines of
one run draw their own result, by the same functions. Densities are put on one grid first, since
every run has a grid of its own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.results import figure_style as style
from fisher_lab.results import labels
from fisher_lab.results.figure_style import MOST_PANELS, MOST_SERIES
from fisher_lab.results.ladder_figures import ladder_figure
from fisher_lab.results.step_figures import scan_figure, step_figure
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic

SPECTRUM_FILE, LANCZOS_FILE = "spectral.json", "lanczos.json"
BLOCKS_FILE = "spectral.csv"
MOST_BLOCKS = 12
"""Blocks that are drawn, those of the largest trace."""
MOST_CURVES = MOST_PANELS * MOST_SERIES
DECADES = 8
"""Decades of a density that are shown, from its maximum down."""

Curves = Mapping[str, pd.DataFrame]
"""Name of a line -> columns ``mean``, ``min`` and ``max``, indexed by x."""


@style.styled
def draw_curves(
    curves: Curves,
    x: str,
    y: str,
    note: str,
    *,
    log: Sequence[str] = (),
    decades: int | None = None,
) -> Figure:
    """Lines with a band around them, in panels where there are more than colours.

    Args:
        curves: name -> values; there may be none.
        x: label of the x axis.
        y: label of the y axis.
        note: stands above the axes.
        log: the axes that are logarithmic, among ``x`` and ``y``.
        decades: of the values that are shown, from the largest down; None: all.
    """
    parts = style.panels_of(list(curves))
    columns = min(len(parts), 3)
    width = style.WIDTH if columns == 1 else 2.1 * style.WIDTH
    figure, panels = style.new_figure(width, panels=len(parts), columns=columns)
    for axes, names in zip(panels, parts, strict=True):
        for i, name in enumerate(names):
            _draw_curve(axes, name, curves[name], i)
        axes.set(**{f"{axis}scale": "log" for axis in log})
        style.name_axes(axes, x, y)
        if len(parts) > 1:  # the colours of a panel are its own
            axes.legend(fontsize=5, frameon=False)
    top = max((float(v["mean"].to_numpy().max()) for v in curves.values() if len(v)), default=0.0)
    for axes in panels:
        if decades is not None and top > 0:
            axes.set_ylim(top * 10.0**-decades, top * 3)
    style.same_scale(panels)
    style.note(panels[0], note)
    figure.set_label(f"{y[:1].upper()}{y[1:]} against {x}")
    if len(parts) == 1:
        style.legend(figure, panels[0], len(curves))
    return figure


def _draw_curve(axes: Axes, name: str, values: pd.DataFrame, i: int) -> None:
    look: dict[str, Any] = {**style.look(i), "marker": ""}
    look["linewidth"] = max(2.4 - 0.4 * i, 0.9)  # equal curves are both seen
    at = values.index.to_numpy(dtype=float)
    axes.plot(at, values["mean"].to_numpy(), label=name, **look)
    low, high = values["min"].to_numpy(), values["max"].to_numpy()
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def line_figure(
    rows: pd.DataFrame, cells: Mapping[str, str], x: str, y: str, *, file: str = "", **options: Any
) -> Figure | None:
    """Mean curves of the cells with the range over their runs. None where there are none.

    Args:
        rows: one row per point and run.
        cells: run directory -> the words for its cell.
        x: column of the positions.
        y: column of the values.
        file: of the run directory that the columns are of, which says how they are called.
        options: of :func:`draw_curves`.
    """
    if rows.empty or not {x, y} <= set(rows.columns):
        return None
    curves = _curves(rows, cells, x, y)
    if not curves:
        return None
    (curves,) = merge_curves({"": curves}).values()
    more = f"; {MOST_CURVES} of {len(curves)} cells" if len(curves) > MOST_CURVES else ""
    shown = dict(itertools.islice(curves.items(), MOST_CURVES))
    names = (labels.column(file, name).with_unit for name in (x, y))
    return draw_curves(shown, *names, f"mean and range over runs{more}", **options)


def _curves(
    rows: pd.DataFrame, cells: Mapping[str, str], x: str, y: str
) -> dict[str, pd.DataFrame]:
    """The mean curve of every cell, and the range over its runs."""
    known = rows.assign(cell=[cells.get(d) for d in rows["directory"]]).dropna(
        subset=["cell", x, y]
    )
    parts = {cell: known.loc[known["cell"] == cell] for cell in dict.fromkeys(cells.values())}
    return {
        cell: part.groupby(x)[y].agg(["mean", "min", "max"])
        for cell, part in parts.items()
        if not part.empty
    }


def merge_curves(panels: Mapping[str, Curves]) -> dict[str, Curves]:
    """The lines of panels, with those that are equal up to rounding in all of them made one."""

    def apart(one: str, other: str) -> float:
        found = 0.0
        for curves in panels.values():
            a, b = curves.get(one), curves.get(other)
            if a is None or b is None or not a.index.equals(b.index):
                return 0.0 if a is None and b is None else np.inf
            difference = np.abs(a.to_numpy() - b.to_numpy()).max()
            found = max(found, float(difference / (np.abs(a.to_numpy()).max() or 1.0)))
        return found

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    merged = style.merge(names, apart)
    return {
        title: {words: curves[name] for words, name in merged.items() if name in curves}
        for title, curves in panels.items()
    }


def block_figure(rows: pd.DataFrame, cells: Mapping[str, str], what: str) -> Figure | None:
    """A number of every block of the spectra, one line per cell over depth."""
    if rows.empty or not {"block", what} <= set(rows.columns):
        return None
    blocks = list(dict.fromkeys(rows["block"]))
    position = {block: i for i, block in enumerate(blocks)}
    figure = line_figure(
        rows.assign(block=[position[b] for b in rows["block"]]), cells, "block", what,
        file=BLOCKS_FILE,
    )  # fmt: skip
    if figure is not None:
        for axes in figure.axes:
            style.name_ticks(axes, list(map(str, blocks)))
            axes.tick_params(axis="x", labelsize=5.5)
        words = labels.column(BLOCKS_FILE, what).label
        figure.set_label(f"{words[:1].upper()}{words[1:]} by block")
    return figure


# ---- eigenvalues ---------------------------------------------------------------------------------


def _positive(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Block -> its eigenvalues above the threshold that the spectrum states, the largest first."""
    return {
        name: sorted(
            (v for v in block["eigenvalues"] if v > max(block["threshold"], 0.0)), reverse=True
        )
        for name, block in blocks.items()
        if block["status"] == "ok"
    }


@style.styled
def decay_figure(paths: Iterable[str], cells: Mapping[str, str]) -> Figure | None:
    """The eigenvalues of the blocks of the largest traces by rank: a panel each, a line per cell.

    Args:
        paths: directories of completed runs.
        cells: run directory -> the words for its cell.

    Raises:
        ResultsError: a spectrum that cannot be read.
    """
    found: list[tuple[str, str, int, float]] = []
    for path in paths:
        file = Path(path) / SPECTRUM_FILE
        if not file.is_file():
            continue
        try:
            blocks = atomic.read_object(file)["per_block"]
            for name, values in _positive(blocks).items():
                found += [(path, name, i, value) for i, value in enumerate(values, 1)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{file} cannot be read: {error!r}") from error
    rows = pd.DataFrame(found, columns=["directory", "block", "rank", "eigenvalue"])
    blocks = rows.groupby("block", sort=False)["eigenvalue"]
    traces = {str(block): float(values.to_numpy().sum()) for block, values in blocks}
    largest = sorted(traces, key=lambda block: -traces[block])[:MOST_PANELS]
    parts = {
        block: _curves(rows.loc[rows["block"] == block], cells, "rank", "eigenvalue")
        for block in traces
        if block in largest
    }
    if not parts:
        return None
    shown = merge_curves(parts)
    columns = min(len(shown), 4)
    figure, panels = style.new_figure(style.PAGE, 1.6, panels=len(shown), columns=columns)
    for axes, (block, curves) in zip(panels, shown.items(), strict=True):
        for i, (name, values) in enumerate(itertools.islice(curves.items(), MOST_SERIES)):
            _draw_curve(axes, name, values, i)
        axes.set(xscale="log", yscale="log")
        axes.set_title(block, **style.NOTE, parse_math=False)
        style.name_axes(axes, "rank", "eigenvalue")
    many = max(map(len, shown.values()))
    style.legend(figure, panels[0], min(many, MOST_SERIES))
    less = f"; {len(largest)} of {len(traces)} blocks" if len(traces) > len(largest) else ""
    less += f"; {MOST_SERIES} of {many} cells" if many > MOST_SERIES else ""
    equal = "".join(f"; {name}" for name in next(iter(shown.values())) if "(identical" in name)
    figure.set_label(
        f"Eigenvalues by rank, a panel for each block, mean and range over runs{less}{equal}"
    )
    return figure


def spectrum_figure(result: Mapping[str, Any]) -> Figure:
    """The eigenvalues of the blocks of one run by rank; blocks of small traces are left out.

    Args:
        result: of ``compute_fisher_spectrum``.
    """
    blocks = {name: block for name, block in result["per_block"].items() if block["status"] == "ok"}
    largest = sorted(blocks, key=lambda name: -blocks[name]["trace"])[:MOST_BLOCKS]
    curves = {
        name: pd.DataFrame(
            dict.fromkeys(("mean", "min", "max"), values), range(1, len(values) + 1), dtype=float
        )
        for name, values in _positive(blocks).items()
        if name in largest
    }
    meta = result["metadata"]
    note = f"Fisher spectrum by {meta['block_structure']}, N = {meta['n_samples']}"
    if len(largest) < len(blocks):
        note += f"; {len(largest)} of {len(blocks)} blocks (largest traces)"
    return draw_curves(curves, "rank", "eigenvalue of F", note, log="xy")


@style.styled
def eigenvalue_figure(pairs: Mapping[str, Any]) -> Figure:
    """The eigenvalues of ``top_eigenpairs`` with residuals; open marks have not converged."""
    figure, (axes,) = style.new_figure()
    values, colour = pairs["eigenvalues"], style.COLOURS[0]
    ranks = range(1, len(values) + 1)
    axes.vlines(ranks, 0, values, color=colour, linewidth=1)
    for rank, value, converged in zip(ranks, values, pairs["converged"], strict=True):
        axes.plot(rank, value, "o", color=colour, markerfacecolor=colour if converged else "white")
    axes.errorbar(ranks, values, yerr=pairs["residuals"], fmt="none", ecolor=style.COLOURS[1])
    axes.set(xlabel="rank", ylabel=f"eigenvalue ({pairs['operator']})")
    axes.set_title(f"top {len(ranks)} by Lanczos, {pairs['n_products']} products", **style.NOTE)
    return figure


@style.styled
def importance_figure(scores: Mapping[str, float]) -> Figure:
    """A bar for the mean squared gradient of each layer of one run."""
    figure, (axes,) = style.new_figure(height=1.0 + 0.13 * len(scores))
    axes.barh(range(len(scores)), list(scores.values()), color=style.COLOURS[2])
    axes.set_yticks(range(len(scores)), list(scores), fontsize=5.5, parse_math=False)
    axes.invert_yaxis()
    if any(value > 0 for value in scores.values()):
        axes.set_xscale("log")
    axes.set(xlabel="mean squared gradient of an element")
    axes.set_title("importance by layer", **style.NOTE)
    return figure


# ---- densities -----------------------------------------------------------------------------------


def density_figure(rows: pd.DataFrame, cells: Mapping[str, str]) -> Figure | None:
    """Spectral densities, one line per cell."""
    curves = _on_one_grid(rows, "grid", "density")
    figure = line_figure(
        curves, cells, "grid", "density", file="density.csv", log="y", decades=DECADES
    )
    if figure is None:
        return None
    words = "grid"  # where no ``lanczos.json`` says what the density is over
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        file = Path(str(rows["directory"].iloc[0])) / LANCZOS_FILE
        log = atomic.read_object(file)["density"]["scale"] == "log10"
        words = "log10 eigenvalue" if log else "eigenvalue"
    for axes in figure.axes:
        axes.set_xlabel(words)
    figure.set_label(f"Spectral density against {words}")
    return figure


def run_density_figure(found: Mapping[str, Any]) -> Figure:
    """What ``spectral_density`` found of one run; the band is its interval of confidence 0.95."""
    density = np.asarray(found["density"], dtype=float)
    # Of one probe there is no interval.
    low, high = (
        np.where(np.isnan(end), density, end)
        for end in (np.asarray(found[name], dtype=float) for name in ("low", "high"))
    )
    curve = pd.DataFrame({"mean": density, "min": low, "max": high}, index=found["grid"])
    log = found["scale"] == "log10"
    nonzero = round((1 - found["mass_left_out"]) * found["n_params"])
    probes = "exact" if found["exact"] else f"{len(found['nodes'])} probes"
    note = f"{found['operator']}, {probes}, {found['n_samples']:,} samples"
    note += f"; {nonzero:,} nonzero eigenvalues" if log else ""
    x = "log10 eigenvalue" if log else "eigenvalue"
    scale = "y" if (density > 0).any() else ""
    return draw_curves({"density": curve}, x, "density", note, log=scale, decades=DECADES)


def _on_one_grid(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The curves of the runs at the same positions, so that their mean is a mean of curves.

    Where the runs have different positions, these are replaced by as many as a run has, over the
    span of all; the curves are interpolated, and are zero beyond their ends.
    """
    if rows.empty or not {x, y} <= set(rows.columns):
        return rows
    runs = {
        directory: own.sort_values(x)[[x, y]].to_numpy(dtype=float).T
        for directory, own in rows.groupby("directory")
    }
    grids = [at for at, _ in runs.values()]
    if all(np.array_equal(at, grids[0]) for at in grids):
        return rows
    low, high = min(at[0] for at in grids), max(at[-1] for at in grids)
    grid = np.linspace(low, high, max(map(len, grids)))
    parts = []
    for directory, (at, values) in runs.items():
        values = np.interp(grid, at, values, left=0.0, right=0.0)
        parts.append(pd.DataFrame({"directory": directory, x: grid, y: values}))
    return pd.concat(parts, ignore_index=True)


RUN_FIGURES: Mapping[str, Callable[[Any], Figure]] = {
    "spectral_decay": spectrum_figure,
    "lanczos_eigenvalues": eigenvalue_figure,
    "lanczos_density": run_density_figure,
    "group_fisher_layers": importance_figure,
    "step_curve": step_figure,
    "damping_scan": scan_figure,
    "ladder": ladder_figure,
}
"""Name of a file in the run directory -> what draws the result of its engine."""


def draw_of_run(name: str, result: Mapping[str, Any], directory: Path) -> None:
    """Write the figure ``name`` of :data:`RUN_FIGURES` of a result into its run directory."""
    style.save(RUN_FIGURES[name](result), directory / name)

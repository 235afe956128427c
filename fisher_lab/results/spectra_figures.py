"""Figures of spectra: the eigenvalues of every block by rank, and densities.

The eigenvalues are those of the runs' ``spectral.json``, above the threshold that it states;
densities are put on one grid, since every run has a grid of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fisher_lab.results.lines import line_figure
from fisher_lab.results.plotting import file_name
from fisher_lab.results.values import Frame, ResultsError

SPECTRUM_FILE = "spectral.json"
LANCZOS_FILE = "lanczos.json"
MOST_BLOCKS = 12
"""Blocks that are drawn, those of the largest trace."""


def load_spectra(paths: Iterable[str]) -> Frame:
    """Eigenvalues, a row each.

    Args:
        paths: run directories; those without spectra have no rows.

    Returns:
        Columns ``directory``, ``block``, ``rank`` from 1, ``eigenvalue``; blocks in order of depth.

    Raises:
        ResultsError: a spectrum that cannot be read.
    """
    rows: list[tuple[str, str, int, float]] = []
    for path in paths:
        file = Path(path) / SPECTRUM_FILE
        if not file.is_file():
            continue
        try:
            blocks = json.loads(file.read_text(encoding="utf-8"))["per_block"]
            for name, values in _positive(blocks):
                rows += [(path, name, i, value) for i, value in enumerate(values, 1)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{file} cannot be read: {error!r}") from error
    return pd.DataFrame(rows, columns=["directory", "block", "rank", "eigenvalue"])


def _positive(blocks: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, list[float]]]:
    for name, block in blocks.items():
        if block["status"] == "ok":
            least = max(block["threshold"], 0.0)
            yield name, sorted((v for v in block["eigenvalues"] if v > least), reverse=True)


def decay_plans(
    paths: Iterable[str], cells: Mapping[str, str]
) -> dict[str, Callable[[], Figure | None]]:
    """Name of a file -> what draws the eigenvalues of one block.

    Args:
        paths: directories of completed runs.
        cells: run directory -> the words for its cell.
    """
    try:
        rows = load_spectra(paths)
    except ResultsError as error:
        problem = error

        def fail() -> Figure | None:
            raise problem

        return {"spectra-decay": fail}
    traces = rows.groupby("block", sort=False)["eigenvalue"].sum()
    shown = set(traces.nlargest(MOST_BLOCKS).index)
    return {
        file_name(f"spectra-decay-{block}"): functools.partial(decay_figure, rows, cells, block)
        for block in traces.index
        if block in shown
    }


def decay_figure(rows: Frame, cells: Mapping[str, str], block: str) -> Figure | None:
    """The eigenvalues of one block by rank, a line a cell, both axes logarithmic."""
    own = rows[rows["block"] == block]
    figure = line_figure(own, cells, "rank", "eigenvalue", log_x=True, log_y=True)
    if figure is not None:
        figure.axes[0].set_ylabel(f"eigenvalue of {block}", parse_math=False)
        figure.set_label(f"Eigenvalues of {block} by rank")
    return figure


def density_figure(rows: Frame, cells: Mapping[str, str]) -> Figure | None:
    """Spectral densities, a line a cell."""
    on_grid = on_one_grid(rows, "grid", "density")
    figure = line_figure(on_grid, cells, "grid", "density", log_y=True, decades=8)
    if figure is not None:
        words = _scale(rows["directory"].iloc[0])
        figure.axes[0].set_xlabel(words)
        figure.set_label(f"Spectral density against {words}")
    return figure


def _scale(directory: str) -> str:
    """What a run's density is over, as its ``lanczos.json`` says."""
    try:
        about = json.loads((Path(directory) / LANCZOS_FILE).read_text(encoding="utf-8"))
        log = about["density"]["scale"] == "log10"
    except (OSError, ValueError, KeyError, TypeError):
        return "grid"
    return "log10 eigenvalue" if log else "eigenvalue"


def on_one_grid(rows: Frame, x: str, y: str) -> Frame:
    """The curves of the runs at the same places, so that their mean is one of curves.

    Args:
        rows: of all runs, with their ``directory``.
        x: the column of places. Where runs have places of their own, they are replaced by as many
            as a run has, over the span of all; the curves are interpolated, and zero beyond
            their ends.
        y: the column of values.
    """
    if rows.empty or not {x, y} <= set(rows.columns):
        return rows
    runs = {directory: own.sort_values(x) for directory, own in rows.groupby("directory")}
    grids = [own[x].to_numpy(dtype=float) for own in runs.values()]
    if all(np.array_equal(grid, grids[0]) for grid in grids):
        return rows
    low, high = min(grid[0] for grid in grids), max(grid[-1] for grid in grids)
    grid = np.linspace(low, high, max(map(len, grids)))
    parts = [
        pd.DataFrame({"directory": directory, x: grid, y: _at(grid, own, x, y)})
        for directory, own in runs.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _at(grid: np.ndarray, own: Frame, x: str, y: str) -> np.ndarray:
    places, values = own[x].to_numpy(dtype=float), own[y].to_numpy(dtype=float)
    return np.interp(grid, places, values, left=0.0, right=0.0)

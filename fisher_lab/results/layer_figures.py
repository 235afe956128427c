"""Heat maps over the layers of the runs of a sweep."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fisher_lab.results import figure_style as style
from fisher_lab.results import labels
from fisher_lab.results.layer_kinds import grouped
from fisher_lab.results.values import ResultsError, column

MOST_COLUMNS, MOST_ROWS, MOST_EMPTY = 30, 40, 0.5
"""Of a heat map; the last is the share of its cells that have no number."""


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
        order = [name for name in _by_depth(layers["name"]) if name in wide.index]
        columns = [c for c in dict.fromkeys(cells.values()) if c in wide.columns]
        if order and columns:
            found[side] = wide.loc[order, columns]
    return found


def _by_depth(names: Iterable[str]) -> list[str]:
    """The names in order, each once; the head comes last."""
    return sorted(dict.fromkeys(names), key=lambda name: "head" in str(name).rpartition(".")[2])


def _numbers(values: pd.Series) -> pd.Series:
    return pd.Series(pd.to_numeric(values, errors="coerce"), dtype=float)


@style.styled
def layer_figure(layers: pd.DataFrame, cells: Mapping[str, str], what: str) -> Figure | None:
    """A heat map over depth for each side: layers by cells, cells of equal colours as one.

    None where there are no numbers, where nothing at all was clipped, where several cells have the
    same colours, or where most layers are of one cell alone.
    """
    sides = layer_values(layers, cells, what)
    clipped = what == "clipped"
    if not sides or (clipped and not any(v.to_numpy().any() for v in sides.values())):
        return None
    scattered = max(float(v.isna().to_numpy().mean()) for v in sides.values()) > MOST_EMPTY
    sides = {side: _few_rows(values) for side, values in sides.items()}
    # The same colour is the same value on both sides.
    low = 0.0 if clipped else min(float(v.min().min()) for v in sides.values())
    high = max(1e-3, *(float(v.max().max()) for v in sides.values()))
    names = _columns(sides, high - low)
    known = max(len(v.columns) for v in sides.values())
    if scattered or len(names) < min(known, 2):
        return None
    if len(names) > MOST_COLUMNS:
        raise ResultsError(f"{len(names)} cells are too many columns for a heat map")
    sides = {side: v.reindex(columns=list(names.values())) for side, v in sides.items()}
    words = labels.column("layers.csv", what).label
    words = words if clipped else f"log10 of the {words}"
    rows = list(dict.fromkeys(name for values in sides.values() for name in values.index))
    depth = {name: i for i, name in enumerate(_by_depth(layers["name"]))}
    rows.sort(key=lambda name: depth.get(name, -1))  # kinds stay in their order
    if len(names) == 1 and len(rows) == 1:
        return None  # one mark says less than the table of layers
    if len(names) == 1:
        figure = _profile(sides, rows, words)
    else:
        figure = _heat_maps(sides, rows, list(names), words, (low, high))
    equal = [name for name in names if "(identical" in name]
    same = "; means over the runs of a cell"
    same += "; white: no number" if any(len(v) < len(rows) for v in sides.values()) else ""
    same += f"; cells of the same colours are one column: {'; '.join(equal)}" if equal else ""
    figure.set_label(
        f"{words[:1].upper()}{words[1:]}, layer by layer, from {low:.3g} to {high:.3g}{same}"
    )
    return figure


SHADES = 256
"""Colours of a heat map: numbers that are nearer to one another have the same one."""


def _columns(sides: Mapping[str, pd.DataFrame], span: float) -> dict[str, str]:
    """The words for the columns of a heat map, those of the same colours as one."""
    columns = list(dict.fromkeys(c for values in sides.values() for c in values.columns))
    whole = pd.concat([v.reindex(columns=columns) for v in sides.values()]).to_numpy(dtype=float)
    at = {name: whole[:, i] for i, name in enumerate(columns)}

    def apart(one: str, other: str) -> float:
        a, b = at[one], at[other]
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return math.inf
        return float(np.nanmax(np.abs(a - b), initial=0.0) / (span or 1.0))

    return style.merge(columns, apart, 1 / SHADES)


def _profile(sides: Mapping[str, pd.DataFrame], layers: list[str], words: str) -> Figure:
    """One cell: a number a layer, with a mark for each side."""
    figure, (axes,) = style.new_figure(style.PAGE, 2.0)
    for i, (side, values) in enumerate(sides.items()):
        look = {**style.look(i), "linestyle": ":"}
        axes.plot(
            range(len(layers)), values.reindex(layers).iloc[:, 0], label=f"factor {side}", **look
        )
    style.name_ticks(axes, _short_names(layers), 50)
    axes.tick_params(axis="x", labelsize=5.5)
    axes.set_ylabel(textwrap.fill(words, 18))
    style.legend(figure, axes, len(sides))
    return figure


def _heat_maps(
    sides: Mapping[str, pd.DataFrame],
    layers: list[str],
    names: Sequence[str],
    words: str,
    ends: tuple[float, float],
) -> Figure:
    heads, keys = _heads(names)
    room = min(max(map(len, heads)), 24) * 0.055
    width = min(style.PAGE, 1.9 + 0.6 * len(names) * len(sides))
    figure, panels = style.new_figure(width, 0.6 + room + 0.1 * len(layers), len(sides))
    for axes, (side, values) in zip(panels, sides.items(), strict=True):
        image = axes.imshow(
            values.reindex(layers).to_numpy(),
            aspect="auto",
            cmap="cividis",
            vmin=ends[0],
            vmax=ends[1],
        )
        style.name_ticks(axes, [textwrap.shorten(head, 40) for head in heads], 50)
        shown = _short_names(layers) if axes is panels[0] else [""] * len(layers)
        axes.set_yticks(range(len(layers)), shown, parse_math=False)
        axes.tick_params(labelsize=5.5, length=1.5)
        axes.set_title(f"factor {side}", fontsize=7)
        axes.set_xlabel(keys, fontsize=6.5)
        axes.spines[:].set_visible(False)
        if axes is panels[-1]:
            bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
            bar.set_label(textwrap.fill(words, 30), fontsize=6.5)
            bar.ax.tick_params(labelsize=5.5)
    return figure


def _heads(names: Sequence[str]) -> tuple[list[str], str]:
    """The names of columns without the settings that all of them name, and these settings."""
    parts = [[p.partition("=") for p in n.partition(" (identical")[0].split(", ")] for n in names]
    keys = {tuple(key for key, _, _ in part) for part in parts}
    if len(keys) != 1 or not all(sign for part in parts for _, sign, _ in part):
        return list(names), ""
    return [", ".join(v for _, _, v in part) for part in parts], ", ".join(*keys)


def _short_names(names: Iterable[Any]) -> list[str]:
    """Names of layers without the part before the number of their block, where all have one."""
    starts = [re.match(r"(?:[^.]+\.)+?(?=\d+\.)", str(name)) for name in names]
    prefixes = {start[0] for start in starts if start}
    return [
        str(name).removeprefix(*prefixes) if len(prefixes) == 1 else str(name) for name in names
    ]


def _few_rows(values: pd.DataFrame) -> pd.DataFrame:
    """Layers by cells; where there are too many layers, their means by kind."""
    rows = [{"name": name} for name in values.index]
    if len(rows) <= MOST_ROWS:
        return values
    groups = grouped(rows, MOST_ROWS)
    means = {f"{kind} ({len(own)})": values.loc[[row["name"] for row in own]].mean()
             for kind, own in groups.items()}  # fmt: skip
    return pd.DataFrame(means).T

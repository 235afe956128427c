"""Figures of the steps of one run: the loss along directions, and the map of a damping scan."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.results import figure_style as style
from fisher_lab.results import labels

PANELS = {
    "own": "batches of the factors",
    "choosing": "held-out: the half that chooses; bars: the other",
}
ABOVE = 0.6
"""Part of the deepest fall that is shown above zero: what rises further leaves the panel."""


@style.styled
def step_figure(result: Mapping[str, Any]) -> Figure:
    """The change of the loss against the distance moved, for every direction of a run.

    The marks are the lengths that were tried; the large mark is the chosen one. Its bar is what the
    half of the held-out batches found that judges, with its 95 % interval.

    Args:
        result: ``rows`` of ``step_curve.csv``, and ``eta``: the distance of the step of the
            quadratic model along the first direction, or None.
    """
    figure, panels = style.new_figure(width=2 * style.WIDTH, height=style.HEIGHT, panels=2)
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    names = list(dict.fromkeys(row["direction"] for row in rows))
    for axes, (part, title) in zip(panels, PANELS.items(), strict=True):
        deepest = 0.0
        for i, name in enumerate(names):
            own = [row for row in rows if row["direction"] == name]
            own = [row for row in own if _number(row[f"{part}_change"])]
            deepest = min([deepest, *(1e3 * row[f"{part}_change"] for row in own)])
            lows = [row["judging_low"] for row in own if part != "own"]
            deepest = min([deepest, *(1e3 * low for low in lows if _number(low))])
            _draw_direction(axes, own, part, labels.words("direction", name), style.look(i))
        axes.axhline(0.0, color="#888888", linewidth=0.6)
        if deepest < 0:
            axes.set_ylim(1.25 * deepest, -ABOVE * deepest)
        if result.get("eta"):
            axes.axvline(
                result["eta"], color=style.COLOURS[0], linestyle=":", linewidth=1,
                label=labels.metric("ng/eta").label,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="distance moved, |t d|")
        axes.set_title(title, **style.NOTE)
    panels[0].set_ylabel("change of the loss, mnat a token")
    style.legend(figure, panels[0], len(names) + bool(result.get("eta")))
    figure.set_label(
        "Change of the loss against the length of the step (the sign is Adam's first step)"
    )
    return figure


def _draw_direction(
    axes: Axes, rows: Sequence[Mapping[str, Any]], part: str, name: str, look: Mapping[str, Any]
) -> None:
    """One curve with its errors, and a larger mark at the chosen length."""
    rows = sorted(rows, key=lambda row: row["distance"])
    x = [row["distance"] for row in rows]
    y = [1e3 * row[f"{part}_change"] for row in rows]
    axes.plot(x, y, label=name, **{**look, "markersize": 3})
    for row, value in zip(rows, y, strict=True):
        if not row["chosen"]:
            continue
        axes.plot(
            row["distance"], value, look["marker"], color=look["color"], markersize=8,
            markerfacecolor="none",
        )  # fmt: skip
        if part != "own" and _number(row["judging_low"]):
            middle, low, high = (1e3 * row[f"judging_{key}"] for key in ("change", "low", "high"))
            error = [[middle - low], [high - middle]]
            axes.errorbar(
                row["distance"], middle, yerr=error, fmt="_", color=look["color"], capsize=2,
                linewidth=0.9,
            )  # fmt: skip


def _number(value: Any) -> bool:
    return value is not None and value == value and abs(value) != float("inf")


@style.styled
def scan_figure(result: Mapping[str, Any]) -> Figure:
    """The judged change of the loss for every pair of dampings of a scan, the run's own marked.

    Args:
        result: ``rows`` of ``damping_scan.csv``.
    """
    figure, (axes,) = style.new_figure()
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    sides = [sorted({row[f"factor_{side}"] for row in rows}) for side in ("A", "G")]
    values = {(r["factor_A"], r["factor_G"]): r for r in rows}
    grid = [[1e3 * values[a, g]["judging_change"] for a in sides[0]] for g in sides[1]]
    image = axes.imshow(grid, origin="lower", cmap="viridis_r", aspect="auto")
    for (i, a), (j, g) in itertools.product(enumerate(sides[0]), enumerate(sides[1])):
        row = values[a, g]
        text = f"{1e3 * row['judging_change']:.1f}\n±{1e3 * (row['judging_se'] or 0.0):.1f}"
        dark = grid[j][i] > 0.5 * (min(map(min, grid)) + max(map(max, grid)))
        axes.text(i, j, text, ha="center", va="center", fontsize=5.5,
                  color="white" if dark else "black")  # fmt: skip
        for key, colour, size in (("default", style.COLOURS[1], 22), ("chosen", "black", 26)):
            if row[key]:
                axes.plot(i, j, "s", markersize=size, markerfacecolor="none", color=colour)
    for axis, side, numbers in (("x", "A", sides[0]), ("y", "G", sides[1])):
        names = [f"{values_of(rows, side)[n]:.3g}" for n in numbers]
        getattr(axes, f"set_{axis}ticks")(range(len(numbers)), names)
        getattr(axes, f"set_{axis}label")(f"damping of {side}{result.get('unit', '')}")
    figure.colorbar(image, ax=axes, label="held-out change, mnat a token")
    axes.set_title("red: the run's own dampings; black: those the other half chose", **style.NOTE)
    figure.set_label("Held-out change for every pair of dampings")
    return figure


def values_of(rows: Sequence[Mapping[str, Any]], side: str) -> dict[float, float]:
    """Returns the multiple of the run's own damping -> the damping of one side."""
    return {row[f"factor_{side}"]: row[f"damping_{side}"] for row in rows}

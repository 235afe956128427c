"""The figure of ``task=ladder``: how near every rung comes to the exact answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fisher_lab.results import figure_style as style
from fisher_lab.results import labels

EXACT = "exact"
"""The rung that the others are compared with."""


@style.styled
def ladder_figure(result: Mapping[str, Any]) -> Figure:
    """The relative error and the cosine of every rung, over all layers and layer by layer.

    Args:
        result: ``rows`` of ``ladder.csv``.
    """
    figure, panels = style.new_figure(width=2 * style.WIDTH, height=style.HEIGHT, panels=2)
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    named = {"error": "relative error, |x - x*| / |x*|", "cosine": "cosine with the exact answer"}
    for axes, key in zip(panels, named, strict=True):
        shown = dict.fromkeys(row["rung"] for row in rows if row[key] is not None)
        names = [name for name in shown if name != EXACT]
        for place, name in enumerate(names):
            own = [row for row in rows if row["rung"] == name]
            known = [row for row in own if row[key] is not None and row[key] == row[key]]
            layers = [row[key] for row in known if row["layer"] != "all"]
            whole = [row[key] for row in known if row["layer"] == "all"]
            axes.plot([place] * len(layers), layers, ".", color="#999999", markersize=3,
                      label="a layer" if place == 0 else None)  # fmt: skip
            axes.plot([place] * len(whole), whole, "s", color=style.COLOURS[0], markersize=6,
                      label="all layers" if place == 0 else None)  # fmt: skip
        words = [labels.words("rung", n).replace(", ", ",\n").replace("-d", "-\nd") for n in names]
        axes.set_xticks(range(len(names)), words, fontsize=5)
        axes.set_ylabel(named[key])
    panels[0].set_yscale("log")
    panels[0].axhline(1.0, color="#888888", linewidth=0.6)
    panels[1].axhline(0.0, color="#888888", linewidth=0.6)
    style.legend(figure, panels[0], 2)
    figure.set_label("How near every rung comes to the exact damped inverse")
    return figure

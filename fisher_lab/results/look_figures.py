"""Figures of the looks at one claim: its statistics between their boundaries."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_lab.results import figure_style as style
from fisher_lab.results import looks
from fisher_lab.results.comparisons import Sample
from fisher_lab.results.looks import Course
from fisher_lab.results.sequential import Path

WIDTH, HEIGHT = 2.6, 1.7
"""Inches of a panel."""

REACH = 2.2
"""How far a panel reaches, in last boundaries: those of the first looks are far larger."""


@style.styled
def path_figure(course: Course) -> Figure | None:
    """The comparison that decided a claim, or is furthest from holding; a panel for each bound.

    The line is the statistic against the bound at every look (of a share the count), the areas are
    where it is decided: beyond the bound in the direction of "holds", or of "does not hold".

    Returns:
        None where no look was made, or numbers were compared without a test.
    """
    number = looks.deciding(course)
    if number is None or not isinstance(path := course.looks[-1].answers[number], Path):
        return None
    sample = course.samples[number]
    bounds = looks.share_bounds(sample) if sample.kind == "share" else sample.bounds
    sides = [side for side, bound in enumerate(bounds) if math.isfinite(bound)]
    if not sides:
        return None
    width = WIDTH * len(sides)
    figure, panels = style.new_figure(width=width, height=HEIGHT, panels=len(sides))
    for axes, side in zip(panels, sides, strict=True):
        _draw(axes, sample, path, side)
        axes.set_title(("above the lower bound?", "below the upper bound?")[side], **style.NOTE)
    panels[0].set_ylabel("count" if sample.kind == "share" else "t")
    figure.set_label(f"{course.hypothesis.text} ({sample.about}; {course.verdict})")
    return figure


def _draw(axes: Axes, sample: Sample, path: Path, side: int) -> None:
    statistic = (path.lower, path.upper)[side]
    limits = {"holds": path.holds_at[side], "fails": path.fails_at[side]}
    n = np.arange(len(limits["holds"])) + path.n[0]
    shown = n <= path.n[-1] + max(3, len(path.n) // 2)
    if sample.kind == "share":
        bottom, top = 0.0, float(n[shown][-1])
    else:
        top = REACH * max(abs(float(one[-1])) for one in limits.values())
        bottom = -top
    for (name, limit), colour, upwards in zip(
        limits.items(), (style.COLOURS[2], style.COLOURS[1]), (side == 0, side == 1), strict=True
    ):
        edge = np.clip(limit[shown], bottom, top)
        axes.plot(n[shown], edge, color=colour, linewidth=0.8, label=name)
        axes.fill_between(n[shown], edge, top if upwards else bottom, color=colour, alpha=0.15)
    seen = np.clip(np.nan_to_num(statistic, nan=0.0), bottom, top)
    axes.plot(path.n, seen, color=style.COLOURS[0], marker="o", markersize=2.5, linewidth=1.0)
    axes.set(xlabel="n", ylim=(bottom, top))

"""How figures look and how they are saved.

A figure has the width of a paper's column. The colours are those of Okabe and Ito (2008), which
colour-blind readers can tell apart; series also differ in marks and dashes, so that a print in grey
is readable. Matplotlib is used without its global state.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from fisher_lab.results.values import label, parse_value
from fisher_lab.runs import atomic

T = TypeVar("T")

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C",
)  # fmt: skip
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
WIDTH, HEIGHT = 3.35, 2.5
"""Inches of a figure in one column of a paper."""
PAGE = 2 * WIDTH
"""Inches of a figure as wide as a page."""
ROUNDING = 1e-9
"""Numbers that differ by less than this fraction of their size differ by rounding."""
LINE = 34
"""Characters of a line beside an axis."""
NOTE: Any = {"fontsize": 6.5, "color": "#444444"}
"""How the note above the axes looks."""
MOST_SERIES = len(COLOURS)
"""Lines that are drawn in one panel: as many as there are colours."""

MOST_PANELS = 9
"""Panels of one figure."""

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    # Text in a PDF remains text.
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 200
TYPES = (".pdf", ".png")
"""How the files of a figure end."""

# fontTools logs every table of every font that it subsets.
logging.getLogger("fontTools").setLevel(logging.WARNING)


def new_figure(
    width: float = WIDTH, height: float = HEIGHT, panels: int = 1, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels side by side, in inches.

    Args:
        width: of the figure.
        height: of a line of panels.
        panels: how many there are.
        columns: of them in a line; by default all.
    """
    columns = columns or panels
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    panel_axes = grid[:panels]
    for axes in grid[panels:]:
        axes.remove()
    for axes in panel_axes:
        # A dollar sign in a metric's name is a dollar sign and does not begin mathematics.
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_parse_math(False)
    return figure, panel_axes


def merge(
    names: Sequence[str], apart: Callable[[str, str], float], least: float = ROUNDING
) -> dict[str, str]:
    """The words for lines, those that are equal up to rounding as one, and the name of one of each.

    Args:
        names: of the lines: settings and their values, as ``damping=1e-4, policy=auto``.
        apart: how much two lines differ, as a fraction of their size.
        least: fraction from which on they differ.
    """
    groups: list[list[str]] = []
    for name in names:
        own = next((group for group in groups if apart(group[0], name) <= least), None)
        groups.append([name]) if own is None else own.append(name)
    return {_one_name(g, max(apart(g[0], name) for name in g)): g[0] for g in groups}


def _one_name(names: Sequence[str], apart: float) -> str:
    """``policy=all|auto (identical to 2e-15)``."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(", ") for name in names]
    words = f"{names[0]} and {len(names) - 1} more"
    if len({len(part) for part in parts}) == 1:
        differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1:
            (at,) = differing
            values = "|".join(part[at].partition("=")[2] for part in parts)
            one = f"{parts[0][at].partition('=')[0]}={values}"
            words = ", ".join([*parts[0][:at], one, *parts[0][at + 1 :]])
    return f"{words} (identical{f' to {apart:.0e}' if apart else ''})"


def name_axes(axes: Axes, x: str, y: str, line: int = LINE) -> None:
    """Name both axes, in lines that are no longer than an axis of a column's figure."""
    axes.set_xlabel(textwrap.fill(x, line))
    axes.set_ylabel(textwrap.fill(y, line))


def note(axes: Axes, text: str) -> None:
    """Write a note above the axes, in lines that fit there."""
    axes.set_title(textwrap.fill(text, 46), **NOTE)


def is_wide(figure: Figure) -> bool:
    """Whether a figure is for the width of a page, and not of a column."""
    return figure.get_figwidth() > 1.5 * WIDTH


def legend(figure: Figure, axes: Axes, count: int) -> None:
    """The legend of more than one series, below the axes, where it hides no point."""
    if count < 2:
        return
    handles, names = axes.get_legend_handles_labels()
    width = max(map(len, names), default=0)
    columns = max(int((2 if is_wide(figure) else 1) * 56 / (width + 6)), 1)
    made = figure.legend(
        handles, names, loc="outside lower center", frameon=False, ncols=min(columns, count)
    )
    for text in made.get_texts():
        text.set_parse_math(False)
    figure.set_figheight(figure.get_figheight() + math.ceil(count / columns) * 0.13)


def styled(make: Callable[..., T]) -> Callable[..., T]:
    """Decorator: a function draws in this style, which matplotlib looks up while it draws."""

    @functools.wraps(make)
    def in_style(*args: Any, **kwargs: Any) -> T:
        with rc_context(STYLE):
            return make(*args, **kwargs)

    return in_style


def look(i: int) -> dict[str, Any]:
    """Colour, mark and dashes of series number ``i``."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKS[i % len(MARKS)],
        "linestyle": DASHES[(i // len(COLOURS)) % len(DASHES)],
    }


def save(figure: Figure, target: Path) -> list[Path]:
    """Write a figure as PDF and PNG to a path without suffix, and return both files.

    They bear no dates: the same numbers give the same bytes.
    """
    files = []
    with rc_context(STYLE):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout costs as much as drawing: once for both
    for suffix, about in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        file = target.with_name(f"{target.name}.{suffix}")
        with rc_context(STYLE), atomic.writing(file) as temporary:
            figure.savefig(temporary, format=suffix, dpi=DPI, metadata=about)
        files.append(file)
    return files


def file_name(text: str) -> str:
    """A file's name made of a metric's or a setting's."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.") or "figure"


def positions(values: Sequence[Any]) -> tuple[list[float], bool]:
    """Where the values of a setting are drawn on an axis.

    Numbers are drawn at their value, on a logarithmic axis where they span a decade or more; null
    is drawn one step further, and anything else at 0, 1, 2, ...

    Args:
        values: in order.

    Returns:
        The positions, and whether the axis is logarithmic.
    """
    known = [parse_value(v) for v in values]
    numbers = [v for v in known if isinstance(v, float)]
    rest = [v for v in known if not isinstance(v, float)]
    if len(numbers) < 2 or any(v is not None for v in rest):
        return [float(i) for i in range(len(values))], False
    log = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
    last = max(numbers)
    if log:
        step = (last / min(numbers)) ** (1 / (len(numbers) - 1))
        beyond = last * max(step, 2.0)
    else:
        beyond = last + (last - min(numbers)) / (len(numbers) - 1)
    return [v if isinstance(v, float) else beyond for v in known], log


def set_ticks(axes: Axes, values: Sequence[Any], at: Sequence[float], log: bool) -> None:
    """Ticks at the swept values, and nowhere else."""
    if log:
        axes.set_xscale("log")
    names = [label(v) for v in values]
    figure, grid = axes.get_figure(root=True), axes.get_gridspec()
    panel = figure.get_figwidth() / WIDTH / grid.ncols if figure and grid else 1.0
    long = sum(map(len, names)) > 34 * panel or len(names) > 7
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    name_ticks(axes, names, 40 if long else 0, list(at))
    if not log and len(at) > 1:
        axes.margins(x=0.1)


def name_ticks(
    axes: Axes, names: Sequence[str], rotation: float = 60, at: Sequence[float] | None = None
) -> None:
    """Names below the x axis at some positions; by default at 0, 1, 2, ..."""
    axes.set_xticks(
        range(len(names)) if at is None else at,
        list(names),
        rotation=rotation,
        ha="right" if rotation else "center",
        parse_math=False,
    )


OUTLIER = 1000.0
"""Where the largest number is so many times the middle one, an axis is logarithmic beyond it."""


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where positive numbers span decades.

    Where signs or zeros forbid it and some numbers are far larger than the others, it is so beyond
    the middle one alone.
    """
    finite = [v for v in values if math.isfinite(v)]
    if spans_decades(finite):
        axes.set_yscale("log")
        return
    sizes = sorted(abs(v) for v in finite if v)
    if sizes and sizes[-1] >= OUTLIER * sizes[len(sizes) // 2]:
        axes.set_yscale("symlog", linthresh=sizes[len(sizes) // 2])


def panels_of(names: Sequence[str]) -> list[list[str]]:
    """The lines of every panel: no panel has more than there are colours."""
    panels = max(math.ceil(len(names) / MOST_SERIES), 1)
    each = math.ceil(len(names) / panels)
    return [list(names[i * each : (i + 1) * each]) for i in range(panels)]


def same_scale(panels: Sequence[Axes]) -> None:
    """Give all panels the y axis that shows the numbers of all."""
    kinds = {axes.get_yscale() for axes in panels}
    if len(kinds) == 1:
        low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
        for axes in panels:
            axes.set_ylim(min(low), max(high))


def spans_decades(values: Sequence[float], decades: float = 2.0) -> bool:
    """Whether positive numbers are better shown on a logarithmic axis."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= 10**decades

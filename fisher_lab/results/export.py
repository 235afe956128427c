r"""A table as text for the terminal, CSV, Markdown, LaTeX and HTML, with every text escaped.

The CSV has all numbers in full, one line per cell and metric; the others show them with the digits
that the interval leaves. Rich writes to the terminal, pandas the CSV and the LaTeX tabular, Jinja2
the HTML. pandas' Styler escapes only LaTeX's special characters and neither splits nor shrinks a
wide table, so that escaping and the ``table`` environment are ours. A LaTeX fragment is for
``\\input``; a document compiles as it is, with pdflatex, lualatex or tectonic.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from fisher_lab.results import labels
from fisher_lab.results.stats import Paired
from fisher_lab.results.table import FEW, CellKey, Comparison, Key, Table
from fisher_lab.results.values import Rounded, label
from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status

if TYPE_CHECKING:
    from jinja2 import Environment

TABLE_FILE = "table"
BEST, TIE = "*", "~"
NONE = "\u2013"


@dataclass(frozen=True)
class CellText:
    """What a cell shows.

    Attributes:
        number: the number and half its interval; None where there is no number.
        other: the number of the second run, where there are two.
        ends: digits of both quartiles, where the number is a median, or of the interval where it
            does not lie in its middle.
        state: the runs that are lost, in words.
        mark: :data:`BEST`, :data:`TIE` or nothing.
        deviation: the standard deviation, where it is asked for.
        runs: how many runs the number rests on, where that is asked for.
        value: the number in full.
        reasons: why runs were lost.
    """

    number: Rounded | None
    other: Rounded | None = None
    ends: tuple[str, str] | None = None
    state: str = ""
    mark: str = ""
    deviation: Rounded | None = None
    runs: int | None = None
    value: float = math.nan
    reasons: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Its class in HTML."""
        return {BEST: "best", TIE: "tie"}.get(self.mark, "") if self.number else "lost"

    @property
    def plain(self) -> str:
        """For the terminal, Markdown and HTML."""
        if self.number is None:
            return self.state or NONE
        text = ", ".join(one.plain for one in (self.number, self.other) if one)
        if self.ends:
            power = f"e{self.number.exponent}" if self.number.exponent else ""
            text = f"{self.number.value}{power} [{', '.join(self.ends)}]{power}"
        details = [f"sd {self.deviation.plain}"] if self.deviation else []
        details += [f"n {self.runs}"] if self.runs else []
        beside = "; ".join(part for part in (", ".join(details), self.state) if part)
        return f"{text}{self.mark and f' {self.mark}'}{beside and f' ({beside})'}"


def cell_text(table: Table, key: CellKey) -> CellText:
    """What one cell of a table shows: its number to the digits that count, and lost runs."""
    cell, statistic = table.cells[key], table.statistic[key[1]]
    s = cell.summary
    if s.n == 0:
        return CellText(None, state=cell.state or Status.MISSING, reasons=cell.reasons)
    number, ends, other, deviation = cell.rounded(statistic), None, None, None
    _, low, high = table.point(key)
    if s.n == FEW - 1:
        number, other = map(Rounded, cell.values)
        other = other if other.plain != number.plain else None
    elif (statistic != "mean" or cell.method == "log") and number.spread is not None:
        ends = (_like(number, low), _like(number, high))
    if table.details and statistic == "mean" and s.n >= FEW:
        deviation = Rounded(s.std, digits=2)
    mark = BEST if key in table.best else TIE if key in table.ties else ""
    runs = s.n if table.details else None
    value = table.point(key)[0]
    return CellText(number, other, ends, cell.state, mark, deviation, runs, value, cell.reasons)


def _like(number: Rounded, value: float) -> str:
    """``value`` with the power and the decimals of a rounded number."""
    decimals = len(number.value.partition(".")[2])
    return f"{value / 10.0**number.exponent:.{decimals}f}"


@dataclass(frozen=True)
class Grid:
    """What every output shows of a table, or of its differences to a baseline.

    Attributes:
        names: the headings.
        left: how many columns, from the left, are of texts.
        rows: texts and cells.
    """

    names: list[str]
    left: int
    rows: list[list[str | CellText]]


Column = tuple[str, Key]
"""Metric and column of a table."""


def varying(table: Table) -> tuple[list[Column], str]:
    """The columns that say something, and what the others show, in words.

    A column that shows the same in all of several rows, or zero in a single one, is left out.
    """
    kept: list[Column] = []
    alike: dict[str, list[str]] = {}
    for metric, col in table.columns:
        cells = [cell_text(table, (row, metric, col)) for row in table.rows]
        texts = {cell.plain.rstrip(f" {BEST}{TIE}") for cell in cells}
        whole = all(cell.number and not cell.state for cell in cells)
        if len(texts) == 1 and whole and (len(cells) > 1 or cells[0].value == 0):
            words = labels.metric(metric).short
            alike.setdefault(texts.pop(), []).append(", ".join([words, *map(label, col)]))
        else:
            kept.append((metric, col))
    if not kept:
        return table.columns, ""
    parts = [f"{', '.join(names)} ({text})" for text, names in alike.items()]
    where = "all rows" if len(table.rows) > 1 else "every run"
    return kept, f"the same in {where}, to the digits shown: {'; '.join(parts)}" if parts else ""


def grid(table: Table, columns: Sequence[Column] | None = None, *, symbols: bool = False) -> Grid:
    """The cells of a table with the labels of their rows, in some of its columns or in all."""
    columns = table.columns if columns is None else columns
    rows = [
        [*map(label, row), *(cell_text(table, (row, m, c)) for m, c in columns)]
        for row in table.rows
    ]
    names = [labels.setting(name).with_symbol for name in table.row_names]
    names += [table.heading(m, c, symbols) for m, c in columns]
    return Grid(names, len(table.row_names), rows)


def differences(table: Table) -> Grid | None:
    """The comparisons with the baseline, in words; None where there is no baseline.

    A row has the settings of the cell, its metric, the difference with its interval, p after Holm's
    correction, the effect size and the number of pairs.
    """
    if not table.comparisons:
        return None
    names = [*table.row_names, *table.col_names]
    left = [*(labels.setting(name).with_symbol for name in names), "metric"]
    rows: list[list[str | CellText]] = [
        [
            *map(label, row),
            *map(label, col),
            labels.metric(metric).heading,
            *_difference_words(comparison),
        ]
        for (row, metric, col), comparison in table.comparisons.items()
        if not comparison.is_baseline
    ]
    return Grid([*left, "difference", "p (Holm)", "d", "pairs"], len(left), rows)


def _difference_words(comparison: Comparison) -> tuple[str, str, str, str]:
    d = comparison.difference
    if d is None:
        return ("no pairs", "", "", "0")
    times = " times" if d.as_ratio else ""
    if d.exact:
        return ("identical" if d.identical else f"{d.mean:.4g}{times} (exact)", "", "", str(d.n))
    if d.n == 1:
        return (f"{d.mean:.4g}{times} (one pair)", "", "", "1")
    p = comparison.p_holm
    p_words = "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    words = Rounded(d.mean, (d.high - d.low) / 2).plain
    if d.as_ratio:
        words = f"{d.mean:.3g} times [{d.low:.3g}, {d.high:.3g}]"
    return (words, p_words, f"{d.effect:.2f}", str(d.n))


def write_table(table: Table, full: Table, directory: Path, **given: Any) -> list[Path]:
    """Write a table as Markdown and LaTeX, and one of the same cells with more metrics as CSV.

    Args:
        table: of cells.
        full: of the same cells.
        directory: made where it is missing.
        given: options of :func:`to_latex`.
    """
    texts = {
        "csv": to_csv(full),
        "md": to_markdown(table),
        "tex": to_latex(table, **given),
    }
    files = {directory / f"{TABLE_FILE}.{suffix}": text for suffix, text in texts.items()}
    for file, text in files.items():
        atomic.write_text(file, text)
    return list(files)


# ---- terminal ------------------------------------------------------------------------------------


def to_terminal(table: Table, width: int = 100) -> RenderableType:
    """The table for a terminal of some width; columns that do not fit are put in a block below."""
    parts: list[RenderableType] = [Text(table.title, style="bold"), Text()]
    grids = [grid(table, columns) for columns in _blocks(table, table.columns, width)]
    for one in (*grids, *filter(None, [differences(table)])):
        names = ["\n".join(_lines(name)) for name in one.names]
        out = rich_table(names[: one.left], names[one.left :])
        for row in one.rows:
            out.add_row(*map(_styled, row))
        parts += [out, Text()]
    parts += [Text(note, style="dim") for note in table.notes]
    return Group(*parts)


def rich_table(left: Sequence[str], right: Sequence[str]) -> RichTable:
    """An empty table with headings over columns that are aligned left, then right."""
    out = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in left:
        out.add_column(Text(name), overflow="fold")
    for name in right:
        out.add_column(Text(name), justify="right", overflow="fold")
    return out


def _styled(cell: str | CellText) -> Text:
    if isinstance(cell, str):
        return Text(cell)
    style = "bold" if cell.mark == BEST else "red" if cell.number is None else ""
    return Text(cell.plain, style=style)


def _blocks(table: Table, columns: Sequence[Column], width: int) -> Iterable[list[Column]]:
    """The columns in groups that fit, with headings in some lines, beside the row labels."""
    left = sum(
        2 + max(*map(len, _lines(name)), *(len(label(row[i])) for row in table.rows))
        for i, name in enumerate(grid(table, ()).names)
    )
    block: list[Column] = []
    room = width - left
    for metric, col in columns:
        need = 2 + max(
            *map(len, _lines(table.heading(metric, col))),
            *(len(cell_text(table, (row, metric, col)).plain) for row in table.rows),
        )
        if block and need > room:
            yield block
            block, room = [], width - left
        block.append((metric, col))
        room -= need
    yield block


HEADING = 18
"""Characters of a line of a heading, where its words allow it."""


def _lines(text: str) -> list[str]:
    """The lines of a heading, broken between words."""
    return textwrap.wrap(text, HEADING, break_long_words=False, break_on_hyphens=False) or [""]


def to_text(table: Table, width: int = 100) -> str:
    """The table as plain text, as a terminal without colours shows it."""
    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False, markup=False)
    console.print(to_terminal(table, width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


# ---- CSV -----------------------------------------------------------------------------------------

NUMBERS = (
    "n", "expected", "mean", "std", "low", "high", "median", "q1", "q3", "statistic", "state",
    "best",
)  # fmt: skip
COMPARED = (
    "difference", "difference_low", "difference_high", "p", "p_holm", "effect", "pairs",
    "ratio", "ratio_low", "ratio_high",
)  # fmt: skip


def to_csv(table: Table) -> str:
    """All numbers in full, one line per cell and metric."""
    lines = []
    for row, (metric, col) in itertools.product(table.rows, table.columns):
        key = (row, metric, col)
        cell, s = table.cells[key], table.cells[key].summary
        line = [*map(label, row), *map(label, col), metric, s.n, cell.expected]
        line += [s.mean, s.std, s.low, s.high, s.median, s.q1, s.q3]
        mark = "best" if key in table.best else "tie" if key in table.ties else ""
        line += [table.statistic[metric], cell.state, mark]
        comparison = table.comparisons.get(key)
        if comparison is not None:
            d = comparison.difference
            words = "baseline" if comparison.is_baseline else ""
            line += [words, *[None] * 9] if d is None else _compared(comparison, d)
        lines.append(list(map(_safe, line)))
    names = [*table.row_names, *table.col_names, "metric", *NUMBERS]
    names += COMPARED if table.comparisons else ()
    frame = pd.DataFrame(lines, columns=names, dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _compared(comparison: Comparison, d: Paired) -> list[Any]:
    """The columns :data:`COMPARED`; of a ratio those of the difference are empty."""
    ends, none = [d.mean, d.low, d.high], [None] * 3
    tested = [d.p, comparison.p_holm, d.effect, d.n]
    return [*none, *tested, *ends] if d.as_ratio else [*ends, *tested, *none]


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is quoted by an apostrophe."""
    if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r"):
        return "'" + value
    return value


# ---- Markdown ------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown; pandas needs one more package for it and escapes less."""
    lines = [f"**{_md(table.title)}**"]
    for one in filter(None, [grid(table), differences(table)]):
        align = ["---"] * one.left + ["---:"] * (len(one.names) - one.left)
        rows = [map(_md, one.names), align, *(map(_md_cell, row) for row in one.rows)]
        lines += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", *(f"- {_md(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _md_cell(cell: str | CellText) -> str:
    if isinstance(cell, str):
        return _md(cell)
    return f"**{_md(cell.plain)}**" if cell.mark == BEST else _md(cell.plain)


def _md(text: str) -> str:
    text = html.escape(text, quote=False).replace("\n", " ")
    return "".join("\\" + c if c in "\\|*_`[]~" else c for c in text)


# ---- HTML ----------------------------------------------------------------------------------------


@functools.cache
def templates() -> Environment:
    """The HTML templates, which escape every text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fisher_lab.results"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def to_html(table: Table) -> str:
    """The table as an HTML fragment; ``data-sort`` holds the number in full."""
    page: Any = templates().get_template("table.html.j2").module
    columns, alike = varying(table)
    grids = filter(None, [grid(table, columns, symbols=True), differences(table)])
    parts = [page.grid(one.names, one.rows, one.left) for one in grids]
    return "\n".join(
        map(str, [*parts, page.notes([*map(labels.in_words, filter(None, [alike, *table.notes]))])])
    )


# ---- LaTeX ---------------------------------------------------------------------------------------

SPECIAL = {
    "\\": r"\textbackslash{}",
    "[": "{[}",  # after the end of a line it would begin a length
    "]": "{]}",
    "*": "{*}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"$\sim$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "\u00a0": "~",
    "\u2013": "--",
    "—": "---",
    "\u00d7": r"$\times$",
    "κ": r"$\kappa$",
    "λ": r"$\lambda$",
    "η": r"$\eta$",
    "\u03c1": r"$\rho$",
    "Δ": r"$\Delta$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "\u2212": r"$-$",
    "…": r"\dots{}",
    "·": r"$\cdot$",
}
"""How LaTeX writes the characters that it would take for commands, or that its fonts lack."""

HAT = re.compile("([A-Za-z])\u0302")

PREAMBLE = r"""\documentclass[10pt,a4paper]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs}
\usepackage{siunitx}
\usepackage{graphicx}
\usepackage{longtable}
\usepackage{array}
"""

PAGE_WIDTH, PAGE_ROWS = 132, 45
"""Characters of a table on a page, and its lines; further columns go below it or onto another."""


def escape(text: str) -> str:
    """Text that LaTeX shows as it is. A character that its fonts lack becomes ``?``."""
    plain = HAT.sub(r"$\\hat{\\mathrm{\1}}$", "".join(map(_latex_character, text)))
    plain = plain.replace("\u0302", "?")
    return re.sub(r"(\$\\[a-z]+)\$\\_(\w+)", r"\1_{\\mathrm{\2}}$", plain)  # of a symbol


def _latex_character(char: str) -> str:
    if char in SPECIAL:
        return SPECIAL[char]
    if char in "\n\r\t":
        return " "
    return char if char == "\u0302" or " " <= char <= "~" or "\u00c0" <= char <= "\u017f" else "?"


def breakable(text: str) -> str:
    """Escaped text in which names may be broken after a slash, a dot, an underscore and the like.

    Numbers and versions are not broken.
    """
    return re.sub(r"(/|\\_|=|[.,](?=[A-Za-z]))", r"\1\\allowbreak{}", escape(text))


def document(body: str, title: str = "") -> str:
    """A document that compiles as it is, from LaTeX and a title in plain text."""
    head = f"\\title{{{escape(title)}}}\n\\date{{}}\n" if title else ""
    made = "\\maketitle\n" if title else ""
    return f"{PREAMBLE}{head}\\begin{{document}}\n{made}{body}\n\\end{{document}}\n"


def to_latex(table: Table, *, siunitx: bool = False, about: str = "", outcome: str = "") -> str:
    r"""The table as ``table`` environments for ``\input``; wide ones are set smaller.

    Args:
        table: of cells.
        siunitx: numbers as ``\num``, else in mathematics.
        about: what the caption begins with; by default the table's title.
        outcome: LaTeX at the end of the caption.
    """
    columns, alike = varying(table)
    said = map(labels.in_words, filter(None, [alike, *table.notes]))
    notes = [f"{note[:1].upper()}{note[1:]}." for note in said]
    name = "".join(c if c.isalnum() else "-" for c in table.title)
    named = [labels.setting(one).label for one in table.row_names]
    named = [f"A row for each {' and '.join(named)}."] if about and named else []
    caption = " ".join([f"{(about or table.title).removesuffix('.')}.", *named, *notes])
    grids = [grid(table, block, symbols=True) for block in _blocks(table, columns, PAGE_WIDTH)]
    most = max(1, PAGE_ROWS // (len(table.rows) + 3))
    parts = []
    for number in range(0, len(grids), most):
        title = escape(f"{about or table.title}, continued.") if number else ""
        words = title or f"{escape(caption)} {outcome}".strip()
        own = f"{name}-{number + 1}" if number else name
        parts.append(_environment(grids[number : number + most], _heading, siunitx, words, own))
    found = differences(table)
    if found is not None:
        base = ", ".join(f"{n}={label(v)}" for n, v in table.baseline.items())
        caption = escape(f"{about or table.title}: differences to {labels.in_words(base)}.")
        parts.append(_environment([found], escape, siunitx, caption, f"{name}-differences"))
    needs = "booktabs, graphicx" + (", siunitx" if siunitx else "")
    return f"% needs: {needs}\n" + "\n".join(parts)


def _environment(
    grids: Iterable[Grid], heading: Callable[[str], str], siunitx: bool, caption: str, name: str
) -> str:
    """Tables below one caption, none wider than the line or higher than the page."""
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{name}}}",
            *(_tabular(one, heading, siunitx) for one in grids),
            r"\end{table}",
            "",
        ]
    )


def _tabular(shown: Grid, heading: Callable[[str], str], siunitx: bool) -> str:
    rows = [
        [escape(c) if isinstance(c, str) else _latex_cell(c, siunitx) for c in row]
        for row in shown.rows
    ]
    frame = pd.DataFrame(rows, columns=list(map(heading, shown.names)))
    layout = f"@{{}}{'l' * shown.left}{'r' * (len(shown.names) - shown.left)}@{{}}"
    tabular = frame.style.hide(axis="index").to_latex(column_format=layout, hrules=True)
    return rf"""\par\smallskip
\sbox0{{\small
{tabular.rstrip()}}}
\ifdim\wd0>\linewidth\sbox0{{\resizebox{{\linewidth}}{{!}}{{\usebox0}}}}\fi
\ifdim\dimexpr\ht0+\dp0>0.85\textheight\sbox0{{\resizebox*{{!}}{{0.85\textheight}}{{\usebox0}}}}\fi
\usebox0"""


def _heading(text: str) -> str:
    lines = list(map(escape, _lines(text)))
    if len(lines) == 1:
        return lines[0]
    body = r"\\".join(lines)
    return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{body}\end{{tabular}}"


def _latex_cell(cell: CellText, siunitx: bool) -> str:
    if cell.number is None:
        return rf"\emph{{{escape(cell.state or NONE)}}}"
    text = _number(cell, siunitx)
    if cell.other:
        text = ", ".join([text, _number(CellText(cell.other), siunitx)])
    if cell.mark == BEST:
        plain = siunitx or cell.other
        text = rf"{text}$^{{*}}$" if plain else rf"$\mathbf{{{text[1:-1]}}}^{{*}}$"
    elif cell.mark == TIE:
        text += r"$^{\sim}$"
    details = [f"sd {_number(CellText(cell.deviation), siunitx)}"] if cell.deviation else []
    details += [f"n {cell.runs}"] if cell.runs is not None else []
    text += rf" {{\footnotesize ({', '.join(details)})}}" if details else ""
    return text + (rf" \emph{{({escape(cell.state)})}}" if cell.state else "")


def _number(cell: CellText, siunitx: bool) -> str:
    assert cell.number is not None
    value, spread, exponent = cell.number.value, cell.number.spread, cell.number.exponent
    ends = cell.ends
    if siunitx:
        power = f"e{exponent}" if exponent else ""
        if ends:
            low, high = (rf"\num{{{end}}}" for end in ends)
            return rf"\num{{{value}}} [{low}, {high}]" + (rf"\num{{{power}}}" if power else "")
        spread = rf" \pm {spread}" if spread else ""
        return rf"\num[separate-uncertainty]{{{value}{spread}{power}}}"
    power = rf" \times 10^{{{exponent}}}" if exponent else ""
    if ends:
        return rf"${value}\ [{', '.join(ends)}]{power}$"
    if spread is None:
        return f"${value}{power}$"
    return rf"$({value} \pm {spread}){power}$" if power else rf"${value} \pm {spread}$"

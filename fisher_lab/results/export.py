"""A table as text for the terminal, CSV, Markdown, LaTeX and HTML. Every text is escaped.

The CSV holds all the numbers in full, a line a cell and metric; the others show them to the digits
that the interval leaves.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from fisher_lab.results.table import Cell, Comparison, Key, Table
from fisher_lab.results.values import Rounded, label
from fisher_lab.runs.status import Status

BEST, TIE = "*", "~"
NONE = "\u2013"


@dataclass(frozen=True)
class Shown:
    """What a cell shows.

    Attributes:
        number: the number and half its interval; None where there is no number.
        quartiles: digits of both quartiles, where the number is a median.
        state: what is lacking.
        mark: :data:`BEST`, :data:`TIE` or nothing.
        deviation: the standard deviation, where it is asked for.
        runs: how many the number rests on, where that is asked for.
    """

    number: Rounded | None
    quartiles: tuple[str, str] | None = None
    state: str = ""
    mark: str = ""
    deviation: Rounded | None = None
    runs: int | None = None

    @property
    def plain(self) -> str:
        """For the terminal and Markdown."""
        if self.number is None:
            return self.state or NONE
        text = self.number.plain
        if self.quartiles:
            power = f"e{self.number.exponent}" if self.number.exponent else ""
            text = f"{self.number.value}{power} [{', '.join(self.quartiles)}]{power}"
        details = [f"sd {self.deviation.plain}"] if self.deviation else []
        details += [f"n {self.runs}"] if self.runs else []
        beside = "; ".join(part for part in (", ".join(details), self.state) if part)
        return f"{text}{self.mark and f' {self.mark}'}{beside and f' ({beside})'}"


def shown(table: Table, key: tuple[Key, str, Key]) -> Shown:
    """What one cell of a table shows."""
    cell = table.cells[key]
    mark = BEST if key in table.best else TIE if key in table.ties else ""
    return show_cell(cell, table.statistic[key[1]], mark, table.details)


def show_cell(cell: Cell, statistic: str = "mean", mark: str = "", details: bool = False) -> Shown:
    """What a cell shows: its number to the digits that count, and what is lacking.

    Args:
        cell: of a table.
        statistic: ``mean`` or ``median``.
        mark: of the cell.
        details: with the standard deviation (of a mean) and the number of runs.
    """
    s = cell.summary
    if s.n == 0:
        return Shown(None, state=cell.state or Status.MISSING)
    number, ends, deviation = cell.rounded(statistic), None, None
    if statistic != "mean" and number.spread is not None:
        ends = (_like(number, s.q1), _like(number, s.q3))
    if details and statistic == "mean" and s.n > 1:
        deviation = Rounded(s.std, digits=2)
    return Shown(number, ends, cell.state, mark, deviation, s.n if details else None)


def _like(number: Rounded, value: float) -> str:
    """``value`` with the power and the decimals of a rounded number."""
    decimals = len(number.value.partition(".")[2])
    return f"{value / 10.0**number.exponent:.{decimals}f}"


def differences(table: Table) -> list[tuple[list[str], Comparison]]:
    """The comparisons with the baseline: labels of the cell and its metric, and the comparison."""
    return [
        ([*map(label, row), *map(label, col), metric], comparison)
        for (row, metric, col), comparison in table.comparisons.items()
        if not comparison.is_baseline
    ]


def difference_words(comparison: Comparison) -> tuple[str, str, str, str]:
    """Difference with its interval, p after Holm, effect size, pairs."""
    d = comparison.difference
    if d is None:
        return ("no pairs", "", "", "0")
    if d.exact:
        return ("identical" if d.identical else f"{d.mean:.4g} (exact)", "", "", str(d.n))
    if d.n == 1:
        return (f"{d.mean:.4g} (one pair)", "", "", "1")
    number = Rounded(d.mean, (d.high - d.low) / 2)
    return (number.plain, p_words(comparison.p_holm), f"{d.effect:.2f}", str(d.n))


def p_words(p: float) -> str:
    """``0.012``, ``< 0.001``."""
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


DIFFERENCE_HEADINGS = ("difference", "p (Holm)", "d", "pairs")


def heading_row(table: Table) -> list[str]:
    """The names over the columns of a table."""
    return [*table.row_names, *(table.heading(m, c) for m, c in table.columns)]


# ---- terminal ------------------------------------------------------------------------------------


def to_terminal(table: Table, width: int = 100) -> RenderableType:
    """The table for a terminal; columns that do not fit are put in a block below.

    Args:
        table: of cells.
        width: characters that there are.
    """
    parts: list[RenderableType] = [Text(table.title, style="bold"), Text()]
    for columns in blocks(table, width):
        parts += [_rich(table, columns), Text()]
    if table.comparisons:
        parts += [_rich_differences(table), Text()]
    parts += [Text(note, style="dim") for note in table.notes]
    return Group(*parts)


def blocks(
    table: Table, width: int, room_of: Callable[[str], int] = len
) -> Iterable[list[tuple[str, Key]]]:
    """The columns in groups that fit beside the rows' names into so many characters.

    Args:
        table: of cells.
        width: characters that there are.
        room_of: characters that a heading takes; its length where it stands in one line.
    """
    left = sum(
        2 + max(len(name), *(len(label(row[i])) for row in table.rows))
        for i, name in enumerate(table.row_names)
    )
    block: list[tuple[str, Key]] = []
    room = width - left
    for metric, col in table.columns:
        need = 2 + max(
            room_of(table.heading(metric, col)),
            *(len(shown(table, (row, metric, col)).plain) for row in table.rows),
        )
        if block and need > room:
            yield block
            block, room = [], width - left
        block.append((metric, col))
        room -= need
    yield block


def _rich(table: Table, columns: Sequence[tuple[str, Key]]) -> RichTable:
    out = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in table.row_names:
        out.add_column(Text(name))
    for metric, col in columns:
        out.add_column(Text(table.heading(metric, col)), justify="right")
    for row in table.rows:
        cells = [shown(table, (row, metric, col)) for metric, col in columns]
        out.add_row(*(Text(label(value)) for value in row), *map(_styled, cells))
    return out


def _styled(cell: Shown) -> Text:
    style = "bold" if cell.mark == BEST else "red" if cell.number is None else ""
    return Text(cell.plain, style=style)


def _rich_differences(table: Table) -> RichTable:
    out = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in (*table.row_names, *table.col_names, "metric"):
        out.add_column(Text(name))
    for name in DIFFERENCE_HEADINGS:
        out.add_column(name, justify="right")
    for labels, comparison in differences(table):
        out.add_row(*(Text(word) for word in (*labels, *difference_words(comparison))))
    return out


def to_text(table: Table, width: int = 100) -> str:
    """The table as plain text, as a terminal without colours shows it."""
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    console.print(to_terminal(table, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


# ---- CSV -----------------------------------------------------------------------------------------

NUMBERS = (
    "n", "expected", "mean", "std", "low", "high", "median", "q1", "q3", "statistic", "state",
    "best",
)  # fmt: skip
COMPARED = ("difference", "difference_low", "difference_high", "p", "p_holm", "effect", "pairs")


def to_csv(table: Table) -> str:
    """All numbers in full: a line a cell and metric."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    compared = COMPARED if table.comparisons else ()
    writer.writerow([*table.row_names, *table.col_names, "metric", *NUMBERS, *compared])
    for row in table.rows:
        for metric, col in table.columns:
            key = (row, metric, col)
            line = [*map(label, row), *map(label, col), metric, *_numbers(table, key)]
            if compared:
                line += _compared(table.comparisons[key])
            writer.writerow(["" if v is None or v != v else v for v in map(_safe, line)])
    return out.getvalue()


def _numbers(table: Table, key: tuple[Key, str, Key]) -> list[Any]:
    cell, s = table.cells[key], table.cells[key].summary
    mark = "best" if key in table.best else "tie" if key in table.ties else ""
    numbers = [s.n, cell.expected, s.mean, s.std, s.low, s.high, s.median, s.q1, s.q3]
    return [*numbers, table.statistic[key[1]], cell.state, mark]


def _compared(comparison: Comparison) -> list[Any]:
    d = comparison.difference
    if d is None:
        return ["baseline" if comparison.is_baseline else "", *[None] * 6]
    return [d.mean, d.low, d.high, d.p, comparison.p_holm, d.effect, d.n]


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is quoted by an apostrophe."""
    if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r"):
        return "'" + value
    return value


# ---- Markdown ------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    lines = [f"**{_md(table.title)}**", ""]
    align = ["---"] * len(table.row_names) + ["---:"] * len(table.columns)
    lines += _md_rows([heading_row(table), align], raw=1)
    for row in table.rows:
        cells = [shown(table, (row, metric, col)) for metric, col in table.columns]
        words = [_md(label(value)) for value in row]
        words += [f"**{_md(c.plain)}**" if c.mark == BEST else _md(c.plain) for c in cells]
        lines.append(f"| {' | '.join(words)} |")
    if table.comparisons:
        names = [*table.row_names, *table.col_names, "metric", *DIFFERENCE_HEADINGS]
        lines += ["", *_md_rows([names, ["---"] * len(names)], raw=1)]
        for labels, comparison in differences(table):
            lines += _md_rows([[*labels, *difference_words(comparison)]])
    lines += ["", *(f"- {_md(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _md_rows(rows: Sequence[Sequence[str]], raw: int | None = None) -> list[str]:
    return [
        f"| {' | '.join(cell if i == raw else _md(cell) for cell in row)} |"
        for i, row in enumerate(rows)
    ]


def _md(text: str) -> str:
    text = html.escape(text, quote=False).replace("\n", " ")
    return "".join("\\" + c if c in "\\|*_`[]~" else c for c in text)


# ---- HTML ----------------------------------------------------------------------------------------


def to_html(table: Table) -> str:
    """The table as an HTML fragment; ``data-sort`` holds the number in full."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heading_row(table))
    body = []
    for row in table.rows:
        cells = "".join(_html_cell(table, (row, m, c)) for m, c in table.columns)
        labels = "".join(
            f'<th scope="row" data-sort="{html.escape(label(v))}">{html.escape(label(v))}</th>'
            for v in row
        )
        body.append(f"<tr>{labels}{cells}</tr>")
    parts = [
        '<div class="scroll"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    ]
    if table.comparisons:
        parts.append(_html_differences(table))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    parts.append(f'<ul class="notes">{notes}</ul>' if notes else "")
    return "\n".join(parts)


def _html_cell(table: Table, key: tuple[Key, str, Key]) -> str:
    cell = shown(table, key)
    number = table.point(key)[0]
    sort = f' data-sort="{number!r}"' if number == number else ""
    kind = {BEST: "best", TIE: "tie"}.get(cell.mark, "")
    kind = "lost" if cell.number is None else kind
    reasons = html.escape("; ".join(table.cells[key].reasons))
    title = f' title="{reasons}"' if reasons else ""
    return f'<td class="{kind}"{sort}{title}>{html.escape(cell.plain)}</td>'


def _html_differences(table: Table) -> str:
    names = [*table.row_names, *table.col_names, "metric", *DIFFERENCE_HEADINGS]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = []
    for labels, comparison in differences(table):
        words = [*labels, *difference_words(comparison)]
        body.append("<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + "</tr>")
    return (
        '<div class="scroll"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )

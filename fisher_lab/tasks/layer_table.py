"""Tables with a row per layer on the screen: many layers are grouped by kind, with ranges."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from rich.table import Table

from fisher_lab.results.labels import Entry
from fisher_lab.results.layer_kinds import Row, grouped

VERBOSE = "FISHER_LAB_VERBOSE"
"""The variable that ``--verbose`` sets, for the processes that a run starts too."""

MOST_ROWS = 12
"""Rows of a table of layers, unless all are asked for."""

MIN_NAME = 12
"""Columns that a layer's name gets at least."""

COUNT = "\u00d7"
"""Heading of how many layers a kind has."""

SUMMED = ("bytes", "seconds", "flops")
"""How columns begin whose sum over the layers of a kind is shown, and not their range."""


def is_verbose() -> bool:
    """Whether nothing is to be left out on the screen."""
    return bool(os.environ.get(VERBOSE))


def layer_table(
    rows: Sequence[Row], columns: Sequence[Entry], width: int, *, all_rows: bool
) -> Table:
    """A row per layer, or one per kind of layers where there are more than :data:`MOST_ROWS`.

    Args:
        rows: with the key ``name``.
        columns: what is shown of each; the first one is the name.
        width: columns that there are.
        all_rows: whether layers are never grouped.
    """
    groups = {row["name"]: [row] for row in rows} if all_rows else grouped(rows, MOST_ROWS)
    is_grouped = len(groups) < len(rows)
    cells = [[name, *(str(len(own)) for _ in "n" if is_grouped),
              *(_cell(own, column) for column in columns[1:])]
             for name, own in groups.items()]  # fmt: skip
    headings = [columns[0].short, *([COUNT] if is_grouped else [])]
    headings += [_heading(column, is_grouped) for column in columns[1:]]
    fit_names(cells, headings, width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    texts = {columns[0].short} | {column.short for column in columns if column.format == "s"}
    for heading in headings:
        justify = "left" if heading in texts else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def _heading(column: Entry, is_grouped: bool) -> str:
    return f"Σ {column.short}" if is_grouped and column.key.startswith(SUMMED) else column.short


def _cell(rows: Sequence[Row], column: Entry) -> str:
    """What layers have in a column: a value, a range, a sum, or all words."""
    values = [v for row in rows if (v := row.get(column.key)) is not None and v != ""]
    if not values:
        return "-"
    if column.format == "s" or any(isinstance(v, str) for v in values):
        return "/".join(dict.fromkeys(map(str, values)))
    if column.key.startswith(SUMMED):
        return column.text(sum(values))
    low, high = (_short(column.text(end)) for end in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def _short(text: str) -> str:
    """``1.0e+06`` as ``1.0e6``."""
    return re.sub(r"e\+?(-?)0*(?=\d)", r"e\1", text)


def fit_names(cells: Sequence[list[str]], headings: Sequence[str], width: int) -> None:
    """Breaks the names in the first column of a table, in place, so that its lines fit.

    Args:
        cells: rows of the table.
        headings: of its columns, each of which has one blank to its right.
        width: columns that there are.
    """
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    limit = max(width - sum(widths[1:]) - len(widths), MIN_NAME)
    for row in cells:
        row[0] = broken(row[0], limit)


def broken(name: str, limit: int) -> str:
    """A name in lines of at most ``limit`` characters where its parts allow it, none of them cut.

    Lines end after a dot or a blank, in a long part after an underscore; those after the first are
    indented.
    """
    lines = [""]
    for part in re.findall(r"[^. ]+[. ]?", name):
        pieces = [part] if len(part) + 2 <= limit else re.findall(r"[^_]+_*|_+", part)
        for piece in pieces:
            indent = 2 if len(lines) > 1 else 0
            if lines[-1] and indent + len(lines[-1]) + len(piece.rstrip()) > limit:
                lines.append("")
            lines[-1] += piece
    return "\n  ".join(line.rstrip() for line in lines)

"""How an object shows itself in a notebook: a title over a table of words and values."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_table(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """An HTML table, with every text escaped.

    Args:
        title: above the table.
        rows: of cells.
        head: the headings of the columns, where there are any.
    """

    def line(cells: Iterable[object], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    lines = [line(head, "th")] if head else []
    lines += [line(row, "td") for row in rows]
    return f"<b>{html.escape(title)}</b><table>{''.join(lines)}</table>"

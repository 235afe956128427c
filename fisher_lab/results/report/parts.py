"""Tables and folded texts as HTML; everything in them is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table that can be sorted.

    Args:
        heads: over the columns.
        rows: a class and a text for each cell.
    """
    head = "".join(f'<th scope="col" class="word">{html.escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in row)
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, text: str) -> str:
    """A text under a line that opens it."""
    return (
        f"<details><summary>{html.escape(summary)}</summary>"
        f'<pre tabindex="0"><code>{html.escape(text)}</code></pre></details>'
    )

r"""Tables and texts in LaTeX: booktabs, ``siunitx`` on demand, every text escaped.

A fragment is a ``table`` environment for ``\input``; a document compiles as it is, with pdflatex,
lualatex or tectonic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fisher_lab.results.export import (
    BEST,
    DIFFERENCE_HEADINGS,
    NONE,
    TIE,
    Shown,
    blocks,
    difference_words,
    differences,
    shown,
)
from fisher_lab.results.table import Table
from fisher_lab.results.values import label

SPECIAL = {
    "\\": r"\textbackslash{}",
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
    "\u2013": "--",
    "—": "---",
    "\u00d7": r"$\times$",
    "κ": r"$\kappa$",
    "λ": r"$\lambda$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "\u2212": r"$-$",
    "…": r"\dots{}",
    "·": r"$\cdot$",
}

PREAMBLE = r"""\documentclass[10pt,a4paper]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs}
\usepackage{siunitx}
\usepackage{graphicx}
\usepackage{longtable}
\usepackage{array}
"""


PAGE_WIDTH = 132
"""Characters of a table beside which further columns go into one of their own."""


def escape(text: str) -> str:
    """Text that LaTeX shows as it is. What the fonts at hand lack becomes ``?``."""
    out = []
    for char in text:
        if char in SPECIAL:
            out.append(SPECIAL[char])
        elif char in "\n\r\t":
            out.append(" ")
        elif " " <= char <= "~" or "\u00c0" <= char <= "\u017f":
            out.append(char)
        else:
            out.append("?")
    return "".join(out)


def breakable(text: str) -> str:
    """Escaped text in which names may be broken after a slash, a dot, an underscore and the like.

    Numbers and versions are not broken.
    """
    return re.sub(r"(/|\\_|=|[.,](?=[A-Za-z]))", r"\1\\allowbreak{}", escape(text))


def document(body: str, title: str = "") -> str:
    """A document that compiles as it is.

    Args:
        body: LaTeX.
        title: plain text.
    """
    head = f"\\title{{{escape(title)}}}\n\\date{{}}\n" if title else ""
    made = "\\maketitle\n" if title else ""
    return f"{PREAMBLE}{head}\\begin{{document}}\n{made}{body}\n\\end{{document}}\n"


def to_latex(table: Table, *, siunitx: bool = False, caption: str = "", name: str = "") -> str:
    r"""The table as ``table`` environments for ``\input``; wide ones are set smaller.

    Args:
        table: of cells.
        siunitx: numbers as ``\num``, else in mathematics.
        caption: plain text; by default the title and the notes.
        name: what follows ``tab:`` in the label; by default made of the title.
    """
    words = caption or f"{table.title}. " + " ".join(_sentence(note) for note in table.notes)
    label_name = name or "".join(c if c.isalnum() else "-" for c in table.title)
    parts = []
    for number, columns in enumerate(blocks(table, PAGE_WIDTH, _room), 1):
        rows = [
            [*(escape(label(v)) for v in row)]
            + [_cell(shown(table, (row, m, c)), siunitx) for m, c in columns]
            for row in table.rows
        ]
        layout = "l" * len(table.row_names) + "r" * len(columns)
        names = [*table.row_names, *(table.heading(m, c) for m, c in columns)]
        text = escape(words) if number == 1 else escape(f"{table.title}, continued.")
        ending = "" if number == 1 else f"-{number}"
        head = [_heading(name) for name in names]
        parts.append(_environment(layout, head, rows, text, f"{label_name}{ending}"))
    if table.comparisons:
        parts.append(_differences(table, label_name))
    needs = "booktabs, graphicx" + (", siunitx" if siunitx else "")
    return f"% needs: {needs}\n" + "\n".join(parts)


def _differences(table: Table, name: str) -> str:
    names = [*table.row_names, *table.col_names, "metric", *DIFFERENCE_HEADINGS]
    rows = [
        [escape(word) for word in (*labels, *difference_words(comparison))]
        for labels, comparison in differences(table)
    ]
    left = len(names) - len(DIFFERENCE_HEADINGS)
    columns = "l" * left + "r" * len(DIFFERENCE_HEADINGS)
    base = ", ".join(f"{n}={label(v)}" for n, v in table.baseline.items())
    caption = escape(f"{table.title}: differences to {base}.")
    return _environment(columns, [escape(n) for n in names], rows, caption, f"{name}-differences")


def _environment(
    columns: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, name: str
) -> str:
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{name}}}",
            r"\smallskip",
            # Never larger than the line, and a small table keeps its size.
            r"\sbox0{\small",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            r"\end{table}",
            "",
        ]
    )


def _lines(text: str) -> list[str]:
    """A metric over its values in two lines where it is long."""
    head, slash, tail = text.partition("/")
    return [f"{head}/", tail] if slash and len(text) > 14 else [text]


def _room(text: str) -> int:
    return max(map(len, _lines(text)))


def _heading(text: str) -> str:
    lines = _lines(text)
    if len(lines) > 1:
        first, second = map(escape, lines)
        return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{first}\\{second}\end{{tabular}}"
    return escape(text)


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:] + "."


def _cell(cell: Shown, siunitx: bool) -> str:
    if cell.number is None:
        return rf"\emph{{{escape(cell.state or NONE)}}}"
    text = _number(cell, siunitx)
    if cell.mark == BEST:
        text = rf"{text}$^{{*}}$" if siunitx else rf"$\mathbf{{{text[1:-1]}}}^{{*}}$"
    elif cell.mark == TIE:
        text += r"$^{\sim}$"
    text += _details(cell, siunitx)
    return text + (rf" \emph{{({escape(cell.state)})}}" if cell.state else "")


def _details(cell: Shown, siunitx: bool) -> str:
    """Standard deviation and number of runs, where they are shown."""
    parts = []
    if cell.deviation is not None:
        parts.append(f"sd {_number(Shown(cell.deviation), siunitx)}")
    if cell.runs is not None:
        parts.append(f"n {cell.runs}")
    return rf" {{\footnotesize ({', '.join(parts)})}}" if parts else ""


def _number(cell: Shown, siunitx: bool) -> str:
    assert cell.number is not None
    number = cell.number
    if siunitx:
        power = f"e{number.exponent}" if number.exponent else ""
        if cell.quartiles:
            low, high = cell.quartiles
            ends = f"[\\num{{{low}}}, \\num{{{high}}}]"
            scale = f"\\num{{{power}}}" if power else ""
            return f"\\num{{{number.value}}} {ends}{scale}"
        spread = rf" \pm {number.spread}" if number.spread else ""
        return rf"\num[separate-uncertainty]{{{number.value}{spread}{power}}}"
    power = rf" \times 10^{{{number.exponent}}}" if number.exponent else ""
    if cell.quartiles:
        low, high = cell.quartiles
        return f"${number.value}\\ [{low}, {high}]{power}$"
    if number.spread is None:
        return f"${number.value}{power}$"
    both = rf"{number.value} \pm {number.spread}"
    return f"$({both}){power}$" if power else f"${both}$"

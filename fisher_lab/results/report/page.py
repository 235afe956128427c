"""The report: everything of some sweeps in one HTML file that opens from disk without a network.

Every text is escaped; style, script and figures are inside the file, and a content security policy
in it forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fisher_lab.runs import atomic

from .. import claims, figures, methods, plotting, render
from ..axes import find_axes
from ..errors import ResultsError
from ..finishing import claimed_metrics
from ..frames import Frame, Shared
from ..table import Table, tabulate
from ..values import label

MOST_FIGURES = 24
"""Figures of one sweep that go into the file; ``figures/`` beside the runs has all of them."""

SCREEN_DPI = 170


def write_report(frame: Frame, output: Path) -> list[Path]:
    """Write the report and, beside it, ``methods.md`` and ``methods.tex``.

    Args:
        frame: from :func:`fisher_lab.results.load`.
        output: the HTML file.

    Returns:
        The files that were written.
    """
    texts = {
        output: page(frame),
        output.with_name("methods.md"): methods.markdown(frame),
        output.with_name("methods.tex"): methods.latex(frame),
    }
    for file, text in texts.items():
        atomic.write_text(file, text)
    return list(texts)


def page(frame: Frame) -> str:
    """The report as text."""
    sweeps = list(dict.fromkeys(frame["sweep"]))
    verdicts = claims.evaluate(frame)
    parts = [_head(sweeps), _summary(frame, sweeps, verdicts)]
    if verdicts:
        parts.append(_claims(verdicts))
    for number, sweep in enumerate(sweeps):
        parts.append(_sweep(only(frame, sweep), sweep, number))
    parts += [_failures(frame), _runs(frame), _provenance(frame), _methods(frame)]
    script = _asset("script.js")
    return "\n".join([*parts, f"<script>{script}</script>", "</body>", "</html>", ""])


def only(frame: Frame, sweep: str) -> Frame:
    """The runs of one sweep, with the metrics that any of them has."""
    runs = frame[frame["sweep"] == sweep]
    sweeps = {d: s for d, s in frame.attrs.get("sweeps", {}).items() if s.name == sweep}
    measured = Shared(m for m in frame.attrs.get("metrics", []) if _measured(runs, m))
    runs.attrs = {**frame.attrs, "sweeps": sweeps, "metrics": measured}
    return runs


def _measured(runs: Frame, metric: str) -> bool:
    lost = " ".join(runs["not_finite"].fillna("")).split()
    return bool(runs[metric].notna().any()) or metric in lost


def _asset(name: str) -> str:
    return resources.files("fisher_lab.results.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- head and summary ----------------------------------------------------------------------------


def _head(sweeps: Sequence[str]) -> str:
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; "
        f"script-src 'sha256-{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    title = html.escape(", ".join(sweeps)) or "runs"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · fisher_lab</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>"""


def _summary(frame: Frame, sweeps: Sequence[str], verdicts: Sequence[claims.Verdict]) -> str:
    statuses = frame["status"].value_counts()
    counts = [(f"{status} runs", count, status) for status, count in statuses.items()]
    for verdict in claims.STYLES:
        count = sum(v.verdict == verdict for v in verdicts)
        if count:
            counts.append((f"claims: {verdict}", count, verdict.replace(" ", "-")))
    items = "".join(
        f'<li><b class="{html.escape(str(kind))}">{count}</b> {html.escape(words)}</li>'
        for words, count, kind in counts
    )
    left = "".join(
        f"<li>{html.escape(one.directory)}: {html.escape(one.reason)}</li>"
        for one in frame.attrs.get("left_out", [])
    )
    links = [("claims", "Claims")] if verdicts else []
    links += [(f"sweep-{i}", name) for i, name in enumerate(sweeps)]
    links += [("failures", "Failures"), ("runs", "Runs"), ("provenance", "Provenance"),
              ("methods", "Methods")]  # fmt: skip
    nav = "".join(f'<li><a href="#{i}">{html.escape(name)}</a></li>' for i, name in links)
    shown = f'<p>Left out:</p><ul class="notes">{left}</ul>' if left else ""
    return f'<nav><ul>{nav}</ul></nav><ul class="counts">{items}</ul>{shown}'


def _claims(verdicts: Sequence[claims.Verdict]) -> str:
    rows = []
    for v in verdicts:
        needed = "" if v.seeds_needed is None else str(v.seeds_needed)
        cells = [
            (f"word verdict {v.verdict.replace(' ', '-')}", v.verdict), ("word long", v.text),
            ("word long", v.why), ("", str(v.seeds)), ("", needed), ("word long", v.test),
            ("word", v.sweep),
        ]  # fmt: skip
        rows.append(cells)
    heads = ["verdict", "claim", "numbers", "n", "n needed", "test", "sweep"]
    return f'<h2 id="claims">Claims</h2>{_html_table(heads, rows)}'


def _html_table(heads: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
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


# ---- one sweep -----------------------------------------------------------------------------------


def _sweep(frame: Frame, name: str, number: int) -> str:
    titles = [str(s.about.get("title") or "") for s in frame.attrs["sweeps"].values()]
    words = html.escape("; ".join(t for t in titles if t))
    parts = [
        f'<h2 id="sweep-{number}">{html.escape(name)}</h2>',
        f"<p>{words}</p>" if words else "",
    ]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=name)
    except ResultsError as error:
        return "".join([*parts, f'<p class="failed">{html.escape(str(error))}</p>'])
    parts.append(render.to_html(table))
    parts.append(_figures(table, frame))
    parts.append(f"<h3>To run it again</h3>{_commands(table, frame)}")
    return "\n".join(parts)


def _figures(table: Table, frame: Frame) -> str:
    drawn, left = [], 0
    for name, make in figures.plans(table, frame).items():
        try:
            figure = make()
        except (ResultsError, OSError, ValueError, KeyError):
            continue
        if figure is None:
            continue
        if len(drawn) >= MOST_FIGURES:
            left += 1
            continue
        drawn.append(_figure(figure, name))
    more = f'<p class="dim">{left} more in figures/ beside the runs.</p>' if left else ""
    return f'<h3>Figures</h3><div class="figures">{"".join(drawn)}</div>{more}' if drawn else ""


def _figure(figure: Figure, name: str) -> str:
    data = io.BytesIO()
    with rc_context(plotting.STYLE):
        figure.savefig(data, format="png", dpi=SCREEN_DPI, metadata={"Software": None})
    code = base64.b64encode(data.getvalue()).decode()
    words = html.escape(plotting.words(figure) or name)
    kind = "wide" if plotting.is_wide(figure) else ""
    return (
        f'<figure class="{kind}"><img alt="{words}" src="data:image/png;base64,{code}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _commands(table: Table, frame: Frame) -> str:
    """A line a cell: its overrides with all seeds."""
    names = figures.cell_names(table, frame)
    lines: dict[str, list[str]] = {}
    for directory, overrides in zip(frame["directory"], frame["overrides"], strict=True):
        lines.setdefault(names.get(directory, "?"), []).append(overrides or "")
    parts = []
    for cell, all_of_it in lines.items():
        commands = "\n".join(f"python -m fisher_lab {text}".rstrip() for text in all_of_it)
        parts.append(
            f"<details><summary>{html.escape(cell)} ({len(all_of_it)})</summary>"
            f'<pre tabindex="0"><code>{html.escape(commands)}</code></pre></details>'
        )
    return "".join(parts)


# ---- all runs ------------------------------------------------------------------------------------


def _failures(frame: Frame) -> str:
    lost = frame[(frame["status"] != "completed") | (frame["not_finite"].fillna("") != "")]
    if lost.empty:
        return (
            '<h2 id="failures">Failures</h2><p>None: every run completed with finite numbers.</p>'
        )
    rows = []
    for run in lost[
        ["sweep", "status", "reason", "not_finite", "overrides", "directory"]
    ].itertuples(index=False):
        words = [run.reason or "", f"not finite: {run.not_finite}" if run.not_finite else ""]
        rows.append(
            [
                ("word", run.sweep), (f"word {run.status}", run.status),
                ("word long", "; ".join(w for w in words if w)), ("word long", run.overrides or ""),
                ("word long", run.directory),
            ]
        )  # fmt: skip
    heads = ["sweep", "status", "reason", "overrides", "directory"]
    return f'<h2 id="failures">Failures</h2>{_html_table(heads, rows)}'


def _runs(frame: Frame) -> str:
    axes = [name for name in find_axes(frame).values if name in frame]
    rows = []
    for values in frame[["sweep", "run_id", "status", "seconds", *axes]].itertuples(index=False):
        seconds = "" if values[3] != values[3] else f"{values[3]:.1f}"
        rows.append(
            [
                ("word", values[0]), ("word", values[1]), (f"word {values[2]}", values[2]),
                ("", seconds), *(("", label(v)) for v in values[4:]),
            ]
        )  # fmt: skip
    heads = ["sweep", "run", "status", "seconds", *axes]
    shared = _shared(frame, frame.attrs.get("config", []))
    text = "\n".join(f"{name}: {label(value)}" for name, value in shared.items())
    return (
        f'<h2 id="runs">Runs</h2>{_html_table(heads, rows)}'
        f"<details><summary>What all runs have in common ({len(shared)} settings)</summary>"
        f'<pre tabindex="0"><code>{html.escape(text)}</code></pre></details>'
    )


def _shared(frame: Frame, columns: Iterable[str]) -> Mapping[str, Any]:
    return {c: frame[c].iloc[0] for c in columns if frame[c].nunique(dropna=False) == 1}


def _provenance(frame: Frame) -> str:
    rows = []
    for column in frame.columns:
        if not str(column).startswith("provenance."):
            continue
        counts = frame[column].map(label).value_counts()
        some = [f"{value} ({count})" for value, count in counts.head(6).items()]
        more = f", {len(counts) - 6} more" if len(counts) > 6 else ""
        name = str(column).removeprefix("provenance.")
        words = str(counts.index[0]) if len(counts) == 1 else ", ".join(some) + more
        rows.append([("word", name), ("word long", words)])
    return (
        '<h2 id="provenance">Provenance</h2>'
        f"<details><summary>{len(rows)} entries; in brackets, how many runs</summary>"
        f"{_html_table(['name', 'value'], rows)}</details>"
    )


def _methods(frame: Frame) -> str:
    text = html.escape(" ".join(methods.sentences(frame)))
    source = html.escape(methods.latex(frame))
    return (
        f'<h2 id="methods">Methods</h2><p>{text}</p>'
        f"<details><summary>LaTeX</summary>"
        f'<pre tabindex="0"><code>{source}</code></pre></details>'
    )

"""The report: everything of some sweeps in one HTML file that opens from disk without a network.

Every text is escaped; style, script and figures are inside the file, and a content security policy
in it forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fisher_lab.results import claims, export, figures, paper, plotting
from fisher_lab.results.finishing import claimed_metrics
from fisher_lab.results.places import Places
from fisher_lab.results.report import parts, runs
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import Frame, ResultsError, only
from fisher_lab.runs import atomic

MOST_FIGURES = 24
"""Figures of one sweep that go into the file; ``figures/`` beside the runs has all of them."""

SCREEN_DPI = 170


def write_report(frame: Frame, output: Path) -> list[Path]:
    """Write the report and, beside it, ``methods.md`` and ``methods.tex``.

    Args:
        frame: from :func:`fisher_lab.results.loading`.
        output: the HTML file.

    Returns:
        The files that were written.
    """
    texts = {
        output: page(frame),
        output.with_name("methods.md"): paper.markdown(frame),
        output.with_name("methods.tex"): paper.latex(frame),
    }
    for file, text in texts.items():
        atomic.write_text(file, text)
    return list(texts)


def page(frame: Frame) -> str:
    """The report as text."""
    places = Places(frame)
    verdicts = claims.evaluate(places.reasons(frame))
    frame = places.shown(frame)
    sweeps = list(dict.fromkeys(frame["sweep"]))
    sections = [_head(sweeps), _summary(frame, sweeps, verdicts)]
    if verdicts:
        sections.append(_claims(verdicts, places))
    for number, sweep in enumerate(sweeps):
        sections.append(_sweep(only(frame, sweep), sweep, number, places))
    sections += [runs.failures(frame, places), runs.runs(frame, places)]
    sections += [runs.provenance(frame, places), _methods(frame)]
    script = _asset("script.js")
    return "\n".join([*sections, f"<script>{script}</script>", "</body>", "</html>", ""])


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


def _claims(verdicts: Sequence[claims.Verdict], places: Places) -> str:
    rows = []
    for v in verdicts:
        needed = "" if v.seeds_needed is None else str(v.seeds_needed)
        cells = [
            (f"word verdict {v.verdict.replace(' ', '-')}", v.verdict), ("word long", v.text),
            ("word long", places.short(v.why)), ("", str(v.seeds)), ("", needed),
            ("word long", v.test), ("word", v.sweep),
        ]  # fmt: skip
        rows.append(cells)
    heads = ["verdict", "claim", "numbers", "n", "n needed", "test", "sweep"]
    return f'<h2 id="claims">Claims</h2>{parts.table(heads, rows)}'


# ---- one sweep -----------------------------------------------------------------------------------


def _sweep(frame: Frame, name: str, number: int, places: Places) -> str:
    titles = [str(s.about.get("title") or "") for s in frame.attrs["sweeps"].values()]
    words = html.escape("; ".join(t for t in titles if t))
    sections = [
        f'<h2 id="sweep-{number}">{html.escape(name)}</h2>',
        f"<p>{words}</p>" if words else "",
    ]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=name)
    except ResultsError as error:
        words = html.escape(places.short(str(error)))
        return "".join([*sections, f'<p class="failed">{words}</p>'])
    sections.append(export.to_html(figures.complete(table, frame)))
    sections.append(_figures(table, frame))
    sections.append(f"<h3>To run it again</h3>{runs.commands(table, frame, places)}")
    return "\n".join(sections)


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


def _methods(frame: Frame) -> str:
    sections = []
    for heading, text in paper.paragraphs(frame):
        sections += [f"<h3>{html.escape(heading)}</h3>"] if heading else []
        sections.append(f"<p>{html.escape(' '.join(text))}</p>")
    source = parts.folded("LaTeX", paper.latex(frame))
    return f'<h2 id="methods">Methods</h2>{"".join(sections)}{source}'

"""The report: everything about some sweeps in one HTML file that needs no network.

The template escapes every text; style, script and figures are inside the file, and its content
security policy forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from fisher_lab.results import (
    claims,
    export,
    figure_style,
    figures,
    labels,
    look_figures,
    paper,
)
from fisher_lab.results.hypotheses import claimed_metrics
from fisher_lab.results.places import Places
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import (
    SEED,
    UNINTERESTING,
    ResultsError,
    column,
    filter_runs,
    find_axes,
    label,
    order,
    runs_of_sweep,
)
from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status

MOST_FIGURES = 24
"""Figures of one sweep that go into the file; ``figures/`` beside the runs has all of them."""

SCREEN_DPI = 170

PRIVATE = ("host.name", "host.system", "pid")
"""Provenance that names a machine or a process; it is kept in ``run.json`` alone."""

PRIVATE_OF_A_RANK = ("host", "pid")


def write_report(frame: pd.DataFrame, output: Path) -> list[Path]:
    """Write the report and, beside it, ``methods.md`` and ``methods.tex``.

    Args:
        frame: from :func:`fisher_lab.results.load`.
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


def page(frame: pd.DataFrame, places: Places | None = None) -> str:
    """The report as text, with paths shortened as ``places`` says."""
    places = places or Places(frame)
    verdicts = claims.evaluate(places.reasons(frame))
    frame, shared = places.shown(frame), claims.shared_objection(verdicts)
    sweeps, named = list(dict.fromkeys(frame["sweep"])), paper.titles(frame)
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; "
        f"script-src 'sha256-{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        export.templates()
        .get_template("report.html.j2")
        .render(
            policy=policy,
            style=style,
            script=script,
            title=named.get(*sweeps) if len(sweeps) == 1 else f"{len(sweeps)} sweeps",
            counts=_counts(frame, verdicts),
            left_out=[f"{one.directory}: {one.reason}" for one in frame.attrs.get("left_out", [])],
            claims=[_verdict_row(verdict, places, named, shared) for verdict in verdicts],
            standing=f"All verdicts are {claims.EXPLORATORY}: {shared}. " if shared else "",
            paths=_paths(verdicts),
            discovery=claims.DISCOVERY,
            sweeps=[
                _sweep(
                    runs_of_sweep(frame, sweep),
                    {"name": sweep, "title": named.get(sweep, sweep), "problem": ""},
                    [verdict for verdict in verdicts if verdict.sweep == sweep],
                    places,
                )
                for sweep in sweeps
            ],
            failures=_failures(frame, places),
            **_runs(frame, places),
            provenance=_provenance(frame, places),
            methods=paper.paragraphs(frame),
            latex=paper.latex(frame),
        )
    )


def _asset(name: str) -> str:
    return resources.files("fisher_lab.results").joinpath("templates", name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _counts(frame: pd.DataFrame, verdicts: Iterable[claims.Verdict]) -> list[tuple[int, str, str]]:
    """How many runs have each status and how many claims each verdict: number, words, class."""
    statuses = frame["status"].value_counts().items()
    found = Counter(verdict.verdict for verdict in verdicts)
    return [
        *((count, f"{status} runs", str(status)) for status, count in statuses),
        *((found[v], f"claims: {v}", v.replace(" ", "-")) for v in claims.STYLES if found[v]),
    ]


def _verdict_row(
    v: claims.Verdict, places: Places, named: Mapping[str, str], shared: str
) -> list[str]:
    needed = claims.seeds_words(v.seeds_needed, v.seeds_range)
    why = places.short(v.in_words if shared else v.explained)
    text = v.text if len(named) < 2 else f"{named.get(v.sweep, v.sweep)}: {v.text}"
    numbers = f"{why} ({v.tested})" if v.tested else why
    return [v.verdict, text, numbers, str(v.seeds), needed, claims.false_discovery_words(v)]


def _paths(verdicts: Iterable[claims.Verdict]) -> list[dict[str, Any]]:
    """The looks at the claims that were decided seed by seed, as pictures."""
    courses = [verdict.course for verdict in verdicts if verdict.course is not None]
    return [
        {"data": _png(figure), "words": figure.get_label(), "wide": False, "claims": []}
        for figure in map(look_figures.path_figure, courses)
        if figure is not None
    ]


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    with rc_context(figure_style.STYLE):
        figure.savefig(data, format="png", dpi=SCREEN_DPI, metadata={"Software": None})
    return base64.b64encode(data.getvalue()).decode()


# ---- one sweep -----------------------------------------------------------------------------------


def _sweep(
    frame: pd.DataFrame,
    about: dict[str, Any],
    verdicts: Sequence[claims.Verdict],
    places: Places,
) -> dict[str, Any]:
    """What the page says of one sweep: each claim stands with the first figure that shows it."""
    own = [(claims.metric_of(v), [v.verdict, v.text, places.short(v.in_words)]) for v in verdicts]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=about["name"])
    except ResultsError as error:
        words = [words for _, words in own]
        return about | {"problem": places.short(str(error)), "claims": words}
    drawn = _figures(table, frame)
    for one in drawn[:MOST_FIGURES]:
        one["claims"] = [words for metric, words in own if metric in one["metrics"]]
        own = [(metric, words) for metric, words in own if metric not in one["metrics"]]
    return about | {
        "table": export.to_html(figures.complete(table, frame)),
        "claims": [words for _, words in own],
        "figures": drawn[:MOST_FIGURES],
        "more": len(drawn[MOST_FIGURES:]),
        "commands": _commands(table, frame, places),
    }


def _figures(table: Table, frame: pd.DataFrame) -> list[dict[str, Any]]:
    drawn = []
    for name, figure in figures.make_figures(figures.figure_makers(table, frame, joint=True)):
        if isinstance(figure, str):
            continue
        data = _png(figure) if len(drawn) < MOST_FIGURES else ""
        about = {"words": figure.get_label() or name, "wide": figure_style.is_wide(figure)}
        drawn.append({"data": data, "metrics": {a.get_label() for a in figure.axes}, **about})
    return drawn


def _commands(table: Table, frame: pd.DataFrame, places: Places) -> dict[str, list[str]]:
    """Cell -> the commands that run its runs again."""
    names = figures.cell_names(table, frame)
    lines: dict[str, dict[str, None]] = {}
    for directory, overrides in zip(frame["directory"], frame["overrides"], strict=True):
        of_cell = lines.setdefault(names.get(directory, "?"), {})
        of_cell[places.command(_text(overrides))] = None
    return {cell: list(of_cell) for cell, of_cell in lines.items()}


# ---- all runs ------------------------------------------------------------------------------------


def _failures(frame: pd.DataFrame, places: Places) -> list[list[str]]:
    """Every run that did not complete, or not with finite numbers, and why."""
    broken = column(frame, "not_finite").fillna("") != ""
    lost = filter_runs(frame, broken | (frame["status"] != Status.COMPLETED))
    columns = ["sweep", "status", "reason", "not_finite", "overrides", "directory"]
    rows = []
    for sweep, status, *texts in lost.loc[:, columns].itertuples(index=False):
        reason, not_finite, overrides, directory = map(_text, texts)
        why = "; ".join(filter(None, [reason, not_finite and f"not finite: {not_finite}"]))
        rows.append([sweep, status, why, places.short(overrides), places.run(directory)])
    return rows


def _text(value: object) -> str:
    """A text, or nothing: where only some runs have one, pandas puts NaN for the others."""
    return value if isinstance(value, str) else ""


def _runs(frame: pd.DataFrame, places: Places) -> dict[str, Any]:
    """Every run, the settings that all share, and every configuration with its own settings."""
    axes = [name for name in find_axes(frame).values if name in frame]
    rows = []
    heads = ["sweep", "run_id", "status", "seconds", *axes]
    names = list(dict.fromkeys(frame["sweep"]))
    found = frame.loc[:, heads].itertuples(index=False, name=None)
    for sweep, run, status, seconds, *values in sorted(
        found, key=lambda row: (names.index(row[0]), *map(order, row[4:]))
    ):
        time = "" if seconds != seconds else f"{seconds:.1f}"
        rows.append([sweep, run, status, time, *map(label, values)])
    columns = {c: column(frame, c) for c in frame.attrs.get("config", [])}
    alike = (c for c, values in columns.items() if values.nunique(dropna=False) == 1)
    shared = {c: label(columns[c].iloc[0]) for c in alike}
    return {
        "run_headings": ["sweep", "run", "status", "seconds", *map(_setting, axes)],
        "runs": rows,
        "shared": _lines(shared, places),
        "configurations": list(_configurations(frame, shared, places)),
    }


def _setting(name: str) -> str:
    return labels.setting(name).with_symbol


def _configurations(
    frame: pd.DataFrame, shared: Iterable[str], places: Places
) -> Iterable[tuple[str, list[str]]]:
    own = [c for c in frame.attrs.get("config", []) if c not in shared and c != SEED]
    own = [c for c in own if c.partition(".")[0] not in UNINTERESTING]
    for sweep in dict.fromkeys(frame["sweep"]):
        part = runs_of_sweep(frame, sweep)
        axes = [name for name in find_axes(part).names if name in own]
        found: dict[tuple[str, ...], list[int]] = {}
        keys = zip(*(part[c].map(label) for c in own), strict=True) if own else [()] * len(part)
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
        for key, members in found.items():
            runs = part.iloc[members]
            settings = dict(zip(own, key, strict=True))
            words = figures.settings_words(axes, [settings[name] for name in axes])
            # Not all settings of these are known.
            if set(runs["status"]) <= {Status.MISSING, Status.CORRUPT}:
                settings = {c: v for c, v in settings.items() if runs[c].notna().any()}
            count = f"{len(members)} run{'' if len(members) == 1 else 's'}"
            seeds = (
                [f" (seed {label(s)})" for s in runs[SEED]] if SEED in runs else [""] * len(runs)
            )
            named = ", ".join(run + seed for run, seed in zip(runs["run_id"], seeds, strict=True))
            lines = [f"runs: {named}", *_lines(settings, places)]
            yield f"{sweep}{words and f': {words}'} ({count})", lines


def _lines(settings: Mapping[str, str], places: Places) -> list[str]:
    return [f"{name}: {places.short(value)}" for name, value in settings.items()]


# ---- provenance ----------------------------------------------------------------------------------


def _provenance(frame: pd.DataFrame, places: Places, most: int = 6) -> list[list[str]]:
    """What the records say about code, machine and data, without the names of machines."""
    rows = []
    for key in map(str, frame.columns):
        name = key.removeprefix("provenance.")
        if name == key or name in PRIVATE:
            continue
        counts = Counter(places.short(_public(value)) for value in frame[key]).most_common()
        some = ", ".join(f"{value} ({count})" for value, count in counts[:most])
        some += f", {len(counts) - most} more" if len(counts) > most else ""
        rows.append([name, counts[0][0] if len(counts) == 1 else some])
    return rows


def _public(value: Any) -> str:
    """An entry as text; of a list of ranks without hosts and process numbers."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            entries = json.loads(value)
        except ValueError:
            return label(value)
        return json.dumps(
            [{k: v for k, v in entry.items() if k not in PRIVATE_OF_A_RANK} for entry in entries]
        )
    return label(value)

"""What the report says of single runs: failures, configurations, provenance, and their commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fisher_lab.results.axes import SEED, UNINTERESTING, find_axes
from fisher_lab.results.figures import cell_names
from fisher_lab.results.metric_figures import short
from fisher_lab.results.places import Places
from fisher_lab.results.report import parts
from fisher_lab.results.table import Table
from fisher_lab.results.values import Frame, label, only
from fisher_lab.runs.status import Status

PRIVATE = ("host.name", "host.system", "pid")
"""Provenance that is of one machine's or process's name, and stays in ``run.json``."""

PRIVATE_OF_A_RANK = ("host", "pid")


def commands(table: Table, frame: Frame, places: Places) -> str:
    """What runs the cells of a table again: the runs of each, a line a run."""
    names = cell_names(table, frame)
    lines: dict[str, dict[str, None]] = {}
    for directory, overrides in zip(frame["directory"], frame["overrides"], strict=True):
        of_cell = lines.setdefault(names.get(directory, "?"), {})
        of_cell[places.command(_text(overrides))] = None
    return "".join(
        parts.folded(f"{cell} ({len(of_cell)})", "\n".join(of_cell))
        for cell, of_cell in lines.items()
    )


def failures(frame: Frame, places: Places) -> str:
    """Every run that did not complete, or not with finite numbers, and why."""
    lost = frame[(frame["status"] != Status.COMPLETED) | (frame["not_finite"].fillna("") != "")]
    if lost.empty:
        return (
            '<h2 id="failures">Failures</h2><p>None: every run completed with finite numbers.</p>'
        )
    rows = []
    for run in lost[
        ["sweep", "status", "reason", "not_finite", "overrides", "directory"]
    ].itertuples(index=False):
        not_finite = _text(run.not_finite)
        words = [_text(run.reason), f"not finite: {not_finite}" if not_finite else ""]
        rows.append(
            [
                ("word", run.sweep), (f"word {run.status}", run.status),
                ("word long", "; ".join(w for w in words if w)),
                ("word long", places.short(_text(run.overrides))),
                ("word long", places.run(run.directory)),
            ]
        )  # fmt: skip
    heads = ["sweep", "status", "reason", "overrides", "directory"]
    return f'<h2 id="failures">Failures</h2>{parts.table(heads, rows)}'


def _text(value: object) -> str:
    """A text, or nothing: where only some runs have one, pandas puts NaN for the others."""
    return value if isinstance(value, str) else ""


def runs(frame: Frame, places: Places) -> str:
    """Every run, what all have in common, and every configuration with what is its own."""
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
    shared = _shared(frame)
    common = f"What all runs have in common ({len(shared)} settings)"
    return "".join(
        [
            f'<h2 id="runs">Runs</h2>{parts.table(heads, rows)}',
            parts.folded(common, _lines(shared.items(), places)),
            "<h3>Every configuration</h3><p>The settings that are not the same in all runs. "
            "Runs that differ in the seed alone stand together.</p>",
            *_configurations(frame, shared, places),
        ]
    )


def _shared(frame: Frame) -> Mapping[str, Any]:
    known = [c for c in frame.attrs.get("config", []) if frame[c].nunique(dropna=False) == 1]
    return {c: frame[c].iloc[0] for c in known}


def _configurations(frame: Frame, shared: Mapping[str, Any], places: Places) -> Iterable[str]:
    own = [c for c in frame.attrs.get("config", []) if c not in shared and c != SEED]
    own = [c for c in own if c.partition(".")[0] not in UNINTERESTING]
    for sweep in dict.fromkeys(frame["sweep"]):
        part = only(frame, sweep)
        axes = [name for name in find_axes(part).names if name in own]
        found: dict[tuple[str, ...], list[int]] = {}
        keys = zip(*(part[c].map(label) for c in own), strict=True) if own else [()] * len(part)
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
        for key, members in found.items():
            of_cell = part.iloc[members]
            settings = dict(zip(own, key, strict=True))
            words = ", ".join(short(name, settings[name]) for name in axes)
            if set(of_cell["status"]) <= {
                Status.MISSING,
                Status.CORRUPT,
            }:  # known only as far as others tell
                settings = {c: v for c, v in settings.items() if of_cell[c].notna().any()}
            count = f"{len(members)} run{'' if len(members) == 1 else 's'}"
            title = f"{sweep}{words and f': {words}'} ({count})"
            text = "\n".join([_names(of_cell), _lines(settings.items(), places)])
            yield parts.folded(title, text)


def _names(runs: Frame) -> str:
    """The runs, with their seeds."""
    if SEED not in runs:
        return f"runs: {', '.join(runs['run_id'])}"
    named = zip(runs["run_id"], runs[SEED].map(label), strict=True)
    return f"runs: {', '.join(f'{run} (seed {seed})' for run, seed in named)}"


def _lines(settings: Iterable[tuple[str, Any]], places: Places) -> str:
    return "\n".join(f"{name}: {places.short(label(value))}" for name, value in settings)


# ---- provenance ----------------------------------------------------------------------------------


def provenance(frame: Frame, places: Places) -> str:
    """What the runs' records say of code, machine and data; without names of machines."""
    rows = []
    for column in frame.columns:
        name = str(column).removeprefix("provenance.")
        if name == column or name in PRIVATE:
            continue
        counts = frame[column].map(lambda value: places.short(public(value))).value_counts()
        words = counts.index[0] if len(counts) == 1 else _counted(list(counts.items()))
        rows.append([("word", name), ("word long", str(words))])
    return (
        '<h2 id="provenance">Provenance</h2>'
        f"<details><summary>{len(rows)} entries; in brackets, how many runs</summary>"
        f"{parts.table(['name', 'value'], rows)}</details>"
    )


def _counted(counts: Sequence[tuple[str, int]], most: int = 6) -> str:
    some = [f"{value} ({count})" for value, count in counts[:most]]
    more = f", {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(some) + more


def public(value: Any) -> str:
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

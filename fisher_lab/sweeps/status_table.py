"""The screen of ``fisher-lab status``: swept settings, states, and the metrics of the claims."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fisher_lab.results import labels
from fisher_lab.results.values import label
from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.directory import Layout

STYLES = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.RUNNING: "cyan",
    Status.QUEUED: "cyan",
    Status.INTERRUPTED: "yellow",
    Status.LOST: "yellow",
    Status.UNKNOWN: "yellow",
}
USUAL = ("step/natural/gain", "loss/heldout", "loss")
"""Metrics of a sweep without claims."""

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
MOST_METRICS = 4
HEADING = 18
"""Characters of a line of a heading."""


@dataclass(frozen=True)
class CellStatus:
    """One cell, as far as its files tell.

    Attributes:
        run_id: its identity, the name of its directory.
        label: its axes as on the command line.
        state: of ``Layout.state``, or one of ``queued``, ``lost`` and ``unknown``.
        seconds: that it took, or has taken so far; None where it has not begun.
        metrics: what it has measured.
        log: path of its log; None where there is none yet.
        last_line: of the log.
        reason: why it failed or ended early.
        job: its number in the queue.
        failures: when, how and why it has failed since it was last launched, attempt by attempt.
    """

    run_id: str
    label: str
    state: Status
    seconds: float | None
    metrics: Mapping[str, Any]
    log: str | None
    last_line: str
    reason: str | None
    job: str | None
    failures: Sequence[Mapping[str, Any]] = ()


def claimed(about: Mapping[str, Any]) -> list[str]:
    """The metrics that the claims of a sweep are about, each once.

    Args:
        about: the contents of ``sweep.json``.
    """
    stated = about.get("claims")
    claims = [c for c in stated if isinstance(c, dict)] if isinstance(stated, list) else []
    return list(dict.fromkeys(str(c["metric"]) for c in claims if c.get("metric")))


def screen(
    layout: Layout, cells: Sequence[CellStatus], wanted: Sequence[str] | None
) -> RenderableType:
    """The cells of a sweep, one line each, and below them what those say that run or failed.

    Args:
        layout: of the sweep.
        cells: as far as their files tell.
        wanted: metrics; None for those of the claims, else the usual ones, as far as there are any.
    """
    about = atomic.read_json(layout.sweep_file)
    axes = {str(one["run_id"]): one.get("axes") or {} for one in about.get("cells") or []}
    names = list(dict.fromkeys(name for own in axes.values() for name in own))
    chosen = wanted
    if chosen is None:
        there = [m for m in claimed(about) or USUAL if any(m in c.metrics for c in cells)]
        chosen = there[:MOST_METRICS]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names or ["cell"]:
        setting = labels.setting(name.replace("/", "."))
        table.add_column(_lines(setting.short), overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for metric in map(labels.metric, chosen):
        table.add_column(_lines(metric.heading), justify="right", no_wrap=True)
    for cell in cells:
        own = axes.get(cell.run_id, {})
        table.add_row(
            *(Text(label(own[name]) if name in own else "") for name in names),
            *([] if names else [Text(cell.label)]),
            Text(cell.state, style=STYLES.get(cell.state, "")),
            "" if cell.seconds is None else f"{cell.seconds:.0f}",
            *(_value(cell.metrics.get(name)) for name in chosen),
        )
    counted = Counter(cell.state for cell in cells)
    foot = f"{len(cells)} cells: " + ", ".join(f"{n} {state}" for state, n in counted.items())
    title = Text(layout.title, no_wrap=True, overflow="ignore")
    return Group(title, table, Text(foot), *_said(layout, cells))


def _said(layout: Layout, cells: Sequence[CellStatus]) -> Iterator[Text]:
    """Why cells failed or ended early, what running ones said last, and their logs."""
    for cell in cells:
        said = STAMP.sub("", cell.last_line) if cell.state is Status.RUNNING else ""
        words = cell.reason or said
        if words:
            log = f"  ({Path(cell.log).relative_to(layout.directory)})" if cell.log else ""
            yield Text(f"{cell.label}: {cell.state}: {words}{log}")
        for number, failed in enumerate(cell.failures[:-1] if cell.reason else cell.failures, 1):
            why = f"failed ({failed.get('kind')}): {failed.get('message')}"
            yield Text(f"{cell.label}: attempt {number} {why}")


def _lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, HEADING, break_long_words=False)) or text


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""

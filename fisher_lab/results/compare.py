"""Two runs side by side: only what differs in configuration, metrics, layers and provenance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from fisher_lab.results.export import NONE
from fisher_lab.results.loading import load_layers, read_run
from fisher_lab.results.values import Frame, ResultsError, label, same
from fisher_lab.runs.record import RUN_FILE

ALWAYS_DIFFERENT = ("provenance.pid",)
"""Of no interest: they differ between any two runs."""

MOST_LAYERS = 40
"""Differences of layers that are shown; the rest are counted."""


@dataclass(frozen=True)
class Difference:
    """One thing that differs; None where a run does not have it."""

    name: str
    a: Any
    b: Any

    @property
    def ratio(self) -> float | None:
        """``b / a`` of two numbers, where that is one."""
        numbers = isinstance(self.a, int | float) and isinstance(self.b, int | float)
        if not numbers or isinstance(self.a, bool) or isinstance(self.b, bool) or self.a == 0:
            return None
        ratio = self.b / self.a
        return ratio if math.isfinite(ratio) else None


@dataclass
class Differences:
    """What differs between two runs, by part: ``configuration``, ``metrics``, ..."""

    a: Path
    b: Path
    parts: dict[str, list[Difference]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether nothing differs but what always does."""
        return not any(self.parts.values())


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, tolerance: float = 0.0
) -> Differences:
    """Compare two runs.

    Args:
        a: a run directory.
        b: another one.
        tolerance: numbers of metrics and layers that differ by less than this share are equal.

    Raises:
        ResultsError: a path that is no run directory.
    """
    one, other = Path(a), Path(b)
    runs = []
    for path in (one, other):
        if not (path / RUN_FILE).is_file():
            raise ResultsError(f"{path}: this is no run directory: it has no {RUN_FILE}")
        try:
            runs.append(read_run(path))
        except ResultsError as error:
            raise ResultsError(f"{path}: {error}") from error
    left, right = runs
    outcome = ("run_id", "status", "reason")
    found = Differences(one, other)
    found.parts = {
        "outcome": _differ({k: left["meta"][k] for k in outcome},
                           {k: right["meta"][k] for k in outcome}),
        "configuration": _differ(left["config"], right["config"]),
        "metrics": _differ(left["metrics"], right["metrics"], tolerance),
        "layers": _layers(one, other, tolerance),
        "provenance": [
            d
            for d in _differ(left["provenance"], right["provenance"])
            if d.name not in ALWAYS_DIFFERENT
        ],
    }  # fmt: skip
    return found


def _differ(
    left: Mapping[str, Any], right: Mapping[str, Any], tolerance: float = 0.0
) -> list[Difference]:
    found = []
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name), right.get(name)
        there = name in left, name in right
        if there == (True, True) and _equal(a, b, tolerance):
            continue
        found.append(Difference(name, a if there[0] else None, b if there[1] else None))
    return found


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if same(a, b):
        return True
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and tolerance > 0 and math.isclose(a, b, rel_tol=tolerance)


def _layers(a: Path, b: Path, tolerance: float) -> list[Difference]:
    tables = []
    for path in (a, b):
        frame = _frame(path)
        names = frame["name"] if "name" in frame else frame.get("row", [])
        skip = {"sweep", "directory", "run_id", "status", "row", "name"}
        kept = frame[[c for c in frame.columns if c not in skip]]
        tables.append(
            {
                f"{name} · {column}": value
                for name, row in zip(names, kept.to_dict("records"), strict=True)
                for column, value in row.items()
            }
        )
    return _differ(tables[0], tables[1], tolerance)


def _frame(path: Path) -> Frame:
    return load_layers(path)


def to_rich(found: Differences) -> RenderableType:
    """The differences for a terminal."""
    parts: list[RenderableType] = [
        Text(f"A  {found.a}", overflow="fold"),
        Text(f"B  {found.b}", overflow="fold"),
        Text(),
    ]
    if found.equal:
        return Group(*parts, Text("nothing differs"))
    for name, differences in found.parts.items():
        if differences:
            parts += [_part(name, differences), Text()]
    return Group(*parts)


def _part(name: str, differences: list[Difference]) -> RichTable:
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in (name, "A", "B"):
        table.add_column(heading, overflow="fold")
    table.add_column("B / A", justify="right")
    most = MOST_LAYERS if name == "layers" else len(differences)
    for d in differences[:most]:
        ratio = "" if d.ratio is None else f"{d.ratio:.4g}"
        table.add_row(Text(d.name), Text(_word(d.a)), Text(_word(d.b)), ratio)
    if len(differences) > most:
        table.add_row(f"... {len(differences) - most} more")
    return table


def _word(value: Any) -> str:
    return NONE if value is None else label(value)

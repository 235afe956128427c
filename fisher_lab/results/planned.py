"""Cells that a sweep file asks for and that have left no record, or one without a configuration.

``sweep.json`` lists the cells of a sweep by their axes. A cell that was never run becomes a row
with the status ``missing``, so that no table passes over it. What its settings would be is taken
from the runs that share its values; nothing is composed here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fisher_lab.results.axes import GROUP_KEYS, SEED
from fisher_lab.results.values import meaning
from fisher_lab.runs.record import RUN_FILE
from fisher_lab.runs.status import Status

if TYPE_CHECKING:
    from fisher_lab.results.loading import Found, Row, Run, Sweep


def complete(rows: Sequence[Row], sweeps: Mapping[str, Sweep]) -> list[Row]:
    """The rows with those of planned cells that are not there.

    Args:
        rows: what was read.
        sweeps: directory -> sweep.
    """
    from fisher_lab.results.loading import Found

    done = list(rows)
    for sweep in sweeps.values():
        cells = [c for c in sweep.about.get("cells") or [] if _is_cell(c)]
        if not cells:
            continue
        mine = {run["meta"]["run_id"]: (i, run) for i, (one, run) in enumerate(done)
                if one.sweep == sweep.directory}  # fmt: skip
        axes = {str(cell["run_id"]): cell["axes"] for cell in cells}
        typed = {str(cell["run_id"]): _typed_overrides(cell) for cell in cells}
        known = [(axes[n], r["config"]) for n, (_, r) in mine.items() if n in axes and r["config"]]
        for name, values in axes.items():
            if name in mine and mine[name][1]["config"]:
                continue
            config = _config(values, known)
            if name in mine:
                mine[name][1]["config"] = config
            else:
                found = Found(sweep.directory / name, sweep.directory)
                done.append((found, _stand_in(found, config, typed[name])))
    return done


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, dict) and "run_id" in cell and isinstance(cell.get("axes"), dict)


def _typed_overrides(cell: Mapping[str, Any]) -> str | None:
    given = cell.get("overrides")
    return shlex.join(map(str, given)) if isinstance(given, list) else None


def _stand_in(found: Found, config: dict[str, Any], overrides: str | None) -> Run:
    unread = (found.directory / RUN_FILE).exists()
    meta = {
        "run_id": found.directory.name,
        "status": Status.CORRUPT if unread else Status.MISSING,
        "reason": "its record cannot be read" if unread else "it has not been run",
        "not_finite": "",
        "overrides": overrides,
    }
    return {"meta": meta, "config": config, "metrics": {}, "provenance": {}}


Known = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _config(axes: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """What the cell's settings are, as far as the other cells tell."""
    config: dict[str, Any] = {}
    if known:
        first = known[0][1]
        config = {k: v for k, v in first.items() if all(c.get(k) == v for _, c in known)}
    for axis, value in axes.items():
        same_value = [c for a, c in known if a.get(axis) == value]
        if same_value:
            decided = _decided_by(axis, known)
            config |= {k: same_value[0].get(k) for k in decided}
        key = GROUP_KEYS.get(axis, axis.replace("/", "."))
        plain = axis == SEED or "." in axis or "/" in axis  # and not a section with several keys
        if plain and (not known or key in known[0][1]):
            config[key] = same_value[0].get(key) if same_value else _typed(value)
    return config


def _decided_by(axis: str, known: Known) -> list[str]:
    """Settings that differ between cells and whose value the axis decides."""
    decided = []
    for key in known[0][1]:
        seen: dict[Any, Any] = {}
        pairs = [(str(a.get(axis)), c.get(key)) for a, c in known]
        function = all(seen.setdefault(a, v) == v for a, v in pairs)
        if function and len({repr(v) for _, v in pairs}) > 1:
            decided.append(key)
    return decided


def _typed(value: Any) -> Any:
    known = meaning(value)
    if isinstance(known, float) and known.is_integer() and str(value).lstrip("+-").isdigit():
        return int(known)
    return known

"""What was read of a large sweep, kept beside it; a run whose files have changed is read anew.

The file is columnar JSON: most settings are the same in every run of a sweep, so that each column
holds its distinct values once. It may be deleted at any time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic
from fisher_lab.runs.record import METRICS_FILE, RUN_FILE

from .discover import Found, LeftOut
from .errors import ResultsError

CACHE_FILE = ".fisher_lab_results.json"
VERSION = 1
"""Raised when :func:`fisher_lab.results.loading.read_run` comes to return something else."""

WORTH_IT = 200
"""Runs that have to be read anew before the cache is written: below, reading is as quick."""

ABSENT = object()

Run = dict[str, dict[str, Any]]
Row = tuple[Found, Run]
State = list[Any]


def rows(found: Sequence[Found], read: Callable[[Path], Run]) -> tuple[list[Row], list[LeftOut]]:
    """Read runs, from the caches of their sweeps where those are up to date.

    Args:
        found: the run directories.
        read: reads one; raises ResultsError for one that cannot be read.

    Returns:
        What was read, in the order of ``found``, and what was left out.
    """
    by_sweep: dict[Path, list[Found]] = {}
    for one in found:
        by_sweep.setdefault(one.sweep, []).append(one)
    known: dict[Path, Run] = {}
    left: list[LeftOut] = []
    for sweep, members in by_sweep.items():
        known |= _sweep(sweep, members, read, left)
    return [(one, known[one.directory]) for one in found if one.directory in known], left


def _sweep(
    sweep: Path, members: Sequence[Found], read: Callable[[Path], Run], left: list[LeftOut]
) -> dict[Path, Run]:
    file = sweep / CACHE_FILE
    cached = _load(file) if len(members) >= WORTH_IT else {}
    known: dict[Path, Run] = {}
    states: dict[str, State] = {}
    fresh = 0
    for one in members:
        name = os.path.relpath(one.directory, sweep)
        state = _state(one.directory)
        if name in cached and cached[name][0] == state:
            known[one.directory] = cached[name][1]
        else:
            try:
                known[one.directory] = read(one.directory)
            except ResultsError as error:
                left.append(LeftOut(str(one.directory), str(error)))
                continue
            fresh += 1
        states[name] = state
    if fresh >= WORTH_IT:
        _save(file, {name: (states[name], known[sweep / name]) for name in states})
    return known


def _state(directory: Path) -> State:
    """What changes when a run's files do: they are replaced by renaming, never written in place."""
    state: State = []
    for name in (RUN_FILE, METRICS_FILE):
        try:
            about = os.stat(directory / name)
            state += [about.st_mtime_ns, about.st_size, about.st_ino]
        except OSError:
            state += [0, 0, 0]
    return state


def _load(file: Path) -> dict[str, tuple[State, Run]]:
    try:
        about = json.loads(file.read_bytes())
        if about["version"] != VERSION:
            return {}
        names, states = about["names"], about["states"]
        runs: list[Run] = [{} for _ in names]
        for part, columns in about["parts"].items():
            for run, values in zip(runs, _rows(columns, len(names)), strict=True):
                run[part] = values
        return {n: (s, r) for n, s, r in zip(names, states, runs, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}  # not there, or not ours: everything is read


def _save(file: Path, known: Mapping[str, tuple[State, Run]]) -> None:
    runs = [run for _, run in known.values()]
    about = {
        "version": VERSION,
        "names": list(known),
        "states": [state for state, _ in known.values()],
        "parts": {part: _columns([run[part] for run in runs]) for part in runs[0]},
    }
    try:
        atomic.write_text(file, json.dumps(about, allow_nan=False, separators=(",", ":")))
    except OSError:
        return  # a directory that is not ours to write in: no cache


def _columns(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> ``values`` (the distinct ones) and ``codes`` (a place in them for each run, or -1).

    The type goes into the key, so that ``1``, ``1.0`` and ``true`` stay apart.
    """
    parts = list(parts)
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        places: dict[Any, int] = {}
        codes: list[int] = []
        before: Any = ABSENT
        for part in parts:
            value = part.get(name, ABSENT)
            if value is before and codes:  # most settings are the same from run to run
                codes.append(codes[-1])
                continue
            before = value
            if value is ABSENT:
                codes.append(-1)
            elif isinstance(value, float) and not math.isfinite(value):
                codes.append(places.setdefault((str, float, "nan"), len(places)))
            else:
                codes.append(places.setdefault((type(value), None, value), len(places)))
        values = [[value] if kind else value for _, kind, value in places]
        columns[name] = {"values": values, "codes": codes}
    return columns


def _rows(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, column in columns.items():
        # A list stands for a number that JSON has no word for.
        values = [math.nan if isinstance(v, list) else v for v in column["values"]]
        for row, code in zip(rows, column["codes"], strict=True):
            if code >= 0:
                row[name] = values[code]
    return rows
